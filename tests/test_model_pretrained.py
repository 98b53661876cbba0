"""Torchvision's COCO weights as checkpoints: names, the 80 categories, files, and what is said where there is no network."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torchvision_networks import BUILDERS, calm_network, drawn

from model.backbones.frozen_norm import FrozenNorm
from model.checkpoint import load_checkpoint, load_detector, save_checkpoint
from model.faster_rcnn import build_detector
from model.pretrained import PUBLISHED, Weights, coco_checkpoint, convert, main, preset_of
from model.weights import WeightsError

NAME = "mobilenet_v3_large_320_fpn"
CATEGORIES = PUBLISHED[NAME].meta["categories"]
NAMED = [row for row, category in enumerate(CATEGORIES) if category != "N/A"]
PREDICTOR = "roi_heads.box_predictor."


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return calm_network(NAME)


@pytest.fixture(scope="module")
def weights_file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "given.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache of downloads, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def random_state(name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = BUILDERS[name](weights=None, weights_backbone=None, num_classes=91).state_dict()
    return state


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ("resnet50_fpn", "resnet50_fpn"),
        ("fasterrcnn_resnet50_fpn_v2", "resnet50_fpn_v2"),
        ("FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1", "resnet50_fpn_v2"),
        ("FasterRCNN_MobileNet_V3_Large_FPN_Weights", "mobilenet_v3_large_fpn"),
        ("FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.DEFAULT", NAME),
    ],
)
def test_every_spelling_of_a_name(given: str, preset: str) -> None:
    assert preset_of(given) == preset
    assert {preset_of(str(weights)) for weights in PUBLISHED.values()} == set(BUILDERS)


@pytest.mark.parametrize("given", ["vgg16", "", "retinanet_resnet50_fpn", "resnet50_fpn.COCO_V9"])
def test_unknown_name_lists_the_known(given: str) -> None:
    with pytest.raises(WeightsError, match=r"no COCO weights .* mobilenet_v3_large_320_fpn, .*, resnet50_fpn, resnet50_fpn_v2"):
        preset_of(given)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_all_four_become_networks_of_80_categories(name: str) -> None:
    checkpoint = convert(name, Weights(random_state(name), "file.pth", genuine=True))
    names = checkpoint.config.class_names
    assert len(names) == 80
    assert (names[0], names[11], names[-1]) == ("person", "stop sign", "toothbrush")  # 12 is a number without a category
    assert checkpoint.config.architecture == name
    assert str(PUBLISHED[name]) in checkpoint.training["dataset"]
    detector = build_detector(checkpoint.config)
    detector.load_state_dict(checkpoint.detector)
    dropped = 10 * 5 * (1024 + 1)  # ten classes with one logit and four deltas each, over 1024 features
    assert sum(parameter.numel() for parameter in detector.parameters()) == PUBLISHED[name].meta["num_params"] - dropped
    eps = {module.eps for module in detector.modules() if isinstance(module, FrozenNorm)}
    assert eps == {"resnet50_fpn": {0.0}, "resnet50_fpn_v2": set()}.get(name, {1e-5})


def test_a_score_loses_only_what_nameless_classes_had(network: nn.Module) -> None:
    checkpoint = convert(NAME, Weights(network.state_dict(), "file.pth", genuine=False))
    detector = build_detector(checkpoint.config)
    detector.load_state_dict(checkpoint.detector)
    hidden = torch.randn(7, 1024, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, their_deltas = network.roi_heads.box_predictor(hidden)
        ours, our_deltas = detector.head.cls_score(hidden), detector.head.bbox_pred(hidden)
    torch.testing.assert_close(our_deltas.reshape(7, 81, 4), their_deltas.reshape(7, 91, 4)[:, NAMED])
    before, after = theirs.softmax(1), ours.softmax(1)
    nameless = [row for row in range(91) if row not in NAMED]
    lost = before[:, nameless].sum(1, keepdim=True)
    assert lost.max() > 0.01, "the case must be able to fail"
    torch.testing.assert_close(after, before[:, NAMED] / (1 - lost))


def test_the_same_answers_by_name_as_torchvisions(network: nn.Module, tmp_path: Path) -> None:
    """With nameless classes as improbable as training leaves them. In fp64, so that no rounding decides about a suppression."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    state[f"{PREDICTOR}cls_score.bias"][[row for row in range(91) if row not in NAMED]] = -50.0
    theirs = calm_network(NAME)
    theirs.load_state_dict(state)
    theirs.double()
    theirs.rpn.score_thresh = 0.05
    save_checkpoint(tmp_path / "coco.pt", convert(NAME, Weights(state, "file.pth", genuine=False)))
    ours = load_detector(tmp_path / "coco.pt").double()
    image = drawn()[1].mul(255).round().to(torch.uint8).permute(1, 2, 0)
    with torch.no_grad():
        wanted = theirs([image.permute(2, 0, 1).double() / 255])[0]
        answer = ours(image[None], torch.tensor([image.shape[:2]]))
    count = int(answer.num_detections[0])
    assert count == len(wanted["scores"]) > 10
    torch.testing.assert_close(answer.scores[0, :count], wanted["scores"], atol=1e-4, rtol=0)
    torch.testing.assert_close(answer.boxes[0, :count], wanted["boxes"], atol=1e-2, rtol=0)
    names = [ours.config.class_names[label - 1] for label in answer.labels[0, :count]]
    assert names == [CATEGORIES[label] for label in wanted["labels"]]


def test_files_published_under_older_names_load(network: nn.Module) -> None:
    state = network.state_dict()
    older = {
        re.sub(r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv.", re.sub(r"(inner|layer)_blocks\.(\d)\.0\.", r"\1_blocks.\2.", name)): value
        for name, value in state.items()
    }
    assert set(older) != set(state)
    one, other = (convert(NAME, Weights(names, "file.pth", genuine=False)).detector for names in (state, older))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_numbers_of_classes_are_refused(network: nn.Module) -> None:
    state = dict(network.state_dict())
    state[f"{PREDICTOR}cls_score.weight"] = torch.zeros(5, 1024)
    with pytest.raises(WeightsError, match=r"cls_score.weight has shape \(5, 1024\), expected 91 rows"):
        convert(NAME, Weights(state, "file.pth", genuine=False))
    del state[f"{PREDICTOR}cls_score.weight"]
    with pytest.raises(WeightsError, match=r"no weights for 1 of .*'head.cls_score.weight'"):
        convert(NAME, Weights(state, "file.pth", genuine=False))


def test_weights_of_another_network_are_refused(weights_file: Path) -> None:
    with pytest.raises(WeightsError, match=r"given\.pth holds \d+ weights that resnet50_fpn lacks"):
        coco_checkpoint("resnet50_fpn", weights_file)


def test_command_writes_a_checkpoint_and_nothing_warns(weights_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "coco.pt"
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "model.pretrained",
        f"fasterrcnn_{NAME}",
        "--weights",
        str(weights_file),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"next: python -m export {out}" in done.stdout
    checkpoint = load_checkpoint(out)
    assert checkpoint.training == {"command": f"python -m model.pretrained {NAME}", "dataset": "not known: weights from given.pth"}
    assert load_detector(out).config.num_classes == 80


def test_a_published_file_is_recognised_by_its_hash(weights_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    published = SimpleNamespace(url=f"https://example.org/coco-{digest[:8]}.pth", meta=PUBLISHED[NAME].meta)
    monkeypatch.setitem(PUBLISHED, NAME, published)
    training = coco_checkpoint(NAME, weights_file).training
    assert training["dataset"].startswith("COCO train2017")
    assert training["metrics"] == {"published": {"COCO-val2017": {"box_map": 22.8}}}


def test_weights_in_torchs_cache_need_no_network(weights_file: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: pytest.fail("asked the network"))
    empty_cache.mkdir(parents=True)
    (empty_cache / Path(PUBLISHED[NAME].url).name).symlink_to(weights_file)
    assert coco_checkpoint(NAME).training["metrics"]["published"]


@pytest.mark.parametrize("error", [URLError("Name or service not known"), TimeoutError("timed out"), ConnectionResetError("reset by peer")])
def test_without_a_network_one_sentence(
    error: Exception, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    assert main(["resnet50_fpn", "--out", str(tmp_path / "coco.pt")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: cannot fetch torchvision's FasterRCNN_ResNet50_FPN_Weights.COCO_V1")
    assert str(getattr(error, "reason", error)) in message
    assert "--weights FILE" in message
    assert not (tmp_path / "coco.pt").exists()


def test_a_damaged_download_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(*_: object, **__: object) -> io.BytesIO:
        body = io.BytesIO(b"not the weights")
        body.info = lambda: SimpleNamespace(get_all=lambda _: None)  # type: ignore[attr-defined]
        return body

    monkeypatch.setattr("torch.hub.urlopen", damaged)
    assert main([NAME, "--out", str(tmp_path / "coco.pt")]) == 1
    assert "invalid hash value" in capsys.readouterr().err
    assert not (tmp_path / "coco.pt").exists()
    assert list(empty_cache.iterdir()) == []


def test_faults_of_a_given_file_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([NAME, "--weights", str(tmp_path / "none.pth")]) == 1
    assert "with --weights FILE" in capsys.readouterr().err
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    assert main([NAME, "--weights", str(tmp_path / "text.pth")]) == 1
    assert "text.pth is no state dict" in capsys.readouterr().err
