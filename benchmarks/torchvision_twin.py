"""Torchvision's Faster R-CNN with the network of a preset: the yardstick of training and eager speed.

The parts are torchvision's (bodies, pyramid, anchors, RPN, heads, transform); only the numbers come from our configuration. Both sides
then hold the same number of parameters, and learn the same number of them: `check_twin` makes sure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, roi_pool
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from export.pictures import street
from model.backbones.zf import ZF
from model.config import DetectorConfig
from model.weights import BOOKKEEPING

NormLayer = Callable[[int], nn.Module]

RESNET_STAGES = ("conv1 bn1", "layer1", "layer2", "layer3", "layer4")
MOBILE_STAGES = {
    "mobilenet_v2": (0, 2, 4, 7, 14, 18),
    "mobilenet_v2_c4": (0, 2, 4, 7, 14),
    "mobilenet_v3_large": (0, 2, 4, 7, 13, 16, 17),
}
MOBILE_TAPS = {
    "mobilenet_v2": ((6, 32), (13, 96), (17, 320)),
    "mobilenet_v2_c4": ((13, 96),),
    "mobilenet_v3_large": ((13, 160), (16, 960)),
}
VGG_STAGES = (0, 5, 10, 17, 24, 30)
SINGLE_MAP_STRIDE = 16
START_HW = (192, 256)


class TwinError(ValueError):
    """The two sides do not hold the same network."""


def torchvision_twin(config: DetectorConfig) -> nn.Module:
    """Random weights, frozen stages as the configuration wants them; takes lists of float pictures 0..1 and of targets."""
    backbone, last_stage = _backbone(config)
    channels: int = backbone.out_channels  # type: ignore[assignment]  # a plain attribute, which torch types as a module
    anchors = AnchorGenerator(config.anchors.sizes, (config.anchors.ratios,) * len(config.anchors.sizes))
    per_cell = anchors.num_anchors_per_location()[0]
    head_maps = len(config.anchors.sizes) - (1 if config.backbone.fpn_channels and config.backbone.extra_level else 0)
    rpn, roi = config.rpn, config.roi
    box_head, width = _box_head(config, channels, last_stage)
    twin: nn.Module = detection.FasterRCNN(
        backbone,
        min_size=config.input.short_side,
        max_size=config.input.long_side,
        image_mean=list(config.input.mean),
        image_std=list(config.input.std),
        rpn_anchor_generator=anchors,
        rpn_head=_rpn_head(config, channels, per_cell),
        rpn_pre_nms_top_n_train=rpn.pre_nms_top_n_train,
        rpn_pre_nms_top_n_test=rpn.pre_nms_top_n_test,
        rpn_post_nms_top_n_train=rpn.post_nms_top_n_train,
        rpn_post_nms_top_n_test=rpn.post_nms_top_n_test,
        rpn_nms_thresh=rpn.nms_thresh,
        rpn_score_thresh=rpn.score_thresh,
        rpn_batch_size_per_image=rpn.samples_per_image,
        box_roi_pool=MultiScaleRoIAlign(
            [str(level) for level in range(head_maps)],
            roi.pool_size,
            2,
            canonical_scale=int(roi.canonical_size),
            canonical_level=4 if roi.canonical_level < 0 else roi.canonical_level + 2,
        ),
        box_head=box_head,
        box_predictor=FastRCNNPredictor(width, config.num_classes + 1),
        box_score_thresh=roi.score_thresh,
        box_nms_thresh=roi.nms_thresh,
        box_detections_per_img=roi.detections_per_image,
        box_batch_size_per_image=roi.samples_per_image,
    )
    if roi.pool == "max":  # the constructor takes RoIAlign alone, the heads call whatever pools
        twin.roi_heads.box_roi_pool = SingleMapRoIPool(roi.pool_size, 1 / SINGLE_MAP_STRIDE)  # type: ignore[union-attr]
    return twin


class SingleMapRoIPool(nn.Module):
    """Torchvision's RoIPool in the place of its MultiScaleRoIAlign."""

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.size, self.scale = size, scale

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _image_shapes: list[tuple[int, int]]) -> Tensor:
        pooled: Tensor = roi_pool(features["0"], boxes, self.size, spatial_scale=self.scale)
        return pooled


def check_twin(ours: nn.Module, theirs: nn.Module) -> None:
    """Raises:
    TwinError: the sides differ in their number of parameters, or in how many of them learn.
    """
    for what, counted in (("parameters", _parameters), ("learning parameters", _learning)):
        if counted(ours) != counted(theirs):
            raise TwinError(f"the sides are not the same network: {counted(ours)} {what} here, {counted(theirs)} in torchvision's")


def share_weights(source: nn.Module, target: nn.Module) -> None:
    """Give one side the weights and statistics of the other: random networks that differ bring different numbers of proposals, and of RoIs.

    Both register their layers in the same order, body to predictor.

    Raises:
        TwinError: a weight has another shape on the other side.
    """
    given = [(name, value) for name, value in source.state_dict().items() if not name.endswith(BOOKKEEPING)]
    taken = [(name, value) for name, value in target.state_dict().items() if not name.endswith(BOOKKEEPING)]
    for (name, value), (place_name, place) in itertools.zip_longest(given, taken, fillvalue=("nothing", torch.empty(0))):
        if value.shape != place.shape:
            raise TwinError(f"{name} {tuple(value.shape)} of one side stands where the other has {place_name} {tuple(place.shape)}")
        place.copy_(value)  # the entries of a state dict share the network's memory


@torch.no_grad()
def start_calmly(twin: nn.Module, config: DetectorConfig) -> None:
    """Set the statistics of all norms, in place, from one drawn picture, layer after layer.

    Random weights behind frozen norms otherwise shrink a picture to 10^-8 (MobileNets) or blow it up to 10^5 (ResNet-101), and either
    way all anchors of a level score alike.
    """
    norms = [module for module in twin.modules() if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    pixels = torch.from_numpy(street(START_HW, seed=0)).permute(2, 0, 1)[None] / 255
    maps = twin.get_submodule("backbone").eval()((pixels - 0.45) / 0.225)
    channels, size = maps["0"].shape[1], config.roi.pool_size
    pooled = torch.randn(8, channels, size, size, generator=torch.Generator().manual_seed(0)).relu()
    twin.get_submodule("roi_heads.box_head").eval()(pooled)
    for hook in hooks:
        hook.remove()


def _take_statistics(norm: Any, inputs: tuple[Tensor]) -> None:
    norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    norm.running_var.copy_(inputs[0].var((0, 2, 3)) + 1e-3)


def _parameters(network: nn.Module) -> int:
    """Frozen norms hold theirs in buffers on both sides."""
    return sum(parameter.numel() for parameter in network.parameters())


def _learning(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


# -- backbones ----------------------------------------------------------------------------------------------------------------


class _SingleMap(nn.Module):
    """A chain of layers that gives one map under the name that torchvision's detectors expect."""

    def __init__(self, layers: nn.Module, channels: int) -> None:
        super().__init__()
        self.layers = layers
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.layers(x)
        return {"0": out[-1] if isinstance(out, list) else out}


def _backbone(config: DetectorConfig) -> tuple[nn.Module, nn.Module | None]:
    """The backbone with its frozen stages, and the ResNet's last stage where that is the head."""
    name = config.backbone.name
    norm: NormLayer = nn.BatchNorm2d if config.backbone.norm == "batch" else partial(FrozenBatchNorm2d, eps=config.backbone.norm_eps)
    if name.startswith("mobilenet"):
        return _mobilenet(config, norm), None
    if name.endswith("_c4"):
        return _c4(config, norm)
    if name.startswith("resnet"):
        return _resnet_fpn(config, norm), None
    if name == "vgg16":
        return _vgg(config), None
    body = ZF(config.backbone)  # torchvision has no such body; the detector around it is torchvision's
    _freeze(list(body.stages()), config)
    return _SingleMap(body, body.channels[-1]), None


def _mobilenet(config: DetectorConfig, norm: NormLayer) -> nn.Module:
    name = config.backbone.name
    features = getattr(torchvision.models, name.removesuffix("_c4"))(weights=None, norm_layer=norm).features
    bounds = MOBILE_STAGES[name]
    _freeze([features[start:end] for start, end in itertools.pairwise(bounds)], config)
    taps = MOBILE_TAPS[name]
    if config.backbone.fpn_channels is None:
        return _SingleMap(features[: bounds[-1]], taps[0][1])
    names = {str(index): str(level) for level, (index, _) in enumerate(taps)}
    return _pyramid(features, names, [channels for _, channels in taps], config, norm)


def _resnet_fpn(config: DetectorConfig, norm: NormLayer) -> nn.Module:
    body = getattr(torchvision.models, config.backbone.name)(weights=None, norm_layer=norm)
    _freeze(_resnet_stages(body), config)
    names = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
    return _pyramid(body, names, [256, 512, 1024, 2048], config, norm)


def _pyramid(body: nn.Module, names: dict[str, str], channels: list[int], config: DetectorConfig, norm: NormLayer) -> nn.Module:
    width = config.backbone.fpn_channels
    assert width is not None
    extra = LastLevelMaxPool() if config.backbone.extra_level else None
    pyramid: nn.Module = BackboneWithFPN(body, names, channels, width, extra, norm_layer=norm if config.backbone.norm == "batch" else None)
    return pyramid


def _c4(config: DetectorConfig, norm: NormLayer) -> tuple[nn.Module, nn.Module]:
    body = getattr(torchvision.models, config.backbone.name.removesuffix("_c4"))(weights=None, norm_layer=norm)
    _freeze(_resnet_stages(body)[:-1], config)
    layers = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool, body.layer1, body.layer2, body.layer3)
    return _SingleMap(layers, 1024), body.layer4


def _vgg(config: DetectorConfig) -> nn.Module:
    features = torchvision.models.vgg16(weights=None).features[:-1]
    _freeze([features[start:end] for start, end in itertools.pairwise(VGG_STAGES)], config)
    return _SingleMap(features, 512)


def _resnet_stages(body: nn.Module) -> list[nn.Module]:
    return [nn.ModuleList(body.get_submodule(name) for name in names.split()) for names in RESNET_STAGES]


def _freeze(stages: list[nn.Module], config: DetectorConfig) -> None:
    for stage in stages[: max(0, len(stages) - config.backbone.trainable_stages)]:
        stage.requires_grad_(False)


# -- heads --------------------------------------------------------------------------------------------------------------------


class _PaperRPNHead(nn.Module):
    """The paper's RPN, whose hidden layer need not be as deep as the features."""

    def __init__(self, channels: int, hidden: int, per_cell: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU())
        self.cls_logits = nn.Conv2d(hidden, per_cell, 1)
        self.bbox_pred = nn.Conv2d(hidden, per_cell * 4, 1)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(feature) for feature in features]
        return [self.cls_logits(each) for each in hidden], [self.bbox_pred(each) for each in hidden]


def _rpn_head(config: DetectorConfig, channels: int, per_cell: int) -> nn.Module:
    if config.rpn.hidden and config.rpn.hidden != channels:
        return _PaperRPNHead(channels, config.rpn.hidden, per_cell)
    head: nn.Module = RPNHead(channels, per_cell, conv_depth=config.rpn.conv_depth)
    return head


def _box_head(config: DetectorConfig, channels: int, last_stage: nn.Module | None) -> tuple[nn.Module, int]:
    """The head between pooled features and predictors, and its width."""
    roi = config.roi
    parts: Any
    if last_stage is not None:
        return nn.Sequential(last_stage, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 2048
    if roi.head == "conv_fc":
        parts = FastRCNNConvFCHead((channels, roi.pool_size, roi.pool_size), [channels] * 4, [roi.hidden], norm_layer=nn.BatchNorm2d)
    else:
        parts = TwoMLPHead(channels * roi.pool_size**2, roi.hidden)
    return parts, roi.hidden
