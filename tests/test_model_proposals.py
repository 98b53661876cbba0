"""Selective Search proposals: where they lie, that they are the same every time, and that the cache is believed only when it is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.data.formats import open_dataset
from model.data.synthetic import draw_scene, write_voc
from model.metrics.recall import proposal_recall
from model.proposals import SearchConfig, cache_key, main, search_dataset, search_file, selective_search

QUICK = SearchConfig(limit=200, min_side=8.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 3})


def test_objects_are_found_at_the_scale_of_the_original_frame() -> None:
    scene = draw_scene(3, (96, 160), shapes=(2, 3), sides=(24, 48))
    whole = selective_search(scene.image, QUICK).boxes
    shrunk = selective_search(scene.image, SearchConfig(max_side=80, min_side=8.0)).boxes
    for boxes in (whole, shrunk):
        assert boxes.dtype == np.float32
        assert boxes[:, [0, 1]].min() >= 0
        assert boxes[:, 2].max() <= 160
        assert boxes[:, 3].max() <= 96
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= 8.0
    assert shrunk[:, 2].max() > 120  # back from the frame that was searched


def test_the_same_picture_gives_the_same_order() -> None:
    image = draw_scene(4, (96, 160)).image
    first, second = selective_search(image, QUICK).boxes, selective_search(image, QUICK).boxes
    np.testing.assert_array_equal(first, second)
    other = selective_search(image, SearchConfig(limit=200, min_side=8.0, seed=7)).boxes
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_proposals_cover_the_objects_of_a_set(data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(data, "train")
    done: list[tuple[int, int]] = []
    found = search_dataset(dataset, tmp_path, QUICK, progress=lambda *numbers: done.append(numbers))
    assert done == [(1, 3), (2, 3), (3, 3)]
    recall = proposal_recall(dataset, [result.boxes for result in found], top_n=(200,))
    assert recall[200]["all"]["recall_50"] > 0.8


def test_a_cached_search_is_read_and_a_broken_one_is_done_again(data: Path, tmp_path: Path) -> None:
    path = open_dataset(data, "train").records[0].path
    first = search_file(path, tmp_path, QUICK)
    kept = tmp_path / f"{cache_key(path, QUICK)}.npz"
    written = kept.stat().st_mtime_ns
    again = search_file(path, tmp_path, QUICK)
    np.testing.assert_array_equal(again.boxes, first.boxes)
    assert again.seconds == first.seconds
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[:100])
    np.testing.assert_array_equal(search_file(path, tmp_path, QUICK).boxes, first.boxes)
    assert kept.stat().st_size > 100
    assert [file.name for file in tmp_path.iterdir()] == [kept.name]


def test_the_key_follows_content_and_parameters(data: Path, tmp_path: Path) -> None:
    first, second = (record.path for record in open_dataset(data, "train").records[:2])
    renamed = tmp_path / "other_name.png"
    renamed.write_bytes(first.read_bytes())
    assert cache_key(renamed, QUICK) == cache_key(first, QUICK)
    assert len({cache_key(first, QUICK), cache_key(second, QUICK), cache_key(first, SearchConfig())}) == 3


def test_the_command_says_what_it_did_and_does_it_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(data), "--out", str(tmp_path), "--limit", "100"]
    assert main(arguments) == 0
    assert "3 pictures, 0 of them" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "3 pictures, 3 of them" in capsys.readouterr().out
    assert main([str(data / "nowhere"), "--out", str(tmp_path)]) == 1
    assert "no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_find_what_one_finds(data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(data, "train")
    alone = search_dataset(dataset, tmp_path / "one", QUICK)
    together = search_dataset(dataset, tmp_path / "two", QUICK, workers=2)
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a.boxes, b.boxes)
