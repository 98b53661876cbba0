from __future__ import annotations

import pytest

from service.errors import BadOption
from service.options import DEFAULTS, OPTION_NAMES, parse_options, select_labels


def test_nothing_given_means_the_defaults():
    assert parse_options([]) is DEFAULTS
    assert (DEFAULTS.score_threshold, DEFAULTS.max_detections, DEFAULTS.box_format, DEFAULTS.format) == (0.5, 100, "xyxy", "json")


def test_text_and_json_values_mean_the_same():
    text = parse_options([("score_threshold", "0.25"), ("max_detections", "7"), ("classes", "a,b"), ("classes", " c ")])
    json = parse_options([("score_threshold", 0.25), ("max_detections", 7), ("classes", ["a", "b", "c"])])
    assert text == json
    assert text.classes == ("a", "b", "c")


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_a_misspelt_option_is_refused_with_the_nearest_name(name):
    misspelt = name[:-1] + "z" if name != "model" else "modle"
    with pytest.raises(BadOption, match=f"did you mean '{name}'"):
        parse_options([(misspelt, "1")])


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(BadOption, match=r"expected one of score_threshold, .*image"):
        parse_options([("qqqqqqqq", "1")], also_known=("image",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score_threshold", "abc"),
        ("score_threshold", "nan"),
        ("score_threshold", "NaN"),
        ("score_threshold", "1e400"),
        ("score_threshold", "-1"),
        ("max_detections", "0"),
        ("max_detections", -1),
        ("max_detections", "9" * 21),
        ("max_detections", "1" * 5000),
        ("classes", [1e308, None]),
        ("classes", {"a": 1}),
        ("box_format", "foo"),
        ("box_format", None),
        ("format", "pdf"),
        ("timeout_ms", "-5"),
        ("model", "m" * 5000),
        ("model", 5),
        ("priority", "urgent"),
    ],
)
def test_a_bad_value_is_refused_by_name_and_shown_short(name, value):
    with pytest.raises(BadOption, match=f"option '{name}'") as caught:
        parse_options([(name, value)])
    assert len(caught.value.detail) < 250


def test_the_same_option_twice_is_a_contradiction():
    with pytest.raises(BadOption, match="twice"):
        parse_options([("box_format", "xyxy"), ("box_format", "xywh")])


def test_classes_become_labels():
    assert select_labels((), ["WBC", "RBC"]) is None
    assert select_labels(("RBC",), ["WBC", "RBC"]) == {2}
    with pytest.raises(BadOption, match="did you mean 'Platelets'"):
        select_labels(("platelet",), ["WBC", "RBC", "Platelets"])
