import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_model_boxes import random_boxes
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from model.matching import BACKGROUND, IGNORED, match, sample

GT = torch.tensor([[[0.0, 0.0, 10.0, 20.0], [30.0, 30.0, 50.0, 40.0], [0.0, 0.0, 0.0, 0.0]]])
GT_VALID = torch.tensor([[True, True, False]])


def match_one(candidates: torch.Tensor, *, low_quality: bool) -> list[int]:
    return match(candidates, GT, GT_VALID, fg_iou_thresh=0.7, bg_iou_thresh=0.3, allow_low_quality=low_quality)[0].tolist()


def test_match_by_hand() -> None:
    candidates = torch.tensor(
        [
            [0.0, 0.0, 10.0, 20.0],  # the first box itself
            [30.0, 30.0, 50.0, 35.0],  # half of the second: between the thresholds
            [60.0, 0.0, 70.0, 20.0],  # nothing
            [0.0, 0.0, 10.0, 15.0],  # IoU 0.75 with the first
        ]
    )
    assert match_one(candidates, low_quality=False) == [0, IGNORED, BACKGROUND, 0]
    assert match_one(candidates, low_quality=True) == [0, 1, BACKGROUND, 0], "the best candidate of a box always learns it"


def test_low_quality_takes_every_tie() -> None:
    candidates = torch.tensor([[30.0, 30.0, 50.0, 32.0], [30.0, 38.0, 50.0, 40.0], [30.0, 30.0, 31.0, 31.0]])
    assert match_one(candidates, low_quality=True) == [1, 1, BACKGROUND]


def test_nothing_to_match_is_all_background() -> None:
    matched = match(
        random_boxes(5, 0), GT, torch.zeros(1, 3, dtype=torch.bool), fg_iou_thresh=0.5, bg_iou_thresh=0.5, allow_low_quality=True
    )
    assert matched.tolist() == [[BACKGROUND] * 5]


@given(st.integers(0, 500), st.booleans())
def test_match_equals_torchvision_image_by_image(seed: int, low_quality: bool) -> None:
    candidates = random_boxes(60, seed)
    counts = [3, 1, 5]
    gt = torch.zeros(3, 5, 4)
    for image, count in enumerate(counts):
        gt[image, :count] = random_boxes(count, seed + image + 1)
    valid = torch.arange(5)[None] < torch.tensor(counts)[:, None]
    # where a box meets no candidate at all, torchvision matches it to every candidate, for all tie at IoU 0; here it matches none
    assume(all(box_iou(gt[i, :count], candidates).amax(1).min() > 0 for i, count in enumerate(counts)))
    ours = match(candidates, gt, valid, fg_iou_thresh=0.6, bg_iou_thresh=0.3, allow_low_quality=low_quality)
    matcher = Matcher(0.6, 0.3, allow_low_quality_matches=low_quality)
    for image, count in enumerate(counts):
        expected = matcher(box_iou(gt[image, :count], candidates))
        assert ours[image].tolist() == expected.tolist()


def test_sample_counts_and_kinds() -> None:
    matched = torch.full((2, 100), BACKGROUND)
    matched[0, :40] = 3  # more foreground than its share
    matched[1, :5] = 0  # less
    matched[1, 50:] = IGNORED
    samples = sample(matched, 32, 0.5, generator=torch.Generator().manual_seed(0))
    assert samples.rows.shape == (2, 32)
    assert samples.foreground.sum(1).tolist() == [16, 5]
    assert samples.valid.all()
    chosen = matched.gather(1, samples.rows)
    assert (chosen[samples.foreground] >= 0).all()
    assert (chosen[~samples.foreground] == BACKGROUND).all()
    for rows in samples.rows:
        assert len(set(rows.tolist())) == 32, "no candidate twice"


def test_sample_marks_what_is_missing() -> None:
    matched = torch.tensor([[BACKGROUND, 0, IGNORED, IGNORED, BACKGROUND]])
    eligible = torch.tensor([[True, True, True, True, False]])
    samples = sample(matched, 8, 0.5, eligible=eligible)
    assert samples.valid.sum() == 2
    assert samples.foreground.sum() == 1
    assert sorted(samples.rows[samples.valid].tolist()) == [0, 1]


def test_sample_is_random_but_repeatable() -> None:
    matched = torch.full((1, 500), BACKGROUND)
    draws = [sample(matched, 16, 0.5, generator=torch.Generator().manual_seed(seed)).rows.tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
