import pytest

from model.overrides import with_detector_settings, with_settings
from model.presets import mobilenet_v2_fpn


def test_settings_reach_nested_values_and_keep_types() -> None:
    values = {"training": {"lr": 0.1, "augment": {"scale": [1.0, 1.0]}}, "detector": {"backbone": {"name": "a"}}}
    changed = with_settings(values, ["training.augment.scale=[0.5,2]", "training.lr=3e-3", "detector.backbone.name=resnet50"])
    assert changed["training"] == {"lr": 0.003, "augment": {"scale": [0.5, 2]}}
    assert changed["detector"]["backbone"]["name"] == "resnet50"
    assert values["training"]["lr"] == 0.1


def test_a_trained_detector_takes_other_thresholds() -> None:
    config = mobilenet_v2_fpn(("cell",)).detector
    changed = with_detector_settings(config, ["detector.roi.nms_thresh=0.6", "detector.input.short_side=320"])
    assert (changed.roi.nms_thresh, changed.input.short_side) == (0.6, 320)
    assert changed.backbone == config.backbone
    assert with_detector_settings(config, []) is config


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("detector.roi.nms=0.6", "nms_thresh"),
        ("training.lr=1", "detector.*"),
        ("detector.roi.nms_thresh", "expected KEY=VALUE"),
    ],
)
def test_unknown_keys_are_named(setting: str, words: str) -> None:
    with pytest.raises(ValueError, match=setting) as raised:
        with_detector_settings(mobilenet_v2_fpn(("cell",)).detector, [setting])
    assert words in str(raised.value)
