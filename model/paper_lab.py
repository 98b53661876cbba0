"""What the tables of the paper are made from: trained parts, proposals and scores, each computed once a seed.

P proposals of a picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from model.alternate import Alternation, Plan, detector_config, plan_of
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import DetectorConfig
from model.data.records import DetectionSet
from model.fast_rcnn import detect_external
from model.faster_rcnn import FasterRCNN
from model.inference import predict
from model.metrics.predictions import Prediction
from model.metrics.voc import voc_curves
from model.paper_normal import head_normal, speaking_normal
from model.paper_progress import Advance, shown_progress
from model.paper_proposals import ProposalOptions, rpn_proposals
from model.paper_resume import StageFile
from model.paper_training import Recipe, fast_objective, train_stage
from model.proposals import SearchConfig, Searched, search_dataset

Boxes = list[NDArray[np.float32]]
Say = Callable[[str], None]
Made = TypeVar("Made")

OFFICIAL_PIXELS = 1.0
"""Official VOC evaluation counts the last pixel too."""


@dataclass(frozen=True)
class Sets:
    """Data of a table: `train` is what the paper calls 07, `union` what it calls 07+12 (None: not given)."""

    train: DetectionSet
    test: DetectionSet
    union: DetectionSet | None = None


@dataclass(frozen=True)
class Setup:
    """What all seeds of a table share.

    Attributes:
        preset: network of the table; `rpn_preset` of the row that borrows another network's proposals.
        settings: KEY=VALUE for every network.
        weights: ImageNet weights by preset.
        steps: of the four stages; the second is that of a Fast R-CNN alone.
        cache: folder of Selective Search proposals.
        work: folder in which trainings are kept and gone on with; None: nothing is kept.
    """

    preset: str
    rpn_preset: str
    settings: tuple[str, ...]
    weights: dict[str, Path]
    variant: Literal["python", "matlab"]
    steps: tuple[int, int, int, int]
    recipe: Recipe
    search: SearchConfig
    cache: Path
    work: Path | None
    device: str
    say: Say


@dataclass
class Lab:
    """One seed of a table."""

    sets: Sets
    setup: Setup
    seed: int
    _made: dict[str, Any] = field(default_factory=dict)

    def once(self, key: str, make: Callable[[], Made]) -> Made:
        """The result under a key, made when it is first asked for."""
        if key not in self._made:
            self._made[key] = make()
        result: Made = self._made[key]
        return result

    def progress(self, name: str, total: int, unit: str = "pictures") -> AbstractContextManager[Advance]:
        """A bar, or lines, with the time left."""
        return shown_progress(lambda text: self.setup.say(f"  {text}"), f"{name}, seed {self.seed}", total, unit)

    # -- networks -------------------------------------------------------------------------------------------------------------

    def config(self, preset: str | None = None) -> DetectorConfig:
        return detector_config(preset or self.setup.preset, self.sets.train.class_names, self.setup.settings)

    @property
    def plan(self) -> Plan:
        return plan_of(self.setup.variant, self.setup.steps, self.setup.recipe, self.seed)

    def alternation(self, name: str, config: DetectorConfig, dataset: DetectionSet, folder: Path, preset: str | None = None) -> Alternation:
        weights = self.setup.weights.get(preset or self.setup.preset)
        say = self.setup.say
        return Alternation(
            config,
            weights,
            dataset,
            self.plan,
            folder,
            device=self.setup.device,
            say=lambda text: say(f"  {name}, seed {self.seed}: {text}"),
        )

    def shared(
        self, name: str = "shared", config: DetectorConfig | None = None, *, dataset: DetectionSet | None = None, preset: str | None = None
    ) -> FasterRCNN:
        """The detector of all four steps."""
        return self._steps(name, config or self.config(), dataset or self.sets.train, preset)[2]

    def unshared(self) -> tuple[FasterRCNN, FasterRCNN]:
        """The RPN of step 1 and the detector of step 2, two networks that share nothing."""
        return self._steps("shared", self.config(), self.sets.train, None)[:2]

    def _steps(
        self, name: str, config: DetectorConfig, dataset: DetectionSet, preset: str | None
    ) -> tuple[FasterRCNN, FasterRCNN, FasterRCNN]:
        def train() -> tuple[FasterRCNN, FasterRCNN, FasterRCNN]:
            if self.setup.work is not None:
                return self._run(self.alternation(name, config, dataset, self.setup.work / f"{name}_seed{self.seed}", preset))
            with tempfile.TemporaryDirectory() as folder:
                return self._run(self.alternation(name, config, dataset, Path(folder), preset))

        return self.once(f"steps {name}", train)

    def _run(self, alternation: Alternation) -> tuple[FasterRCNN, FasterRCNN, FasterRCNN]:
        final = alternation.run()
        return alternation.step_detector(1), alternation.step_detector(2), final

    def rpn(self, preset: str | None = None) -> FasterRCNN:
        """An RPN alone, as step 1 leaves it: of the table's own network, or of another."""
        if preset is None or preset == self.setup.preset:
            return self.unshared()[0]
        return self.once(f"rpn {preset}", lambda: self._rpn_of(preset))

    def _rpn_of(self, preset: str) -> FasterRCNN:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if self.setup.work is None else self.setup.work / f"rpn_{preset}_seed{self.seed}"
            alternation = self.alternation(f"RPN of {preset}", self.config(preset), self.sets.train, folder, preset)
            return alternation.run(last=1)

    def fast(self, preset: str | None = None, dataset: DetectionSet | None = None, name: str = "07") -> FasterRCNN:
        """A Fast R-CNN trained on Selective Search."""
        used, chosen = dataset or self.sets.train, preset or self.setup.preset

        def train() -> FasterRCNN:
            maker = self.alternation("Fast R-CNN", self.config(chosen), used, Path(), chosen)
            detector = maker.new_detector()
            made_by = {**maker.made_by, "search": repr(self.setup.search)}
            path = None if self.setup.work is None else self.setup.work / f"fast_{chosen}_{name}_seed{self.seed}.pt"
            if path is not None and path.is_file() and (checkpoint := load_checkpoint(path)).training.get("made_by") == made_by:
                self.setup.say(f"  Fast R-CNN {chosen}, seed {self.seed}: done before, {path}")
                detector.load_state_dict(checkpoint.detector)
                return detector
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._train_fast(detector, used, None if path is None else StageFile(path.with_suffix(".running.pt"), made_by), chosen)
            if path is not None:
                save_checkpoint(path, Checkpoint(detector.state_dict(), detector.config, {"made_by": made_by}))
                path.with_suffix(".running.pt").unlink(missing_ok=True)
            return detector

        return self.once(f"fast {chosen} {name}", train)

    def _train_fast(self, detector: FasterRCNN, dataset: DetectionSet, kept: StageFile | None, preset: str) -> None:
        proposals, recipe = self.searched_boxes(dataset), replace(self.setup.recipe, steps=self.setup.steps[1])
        normal = head_normal(detector, dataset, proposals, recipe.hflip)
        objective, learning = fast_objective(detector, normal=normal), [detector.backbone, detector.head]
        shown = self.progress(f"Fast R-CNN {preset} on {dataset.name}", recipe.steps, "steps")
        with speaking_normal(detector.head.bbox_pred, normal), shown as progress:
            train_stage(detector, learning, objective, dataset, recipe, seed=self.seed, proposals=proposals, progress=progress, kept=kept)

    # -- proposals ------------------------------------------------------------------------------------------------------------

    def searched(self, dataset: DetectionSet) -> list[Searched]:
        def search() -> list[Searched]:
            with self.progress(f"Selective Search on {dataset.name}, kept in {self.setup.cache}", len(dataset)) as progress:
                return search_dataset(dataset, self.setup.cache, self.setup.search, progress=lambda done, _: progress(done, None))

        return self.once(f"search {dataset.name} {len(dataset)}", search)

    def searched_boxes(self, dataset: DetectionSet) -> Boxes:
        return [result.boxes for result in self.searched(dataset)]

    def proposed(self, rpn: FasterRCNN, options: ProposalOptions) -> Boxes:
        """Proposals of an RPN for the test pictures."""
        with self.progress(f"proposals for {self.sets.test.name}", len(self.sets.test)) as progress:
            return rpn_proposals(rpn, self.sets.test, options, seed=self.seed, progress=progress)

    # -- scores ---------------------------------------------------------------------------------------------------------------

    def score_external(self, detector: FasterRCNN, proposals: Boxes, limit: int = 2000) -> float:
        with self.progress(f"detections on {self.sets.test.name}", len(self.sets.test)) as progress:
            found = detect_external(detector, self.sets.test, proposals, limit=limit, progress=lambda done: progress(done, None))
            return self.score(found)

    def score_whole(self, detector: FasterRCNN) -> float:
        with self.progress(f"detections on {self.sets.test.name}", len(self.sets.test)) as progress:
            return self.score(predict(detector, self.sets.test, progress=lambda done: progress(done, None)))

    def score(self, predictions: list[Prediction]) -> float:
        """VOC07's mean average precision in per cent: 11 points, IoU 0.5, inclusive pixels."""
        return mean_ap(self.sets.test, predictions)


def mean_ap(dataset: DetectionSet, predictions: list[Prediction]) -> float:
    """Mean over the classes that occur, in per cent; 0 for a set without objects."""
    curves = voc_curves(dataset, predictions, pixel_offset=OFFICIAL_PIXELS).values()
    found = [curve.ap_11_point for curve in curves if curve.positives]
    return 100.0 * float(np.mean(found)) if found else 0.0
