"""Configuration of a detector: frozen dataclasses that survive a round trip through plain JSON types."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputConfig:
    """How a picture enters the network.

    Attributes:
        short_side, long_side: a picture is resized, aspect kept, until it touches one of them from below.
        buckets: (height, width) of the padded inputs that serving will use, multiples of 32.
        mean, std: normalisation of RGB in 0..1.
    """

    short_side: int
    long_side: int
    buckets: tuple[tuple[int, int], ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class BackboneConfig:
    """Feature extractor and pyramid.

    Attributes:
        name: a key of `model.backbones.BODIES`.
        fpn_channels: channels of every pyramid level; None: no pyramid, the body's own maps.
        extra_level: adds a level at twice the last stride (max pooling), as FPN does for the RPN. The head does not see it.
        trainable_stages: how many of the last stages learn; earlier ones are frozen.
        norm: "frozen" keeps the statistics of the pretrained body and folds them into its convolutions; "batch" learns them,
            in the body and in the pyramid.
        norm_eps: of the frozen norm.
    """

    name: str
    fpn_channels: int | None
    extra_level: bool = True
    trainable_stages: int = 5
    norm: Literal["frozen", "batch"] = "frozen"
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class AnchorConfig:
    """Anchor shapes: `sizes[l]` are the square roots of areas at level l, `ratios` are height / width.

    Attributes:
        rule: "centred" rounds boxes around the cell's corner (torchvision); "paper" enumerates them from a 16 px window around its
            centre, as the original release did.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rule: Literal["centred", "paper"] = "centred"


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network. Defaults are torchvision's.

    Attributes:
        conv_depth: how many 3x3 convolutions come before the two siblings.
        hidden: their channels; None: those of the features.
        inside_only: learn only from anchors that lie inside the image (the paper, section 3.3).
        reg_weight: factor on the box loss (the paper's lambda, relative to N_reg = N_cls).
    """

    conv_depth: int = 1
    hidden: int | None = None
    inside_only: bool = False
    reg_weight: float = 1.0
    pre_nms_top_n_train: int = 2000
    pre_nms_top_n_test: int = 1000
    post_nms_top_n_train: int = 2000
    post_nms_top_n_test: int = 1000
    nms_thresh: float = 0.7
    score_thresh: float = 0.0
    min_size: float = 1e-3
    fg_iou_thresh: float = 0.7
    bg_iou_thresh: float = 0.3
    samples_per_image: int = 256
    positive_fraction: float = 0.5
    smooth_l1_beta: float = 1 / 9


@dataclass(frozen=True)
class RoIConfig:
    """Detection head. Defaults are torchvision's.

    Attributes:
        pool: "align" (RoIAlign, half-pixel centres), "align_legacy" (RoIAlign without the half-pixel shift, torchvision's default),
            "max" (RoIPool of Fast R-CNN, one level only).
        head: what stands between pooled features and the two predictors: "two_fc"; "conv_fc" (four 3x3 convolutions and one fc);
            "res5" (the last stage of the ResNet named by the backbone).
        dropout: after each fully connected layer of "two_fc".
        canonical_size, canonical_level: eq. 1 of FPN, k = floor(canonical_level + log2(sqrt(area) / canonical_size)),
            with levels counted from the finest map: 2 is p4 where p2 is the finest.
        candidates_per_image: at most this many (RoI, class) pairs enter the final NMS, best first.
    """

    pool: Literal["align", "align_legacy", "max"] = "align"
    head: Literal["two_fc", "conv_fc", "res5"] = "two_fc"
    dropout: float = 0.0
    pool_size: int = 7
    sampling_ratio: int = 2
    canonical_size: float = 224.0
    canonical_level: int = 2
    hidden: int = 1024
    fg_iou_thresh: float = 0.5
    samples_per_image: int = 512
    positive_fraction: float = 0.25
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    smooth_l1_beta: float = 1 / 9
    score_thresh: float = 0.05
    min_size: float = 1e-2
    nms_thresh: float = 0.5
    candidates_per_image: int = 1000
    detections_per_image: int = 100


@dataclass(frozen=True)
class DetectorConfig:
    """One Faster R-CNN. `class_names` leaves out the background: label k is class_names[k - 1]."""

    class_names: tuple[str, ...]
    input: InputConfig
    backbone: BackboneConfig
    anchors: AnchorConfig
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()
    architecture: str = "faster_rcnn"

    @property
    def num_classes(self) -> int:
        """K, without background."""
        return len(self.class_names)


T = TypeVar("T")

_SECTIONS: dict[str, type] = {
    "input": InputConfig,
    "backbone": BackboneConfig,
    "anchors": AnchorConfig,
    "rpn": RPNConfig,
    "roi": RoIConfig,
}


def to_dict(config: DetectorConfig) -> dict[str, Any]:
    """Plain dicts, tuples and scalars, as a checkpoint stores them."""
    return dataclasses.asdict(config)


def config_from_dict(values: Mapping[str, Any]) -> DetectorConfig:
    """The inverse of `to_dict`; lists (from JSON) become tuples.

    Raises:
        ValueError: a key that this version does not know, by name.
    """
    sections = {key: _section(_SECTIONS[key], value) if key in _SECTIONS else _tuples(value) for key, value in values.items()}
    return _section(DetectorConfig, sections)


def _section(kind: type[T], values: Mapping[str, Any]) -> T:
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{kind.__name__}: unknown keys {unknown}; expected some of {sorted(known)}")
    return kind(**{key: _tuples(value) for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
