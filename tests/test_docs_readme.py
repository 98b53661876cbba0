"""The README and the other documents name only what is there: files, verbs, modules, settings; and figures as the results have them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import ROOT

from service.manifest import parse_manifest
from service.settings import ENV_PREFIX, Settings

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "deploy").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"")


def linked(document: Path) -> set[Path]:
    """Files that a document links to or shows."""
    return {(document.parent / (found[1] or found[2])).resolve() for found in LINK.finditer(document.read_text())}


def result(name: str) -> Any:
    """A file of the results as data."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def row(begins: str) -> str:
    """The line of a table in the README that begins with a cell."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {begins}")]
    return line


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path) -> None:
    assert [path for path in linked(document) if not path.exists()] == []


def test_sections_that_the_readme_links_to_exist() -> None:
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) - anchors == set()


def test_every_result_and_screenshot_is_shown_somewhere() -> None:
    """A figure that nobody can find is as good as none. JSON beside a page of the same name needs no link of its own."""
    shown = set().union(*(linked(document) for document in DOCUMENTS))
    named = {name for document in DOCUMENTS for name in re.findall(r"`(?:benchmarks/results/)?([\w.]+)`", document.read_text())}
    kept = [*RESULTS.iterdir(), *(ROOT / "docs" / "screenshots").iterdir()]
    lost = [path.name for path in kept if path not in shown and path.name not in named and path.with_suffix(".md") not in shown]
    assert lost == []


def test_the_readme_states_every_setting_with_its_default() -> None:
    stated = dict(re.findall(rf"^\| `({ENV_PREFIX}\w+)` \| (\S+) \|", README, re.MULTILINE))
    assert stated == {f"{ENV_PREFIX}{name.upper()}": _default(field.default) for name, field in Settings.model_fields.items()}


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        value = ",".join(value)
    return "unset" if value in (None, "") else str(value)


def test_commands_name_modules_and_verbs_that_exist() -> None:
    text = "".join(document.read_text() for document in DOCUMENTS)
    modules = set(re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text)) - {"venv", "pip"}
    assert len(modules) > 15
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []
    verbs = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) - verbs == set()


def test_the_demos_figures_are_those_of_the_bundled_file() -> None:
    model = onnx.load(ROOT / "model_repository" / "blood-cells" / "1" / "model.onnx")
    manifest = parse_manifest({entry.key: entry.value for entry in model.metadata_props}, "the demo")
    metrics, parity = manifest.training.metrics, manifest.parity
    assert f"AP {metrics['coco/AP']:.3f}, AP50 {metrics['coco/AP50']:.3f}, VOC AP50 {metrics['voc_ap50']:.3f}" in row("the bundled file")
    agreement = row("ONNX Runtime against eager PyTorch")
    assert (parity["missed"], parity["extra"]) == (0, 0)
    assert f"{parity['detections']} detections in {parity['pictures']} pictures: none missed, none extra" in agreement
    for size in (parity["max_box_px"], parity["max_score"]):
        assert f"{size:.1e}".replace("e-0", "e-") in agreement


def test_the_seeds_figures_are_those_of_the_results() -> None:
    mean, spread = result("demo_seeds")["mean"], result("demo_seeds")["spread"]
    words = [f"{name} {mean[name]:.3f} ± {spread[name]:.3f}" for name in ("AP", "AP50")]
    assert ", ".join(words) in row("the same recipe from three seeds")


def test_the_training_table_is_that_of_the_results() -> None:
    rows = {(found["preset"], found["short_side"]): found for found in result("training")["rows"]}
    for preset in {preset for preset, _ in rows}:
        cells = [cell for side in (None, 256) for cell in _training_cells(rows.get((preset, side)))]
        assert f"| `{preset}` | {' | '.join(cells)} |" in README.splitlines(), preset


def _training_cells(found: dict[str, Any] | None) -> list[str]:
    """Ratio of training, of inference, and of peak memory less one; dashes where nothing was measured."""
    if found is None:
        return ["-"] * 3
    peak = found["training"]["peak_memory_bytes"]
    more = 100 * (peak["ours"] / peak["torchvision"] - 1)
    return [f"{found['training']['ratio']:.2f}x", f"{found['inference']['ratio']:.2f}x", f"{more:+.0f} %"]


def test_the_figures_of_operation_are_those_of_the_results() -> None:
    soak, reloads, footprint = result("soak"), result("reloads"), result("footprint")
    memory = soak["resident_mb"]
    said = row("half an hour of good, bad")
    assert f"{soak['answers']['reload']['200']} reloads" in said
    assert f"{soak['answers']['good']['200']} good answers, no fault" in said
    assert not soak["faults"]
    assert (
        f"{memory['median']:.0f} MB in the median, {memory['largest']:.0f} MB at its largest, grown by {memory['growth_mb']:.0f} MB" in said
    )
    said, memory = row("100 reloads"), reloads["resident_mb"]
    assert f"{reloads['requests']} requests, none failed; median reload {reloads['reload_median_s']:.1f} s" in said
    assert f"between {min(memory['each'])} and {memory['largest']} MB, its trend {memory['slope_mb_a_reload']:.1f} MB a reload" in said
    said = row("start to ready")
    assert f"{footprint['cold_start_median_s']:.1f} s; {footprint['idle_rss_mb']:.0f} MB resident" in said
    assert f"`/metrics` {footprint['metrics_ms']['cpu']:.1f} ms of CPU" in said


def test_a_missed_aim_of_serving_is_called_missed() -> None:
    missed = [line.split("|")[1:3] for line in (RESULTS / "serving.md").read_text().splitlines() if line.endswith("| missed |")]
    section = README[README.index("### Serving") : README.index("### Operation")]
    assert section.count("missed**") == len(missed)
