"""The arrows between the folders: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("service", "model", "export", "deploy", "benchmarks", "tests")
ALLOWED = {
    "service": {"service"},
    "model": {"model"},
    "export": {"export", "model", "service"},
    "deploy": {"deploy", "service"},
    "benchmarks": {"benchmarks", "deploy", "export", "model", "service"},
}
SERVICE_NEVER = {"torch", "torchvision", "onnx", "onnxscript"}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folders_import_only_what_they_may(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert roots & set(FOLDERS) <= ALLOWED[folder], path
        if folder == "service":
            assert not roots & SERVICE_NEVER, path


def test_only_the_entry_points_import_the_app() -> None:
    importers = {path.relative_to(ROOT).as_posix() for path in (ROOT / "service").rglob("*.py") if "service.app" in imported_modules(path)}
    assert importers <= {"service/__main__.py"}


def test_a_running_service_holds_no_torch() -> None:
    """What the process really loads, lazily imported modules of libraries included."""
    program = "import sys, service.app; print(sorted({'torch', 'torchvision', 'model', 'export'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
