"""The environments that the Makefile makes: which requirements each installs, and that those for a GPU differ in the runtime alone."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess

import pytest
from conftest import ROOT

FOLDER = ROOT / "requirements"


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", (FOLDER / f"{name}.txt").read_text(), re.MULTILINE))


def planned(*arguments: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "--always-make", *arguments]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # the tests may run under make themselves
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_job_has_its_file_and_every_package_a_hash() -> None:
    jobs = runpy.run_path(str(FOLDER / "compile.py"))["JOBS"]
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(jobs)
    for name in jobs:
        text = (FOLDER / f"{name}.txt").read_text()
        assert "://" not in text, "no address of an index"
        for package in re.split(r"\n(?=\S)", text.strip()):
            assert "--hash=sha256:" in package, f"{name}: {package.splitlines()[0]} has no hash"


def test_development_on_a_gpu_differs_in_the_runtime_and_its_libraries_alone() -> None:
    usual, gpu = pins("dev"), pins("dev-gpu")
    assert usual.keys() - gpu.keys() == {"onnxruntime"}
    assert gpu["onnxruntime-gpu"] == usual["onnxruntime"] == pins("gpu")["onnxruntime-gpu"]
    assert all(name.startswith("nvidia-") for name in gpu.keys() - usual.keys() - {"onnxruntime-gpu"})
    assert {name: gpu[name] for name in usual if name in gpu} == {name: usual[name] for name in usual if name in gpu}


@pytest.mark.parametrize("verb", ["export", "test", "train"])
def test_the_gpu_build_of_the_runtime_has_an_environment_of_its_own(verb: str) -> None:
    usual, gpu = planned(verb), planned(verb, "DEVICE=gpu")
    assert "-r requirements/dev.txt" in usual
    assert ".venv-gpu" not in usual
    assert "-r requirements/dev-gpu.txt" in gpu
    assert ".venv-gpu/bin/python -m" in gpu
    assert not re.search(r"\.venv/", gpu)
    assert planned(verb, "DEVICE=cpu") == usual
