"""Four-step alternating training of the paper, section 3.2: `python -m model.alternate DATA --out RUN`.

1 the RPN from ImageNet; 2 a Fast R-CNN on its proposals, from ImageNet again; 3 the RPN's own layers on the network of step 2;
4 the head's own layers on the proposals of step 3. Every step leaves a checkpoint, and a finished step is not repeated; Ctrl-C keeps
the running one too, and the same command goes on from there to the bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from model.config import DetectorConfig, config_from_dict, to_dict
from model.data.formats import READERS, open_dataset
from model.data.images import ImageError
from model.data.records import DataError, DetectionSet
from model.faster_rcnn import FasterRCNN, build_detector
from model.inference import predict
from model.metrics.recall import proposal_recall
from model.metrics.report import evaluate_detections
from model.overrides import with_settings
from model.paper_normal import head_normal, rpn_normal, speaking_normal
from model.paper_progress import shown_progress
from model.paper_proposals import ProposalOptions, rpn_proposals
from model.paper_resume import StageFile, StageInterrupted
from model.paper_training import Recipe, fast_objective, paper_init, rpn_objective, train_stage
from model.presets import PRESETS
from model.processes import start_processes
from model.random_state import seed_everything
from model.run_folder import command_line, git_commit
from model.stopping import INTERRUPTED
from model.train import preset_values
from model.trainer import TrainingError
from model.weights import WeightsError

PAPER_STEPS = (80_000, 40_000, 80_000, 40_000)
"""On VOC07, section "Schedules" of the releases."""

TRAINING_PROPOSALS = ProposalOptions(top_n=2000)
MATLAB_BACKGROUND_LOW = 0.1
RECALL_LIMITS = (100, 300, 1000, 2000)

Say = Callable[[str], None]

EXAMPLES = """examples:
  python -m model.alternate VOC2007 --preset vgg16 --backbone-weights vgg16.pth --out runs/alternate
  python -m model.alternate VOC_FOLDER --preset zf --variant matlab --steps 400,200,400,200 --train-split train --test-split val \\
      --set detector.input.short_side=320 --set detector.input.long_side=480 --out runs/small
  python -m model.alternate VOC_FOLDER --preset mobilenet_v2_fpn --backbone-weights mobilenet_v2.pth --out runs/cells \\
      --train-split train --test-split val --lr 0.01 --batch-size 2 --steps 300,300,150,150 --set detector.input.short_side=224
Started again with the same options, it goes on where it was interrupted.
"""


@dataclass(frozen=True)
class Plan:
    """A whole alternating training.

    Attributes:
        variant: "python": step 4 starts from the snapshot of step 3, its class and box layers anew. "matlab": steps 3 and 4 both start
            from the detector of step 2, heads included, background RoIs overlap some object by at least 0.1, and the RPN learns
            targets normalised by their mean and deviation. In both, the head's targets are normalised by those of each class.
        recipes: of the four steps.
    """

    variant: Literal["python", "matlab"]
    recipes: tuple[Recipe, Recipe, Recipe, Recipe]
    seed: int = 0


def plan_of(variant: Literal["python", "matlab"], steps: Sequence[int], recipe: Recipe, seed: int = 0) -> Plan:
    """A plan whose four steps differ in length alone.

    Raises:
        ValueError: not four positive numbers.
    """
    if len(steps) != 4 or min(steps) < 1:
        raise ValueError(f"expected four positive numbers of steps, got {list(steps)}")
    first, second, third, fourth = (dataclasses.replace(recipe, steps=count) for count in steps)
    return Plan(variant, (first, second, third, fourth), seed)


class Alternation:
    """Runs the steps of a plan, each from the checkpoints of those before it."""

    def __init__(
        self,
        config: DetectorConfig,
        weights: Path | None,
        dataset: DetectionSet,
        plan: Plan,
        folder: Path,
        *,
        device: str = "cpu",
        say: Say = lambda _: None,
    ) -> None:
        self.config, self.weights, self.dataset, self.plan, self.folder = config, weights, dataset, plan, folder
        self.device, self.say = device, say
        self.made_by = json.loads(json.dumps(self._identity()))

    def run(self, last: int = 4) -> FasterRCNN:
        """The detector after step `last`, in evaluation mode; its checkpoint is step4.pt where that is the fourth.

        Raises:
            CheckpointError: the folder holds the steps of another plan, or the disk is full.
            TrainingError: a loss that is no number.
            StageInterrupted: Ctrl-C or SIGTERM; the running step was saved and the next call goes on with it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for step, work in enumerate((self._step1, self._step2, self._step3, self._step4)[:last], start=1):
            if self._finished(step):
                self.say(f"step {step}: done before, {self.path(step)}")
                continue
            if self.running_path(step).is_file():
                self.say(f"step {step}: goes on with {self.running_path(step)}")
            started = time.monotonic()
            detector = self.new_detector()
            loss = work(detector)
            self._save(step, detector, loss)
            self.running_path(step).unlink(missing_ok=True)
            self.say(f"step {step}: loss {loss:.4f} in {time.monotonic() - started:.0f} s, {self.path(step)}")
        return self._restored(last)

    def path(self, step: int) -> Path:
        return self.folder / f"step{step}.pt"

    def running_path(self, step: int) -> Path:
        """Where a step is kept until it is finished."""
        return self.folder / f"step{step}.running.pt"

    def new_detector(self) -> FasterRCNN:
        """A detector as every step begins: random, or from ImageNet; the paper's initialisation of the predictors."""
        seed_everything(self.plan.seed)
        detector = build_detector(self.config, self.weights)
        paper_init(detector.head.cls_score, detector.head.bbox_pred)
        return detector.to(self.device).eval()

    def step_detector(self, step: int) -> FasterRCNN:
        """The network that a finished step left."""
        return self._restored(step)

    # -- the steps ------------------------------------------------------------------------------------------------------------

    def _step1(self, detector: FasterRCNN) -> float:
        return self._train(1, detector, [detector.backbone, detector.rpn])

    def _step2(self, detector: FasterRCNN) -> float:
        return self._train(2, detector, [detector.backbone, detector.head], self.proposals(1))

    def _step3(self, detector: FasterRCNN) -> float:
        fresh_rpn = {name: value.clone() for name, value in detector.rpn.state_dict().items()}
        detector.load_state_dict(load_checkpoint(self.path(2)).detector)
        detector.rpn.load_state_dict(fresh_rpn)
        return self._train(3, detector, [detector.rpn])

    def _step4(self, detector: FasterRCNN) -> float:
        # step 3 left backbone and head of step 2 alone, so its snapshot is where both variants start
        detector.load_state_dict(load_checkpoint(self.path(3)).detector)
        if self.plan.variant == "python":
            paper_init(detector.head.cls_score, detector.head.bbox_pred)
        return self._train(4, detector, [detector.head], self.proposals(3))

    def _train(
        self, step: int, detector: FasterRCNN, learning: list[nn.Module], proposals: Sequence[NDArray[np.floating]] | None = None
    ) -> float:
        recipe, matlab = self.plan.recipes[step - 1], self.plan.variant == "matlab"
        layer: nn.Conv2d | nn.Linear
        if proposals is None:
            normal = rpn_normal(detector, self.dataset, recipe.hflip) if matlab else None
            layer, objective = detector.rpn.bbox_pred, rpn_objective(detector, normal=normal)
        else:
            normal = head_normal(detector, self.dataset, proposals, recipe.hflip)
            low = MATLAB_BACKGROUND_LOW if matlab else 0.0
            layer, objective = detector.head.bbox_pred, fast_objective(detector, background_low=low, normal=normal)
        kept = StageFile(self.running_path(step), self.made_by)
        with speaking_normal(layer, normal), shown_progress(self.say, f"step {step}", recipe.steps) as progress:
            return train_stage(
                detector,
                learning,
                objective,
                self.dataset,
                recipe,
                seed=self.plan.seed * 4 + step,
                proposals=proposals,
                progress=progress,
                kept=kept,
            )

    def proposals(self, step: int) -> list[NDArray[np.float32]]:
        """Proposals of step 1 or 3 for the training pictures, kept beside the checkpoint."""
        path = self.folder / f"proposals{step}.npz"
        if not path.is_file():
            with shown_progress(self.say, f"proposals of step {step}", len(self.dataset), "pictures") as progress:
                found = rpn_proposals(self._restored(step), self.dataset, TRAINING_PROPOSALS, progress=progress)
            part = path.with_name(f".{path.name}.part")
            with part.open("wb") as file:
                np.savez_compressed(file, **{str(i): boxes for i, boxes in enumerate(found)})  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        with np.load(path) as content:
            return [content[str(i)] for i in range(len(self.dataset))]

    # -- checkpoints ----------------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a step's checkpoint must have been made by, to count as done."""
        images = [record.image_id for record in self.dataset.records]
        return {
            "plan": dataclasses.asdict(self.plan),
            "detector": to_dict(self.config),
            "weights": str(self.weights) if self.weights else None,
            "dataset": self.dataset.name,
            "pictures": len(images),
        }

    def _finished(self, step: int) -> bool:
        if not self.path(step).is_file():
            return False
        if load_checkpoint(self.path(step)).training.get("made_by") != self.made_by:
            raise CheckpointError(f"{self.path(step)} was made with other options; give another --out, or the same options to go on")
        return True

    def _restored(self, step: int) -> FasterRCNN:
        detector = build_detector(self.config)
        detector.load_state_dict(load_checkpoint(self.path(step)).detector)
        return detector.to(self.device).eval()

    def _save(self, step: int, detector: FasterRCNN, loss: float) -> None:
        facts = {"dataset": self.dataset.name, "command": command_line(), "commit": git_commit(), "step": step, "loss": loss}
        save_checkpoint(self.path(step), Checkpoint(detector.state_dict(), self.config, {**facts, "made_by": self.made_by}))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m model.alternate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the four checkpoints")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="vgg16", help="network (default: vgg16)")
    parser.add_argument("--variant", choices=("python", "matlab"), default="python", help="which release to follow (default: python)")
    parser.add_argument("--steps", default=",".join(map(str, PAPER_STEPS)), help="steps of the four stages (default: the paper's on VOC07)")
    parser.add_argument("--rpn-only", action="store_true", help="stop after step 1, an RPN alone, and print the recall of its proposals")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate, a tenth after three quarters (default: 0.001)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures a step (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=sorted(READERS), help="format of the data set; guessed from the folder if left out")
    parser.add_argument("--train-split", default="trainval", help='several are joined with "+" (default: trainval)')
    parser.add_argument("--test-split", default="test", help='split to evaluate on at the end; "none" evaluates nothing (default: test)')
    parser.add_argument("--skip-bad", action="store_true", help="leave faulty records out instead of stopping at them")
    parser.add_argument("--backbone-weights", type=Path, metavar="FILE", help="ImageNet weights of the backbone, a torchvision state dict")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="as in model.train")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        _run(options)
    except (DataError, ImageError, TrainingError, CheckpointError, WeightsError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except StageInterrupted as interruption:
        print(f"{interruption}. Go on with the same command: {command_line()}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"interrupted between steps; go on with the same command: {command_line()}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(options: argparse.Namespace) -> None:
    dataset = open_dataset(options.data, options.train_split, data_format=options.format, skip_bad=options.skip_bad)
    config = detector_config(options.preset, dataset.class_names, options.settings)
    steps = [int(count) for count in options.steps.split(",")]
    plan = plan_of(options.variant, steps, Recipe(1, lr=options.lr, batch_size=options.batch_size), options.seed)
    device = str(start_processes(options.device).device)
    alternation = Alternation(config, options.backbone_weights, dataset, plan, options.out, device=device, say=_print)
    detector = alternation.run(last=1 if options.rpn_only else 4)
    if options.test_split == "none":
        return
    common = {"data_format": options.format, "skip_bad": options.skip_bad}
    test = open_dataset(options.data, options.test_split, class_names=dataset.class_names, **common)
    print(_recall_text(detector, test) if options.rpn_only else evaluate_detections(test, predict(detector, test)).to_text())


def _recall_text(rpn: FasterRCNN, test: DetectionSet) -> str:
    """Recall of the proposals of an RPN alone."""
    recalls = proposal_recall(test, rpn_proposals(rpn, test, ProposalOptions(RECALL_LIMITS[-1])), top_n=RECALL_LIMITS)
    lines = [f"proposals for {test.name}, {len(test)} pictures: recall at IoU 0.5 and 0.75, average recall"]
    for limit, by_area in recalls.items():
        lines.append("  {:4d}  {recall_50:.3f}  {recall_75:.3f}  {AR:.3f}".format(limit, **by_area["all"]))
    return "\n".join(lines)


def detector_config(preset: str, class_names: tuple[str, ...], settings: Sequence[str]) -> DetectorConfig:
    """A preset's network with KEY=VALUE settings applied.

    Raises:
        ValueError: no such key.
    """
    values = with_settings(preset_values(PRESETS[preset](class_names)), settings)
    return config_from_dict(values["detector"])


def _print(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
