"""Presets: one function a network, whose docstring states the command, the hardware, the time and the score to expect.

`python -m model.train --preset NAME --data FOLDER --out RUN` trains any of them. Pictures a second on CPU cores of an AMD EPYC are those of
`benchmarks/results/training.json`, fp32; at 256 px they are of pictures whose short side is that. COCO in the commands below stands for
`--data FOLDER --train-split train2017 --val-split val2017`, VOC07 for `--data VOC2007 --train-split trainval --val-split test`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from model.config import AnchorConfig, BackboneConfig, DetectorConfig, InputConfig, RoIConfig, RPNConfig
from model.training import AugmentConfig, TrainConfig

ClassNames = tuple[str, ...]

COCO_INPUT = InputConfig(short_side=800, long_side=1333, buckets=((800, 800), (800, 1088), (1088, 800), (800, 1344), (1344, 800)))
"""Torchvision's and detectron2's size; the buckets hold squares, 4:3 and 16:9 both ways up."""

SMALL_INPUT = InputConfig(short_side=320, long_side=640, buckets=((320, 320), (320, 448), (448, 320), (320, 640), (640, 320)))

PAPER_INPUT = InputConfig(short_side=600, long_side=1000, buckets=((608, 608), (608, 832), (832, 608), (608, 1024), (1024, 608)))
"""The paper's size, section 3.3."""

FIVE_SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)

TORCHVISION_ROI = RoIConfig(pool="align_legacy")

COCO_1X = TrainConfig(
    epochs=12,
    batch_size=16,
    lr=0.02,
    schedule="multistep",
    milestones=(8, 11),
    warmup_iterations=1000,
    weight_decay=1e-4,
)
"""The literature's 1x schedule: 90 k steps of 16 pictures."""

PAPER_TRAINING = TrainConfig(
    epochs=14,
    batch_size=1,
    lr=1e-3,
    momentum=0.9,
    weight_decay=5e-4,
    bias_lr_factor=2.0,
    schedule="multistep",
    milestones=(10,),
    warmup_iterations=0,
    augment=AugmentConfig(hflip=0.5),
)
"""Joint training of the release: 70 k steps of one VOC07 picture (5 011, flipped too), the rate falling after 50 k."""


@dataclass(frozen=True)
class Preset:
    """A network and how to train it."""

    detector: DetectorConfig
    training: TrainConfig


def mobilenet_v2_fpn(class_names: ClassNames) -> Preset:
    """MobileNetV2 with a 128-channel pyramid from stride 8 and a light head: 4.1 M parameters, 16 MB, made for CPUs.

    `python -m model.train --preset mobilenet_v2_fpn --data VOC_FOLDER --backbone-weights mobilenet_v2.pth --out runs/cells`

    On BCCD (205 photographs, `--skip-bad --set training.amp=bf16 --set training.augment.vflip=0.5 --set training.augment.rot90=0.5
    --set training.validate_every=3`): 20 minutes on one core of an AMD EPYC; over three seeds test AP 0.635 +- 0.004, AP50 0.930 +- 0.004,
    as `benchmarks/results/demo_seeds.json` has it. The demo model was best on val.

    Cells touch and overlap, and faint ones score low: the thresholds of the final NMS and of the scores were chosen on val (from 0.5 and
    0.05: AP +0.2 and AP50 +0.3 points there). The service cuts at each request's own score.
    """
    detector = DetectorConfig(
        class_names=class_names,
        input=InputConfig(short_side=480, long_side=800, buckets=((480, 480), (480, 640), (640, 480), (480, 800), (800, 480))),
        backbone=BackboneConfig(name="mobilenet_v2", fpn_channels=128, trainable_stages=3),
        anchors=AnchorConfig(sizes=((40.0,), (80.0,), (160.0,), (320.0,))),
        rpn=RPNConfig(pre_nms_top_n_train=1000, pre_nms_top_n_test=500, post_nms_top_n_train=500, post_nms_top_n_test=300),
        roi=RoIConfig(canonical_size=140.0, canonical_level=1, hidden=256, samples_per_image=128, nms_thresh=0.6, score_thresh=0.01),
        architecture="mobilenet_v2_fpn",
    )
    training = TrainConfig(
        epochs=22,
        batch_size=4,
        optimizer="adamw",
        lr=4e-4,
        weight_decay=0.05,
        warmup_iterations=100,
        ema_decay=0.995,
        augment=AugmentConfig(hflip=0.5, scale=(0.75, 1.33), brightness=0.2, contrast=0.2, saturation=0.2, hue=0.02),
    )
    return Preset(detector, training)


def resnet50_fpn(class_names: ClassNames) -> Preset:
    """ResNet-50 with a pyramid, torchvision's V1 network weight for weight (41.8 M parameters).

    `torchrun --nproc-per-node 8 -m model.train --preset resnet50_fpn --data COCO --train-split train2017 --val-split val2017
    --out runs/r50`

    Published on COCO val2017: AP 37.0 after 26 epochs (torchvision, 8 GPUs x 2), 37.9 after 12 (detectron2, 8 V100, 0.21 s a
    step: 5.3 hours). One CPU core learns from 0.11 pictures/s, from 0.7 at 256 px.
    """
    detector = DetectorConfig(
        class_names=class_names,
        input=COCO_INPUT,
        backbone=BackboneConfig(name="resnet50", fpn_channels=256, trainable_stages=3),
        anchors=AnchorConfig(sizes=tuple((size,) for size in FIVE_SIZES)),
        roi=TORCHVISION_ROI,
        architecture="resnet50_fpn",
    )
    return Preset(detector, COCO_1X)


def resnet50_fpn_v2(class_names: ClassNames) -> Preset:
    """ResNet-50 with batch norm throughout, a two-layer RPN and a convolutional head, torchvision's V2 network (43.7 M parameters).

    `torchrun --nproc-per-node 8 -m model.train --preset resnet50_fpn_v2 --data COCO --train-split train2017 --val-split val2017
    --out runs/v2`

    Published on COCO val2017: AP 46.7 after 400 epochs with large-scale jitter (torchvision). One CPU core learns from 0.22 pictures/s at
    256 px; the time on GPUs is not known here.
    """
    base = resnet50_fpn(class_names).detector
    detector = replace(
        base,
        backbone=BackboneConfig(name="resnet50", fpn_channels=256, norm="batch"),
        rpn=RPNConfig(conv_depth=2),
        roi=replace(TORCHVISION_ROI, head="conv_fc"),
        architecture="resnet50_fpn_v2",
    )
    training = replace(
        COCO_1X, epochs=400, lr=0.1, milestones=(352, 384), weight_decay=4e-5, sync_bn=True, augment=AugmentConfig(scale=(0.1, 2.0))
    )
    return Preset(detector, training)


def resnet101_fpn(class_names: ClassNames) -> Preset:
    """ResNet-101 with a pyramid (60.7 M parameters).

    `torchrun --nproc-per-node 8 -m model.train --preset resnet101_fpn --data COCO --train-split train2017 --val-split val2017
    --out runs/r101`

    Published on COCO val2017: AP 42.0 after 37 epochs (detectron2, 8 V100), 39.4 (mmdetection, 12 epochs). One CPU core learns from 0.54
    pictures/s at 256 px; the time on GPUs is not known here.
    """
    base = resnet50_fpn(class_names)
    backbone = BackboneConfig(name="resnet101", fpn_channels=256, trainable_stages=3)
    return Preset(replace(base.detector, backbone=backbone, architecture="resnet101_fpn"), base.training)


def mobilenet_v3_large_fpn(class_names: ClassNames) -> Preset:
    """MobileNetV3-Large with torchvision's three-level pyramid, two of them at stride 32 (19.4 M parameters).

    `torchrun --nproc-per-node 8 -m model.train --preset mobilenet_v3_large_fpn --data COCO --train-split train2017 --val-split val2017
    --out runs/m3`

    Published on COCO val2017: AP 32.8 after 26 epochs (torchvision). One CPU core learns from 0.86 pictures/s; the time on GPUs is not
    known here.
    """
    detector = DetectorConfig(
        class_names=class_names,
        input=COCO_INPUT,
        backbone=BackboneConfig(name="mobilenet_v3_large", fpn_channels=256, trainable_stages=3),
        anchors=AnchorConfig(sizes=(FIVE_SIZES,) * 3),
        rpn=RPNConfig(score_thresh=0.05),
        # both maps that the head sees have stride 32, and torchvision pools every RoI from the first
        roi=replace(TORCHVISION_ROI, canonical_level=-99),
        architecture="mobilenet_v3_large_fpn",
    )
    return Preset(detector, replace(COCO_1X, epochs=26, milestones=(16, 22)))


def mobilenet_v3_large_320_fpn(class_names: ClassNames) -> Preset:
    """The same network at short side 320 with 150 proposals: torchvision's fastest.

    `torchrun --nproc-per-node 8 -m model.train --preset mobilenet_v3_large_320_fpn --data COCO --train-split train2017 --val-split val2017
    --out runs/m320`

    Published on COCO val2017: AP 22.8 after 26 epochs (torchvision). Two CPU cores learn from 6.9 pictures/s.
    """
    base = mobilenet_v3_large_fpn(class_names)
    rpn = RPNConfig(score_thresh=0.05, pre_nms_top_n_train=150, pre_nms_top_n_test=150, post_nms_top_n_train=150, post_nms_top_n_test=150)
    return Preset(replace(base.detector, input=SMALL_INPUT, rpn=rpn, architecture="mobilenet_v3_large_320_fpn"), base.training)


def _c4(body: str, class_names: ClassNames) -> Preset:
    detector = DetectorConfig(
        class_names=class_names,
        input=COCO_INPUT,
        backbone=BackboneConfig(name=f"{body}_c4", fpn_channels=None, trainable_stages=2),
        anchors=AnchorConfig(sizes=(FIVE_SIZES,)),
        rpn=RPNConfig(pre_nms_top_n_train=12000, pre_nms_top_n_test=6000, post_nms_top_n_test=300),
        roi=RoIConfig(pool_size=14, head="res5"),
        architecture=f"{body}_c4",
    )
    return Preset(detector, COCO_1X)


def resnet50_c4(class_names: ClassNames) -> Preset:
    """ResNet-50 up to stride 16, its last stage on every RoI.

    `torchrun --nproc-per-node 8 -m model.train --preset resnet50_c4 --data COCO --train-split train2017 --val-split val2017
    --out runs/c4`

    Published on COCO val2017: AP 35.7 after 12 epochs (detectron2, 8 V100, 102 ms a picture). One CPU core learns from 0.03 pictures/s at
    256 px: its head, not the picture's size, takes the time, and a GPU is needed.
    """
    return _c4("resnet50", class_names)


def resnet101_c4(class_names: ClassNames) -> Preset:
    """ResNet-101 up to stride 16, its last stage on every RoI.

    `torchrun --nproc-per-node 8 -m model.train --preset resnet101_c4 --data COCO --train-split train2017 --val-split val2017
    --out runs/c4`

    Published: AP 34.9 on COCO (the ResNet paper's baseline in later literature), mAP 75.2 on VOC07 (jwyang). As slow on a
    CPU as `resnet50_c4`.
    """
    return _c4("resnet101", class_names)


def _paper(body: str, class_names: ClassNames, *, frozen: int, rpn_hidden: int, pool_size: int) -> Preset:
    detector = DetectorConfig(
        class_names=class_names,
        input=PAPER_INPUT,
        backbone=BackboneConfig(name=body, fpn_channels=None, trainable_stages=5 - frozen),
        anchors=AnchorConfig(sizes=((128.0, 256.0, 512.0),), rule="paper"),
        rpn=RPNConfig(
            hidden=rpn_hidden,
            inside_only=True,
            min_size=16.0,
            pre_nms_top_n_train=12000,
            pre_nms_top_n_test=6000,
            post_nms_top_n_train=2000,
            post_nms_top_n_test=300,
        ),
        roi=RoIConfig(pool="max", pool_size=pool_size, hidden=4096, dropout=0.5, samples_per_image=128, nms_thresh=0.3, smooth_l1_beta=1.0),
        architecture=body,
    )
    return Preset(detector, PAPER_TRAINING)


def vgg16(class_names: ClassNames) -> Preset:
    """The paper's large network: VGG-16, RoIPool, fc6 and fc7, nine anchors at stride 16.

    `python -m model.train --preset vgg16 --data VOC07 --backbone-weights vgg16.pth --out runs/vgg`

    Published on VOC07 test: mAP 69.9 trained on VOC07, 73.2 on 07+12; 198 ms a picture on a K40. One CPU core learns from
    0.41 pictures/s at 256 px.
    """
    return _paper("vgg16", class_names, frozen=2, rpn_hidden=512, pool_size=7)


def zf(class_names: ClassNames) -> Preset:
    """The paper's small network: Zeiler & Fergus, RoIPool, fc6 and fc7, nine anchors at stride 16.

    `python -m model.train --preset zf --data VOC07 --backbone-weights zf.pth --out runs/zf`

    Published on VOC07 test: mAP 59.9, five runs 59.5 to 60.4; 59 ms a picture on a K40. One CPU core learns from 1.4 pictures/s at 256 px.
    """
    return _paper("zf", class_names, frozen=0, rpn_hidden=256, pool_size=6)


def mobilenet_v2_c4(class_names: ClassNames) -> Preset:
    """The paper's layout on MobileNetV2 up to stride 16: for its four steps and its tables where there is no GPU (1.9 M parameters).

    `python -m model.alternate DATA --preset mobilenet_v2_c4 --backbone-weights mobilenet_v2.pth --lr 0.01 --batch-size 2 --out runs/c4`

    A step of two pictures takes 0.1 s on one core at short side 192. Nothing is published for it.
    """
    paper = _paper("mobilenet_v2_c4", class_names, frozen=2, rpn_hidden=96, pool_size=7)
    detector = replace(
        paper.detector,
        input=InputConfig(short_side=384, long_side=640, buckets=((384, 384), (384, 512), (512, 384), (384, 640), (640, 384))),
        anchors=AnchorConfig(sizes=((32.0, 64.0, 128.0),), rule="paper"),
        rpn=replace(paper.detector.rpn, min_size=8.0),
        roi=replace(paper.detector.roi, hidden=256, dropout=0.0),
    )
    return Preset(detector, replace(PAPER_TRAINING, lr=0.01, batch_size=2))


PRESETS: dict[str, Callable[[ClassNames], Preset]] = {
    preset.__name__: preset
    for preset in (
        mobilenet_v2_fpn,
        mobilenet_v3_large_320_fpn,
        mobilenet_v3_large_fpn,
        resnet50_fpn,
        resnet50_fpn_v2,
        resnet101_fpn,
        resnet50_c4,
        resnet101_c4,
        mobilenet_v2_c4,
        vgg16,
        zf,
    )
}
"""Name on the command line -> preset for the given class names."""
