"""The cpu image, built for real without a Docker daemon and without an image registry: `make test-image`.

buildah runs the Dockerfile on a base that debootstrap makes, in a chroot. What it gives is inspected, and then started in a sandbox.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fakes import picture
from service_onnx import write_model

from benchmarks.live import ROOT, Service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

TOOLS = {"debootstrap": "debootstrap", "buildah": "buildah", "bwrap": "bubblewrap"}
BASE = "localhost/python-base"
BASE_PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
MOST_BYTES = 700_000_000


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own."""

    folder: Path

    def __call__(self, *arguments: str | Path) -> str:
        storage = ["--root", self.folder / "storage", "--runroot", self.folder / "run", "--storage-driver", "vfs"]
        done = subprocess.run(["buildah", *storage, *arguments], capture_output=True, text=True, check=False, timeout=1800)
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stderr[-3000:]}"
        return done.stdout.strip()


@dataclass(frozen=True)
class Image:
    """A built image: its configuration, and where its files lie."""

    config: dict[str, Any]
    root: Path
    bytes: int


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"cannot build an image here; install the Debian packages {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("debootstrap makes a base image only for root")
    folder = tmp_path_factory.mktemp("image")
    buildah = Buildah(folder)
    _make_base(buildah)
    buildah("bud", "--isolation", "chroot", "--target", "cpu", "--build-arg", f"PYTHON_IMAGE={BASE}", *_registry(folder), "-t", "cpu", ROOT)
    container = buildah("from", "cpu")
    root = Path(buildah("mount", container))
    described = json.loads(buildah("inspect", "--type", "image", "cpu"))["OCIv1"]["config"]
    yield Image(described, root, sum(path.lstat().st_size for path in root.rglob("*") if not path.is_symlink()))
    buildah("rm", container)
    shutil.rmtree(folder)


def _make_base(buildah: Buildah) -> None:
    files = buildah.folder / "base"
    command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", files]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    for path in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(files / path)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, files, "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(files)


def _registry(folder: Path) -> list[str]:
    """This machine's way to the package registry: its index, and its certificates."""
    lines = ["[global]"]
    if index := os.environ.get("PIP_INDEX_URL"):
        lines.append(f"index-url = {index}")
    options = []
    if CERTIFICATES.exists():
        lines.append(f"cert = {CERTIFICATES}")
        options = ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    return [*options, "--secret", f"id=pip,src={folder / 'pip.conf'}"]


def test_it_is_small_and_says_what_it_is(image: Image) -> None:
    assert image.bytes < MOST_BYTES
    assert image.config["User"] == "10001:10001"
    assert image.config["Entrypoint"] == ["python", "-m", "service"]
    assert image.config["Labels"]["org.opencontainers.image.title"] == "faster-rcnn-service cpu"


def test_it_holds_the_service_alone(image: Image) -> None:
    assert sorted(path.name for path in (image.root / "app").iterdir() if path.name != "__pycache__") == ["healthcheck.py", "service"]
    packages = {path.name.split("-")[0].lower() for path in (image.root / "opt/venv").rglob("*.dist-info")}
    assert {"fastapi", "onnxruntime", "numpy"} <= packages
    assert packages & {"torch", "pip", "pytest", "cyclonedx_bom"} == set()
    assert not (image.root / "etc/pip.conf").exists() or (image.root / "etc/pip.conf").stat().st_size == 0


def test_its_bill_of_materials_lists_what_is_installed(image: Image) -> None:
    bill = json.loads((image.root / "usr/share/sbom/python.cdx.json").read_text())
    listed = {(_normal(component["name"]), component["version"]) for component in bill["components"]}
    names = [path.name.removesuffix(".dist-info").rsplit("-", 1) for path in (image.root / "opt/venv").rglob("*.dist-info")]
    assert bill["bomFormat"] == "CycloneDX"
    assert {(_normal(name), version) for name, version in names} - listed == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_it_serves_on_a_read_only_root_as_nobody_in_particular(image: Image, tmp_path: Path) -> None:
    write_model(tmp_path / "models")
    files = [
        "--ro-bind",
        image.root,
        "/",
        "--dev",
        "/dev",
        "--proc",
        "/proc",
        "--tmpfs",
        "/tmp",
        "--ro-bind",
        tmp_path / "models",
        "/models",
    ]
    user = ["--unshare-user", "--uid", "10001", "--gid", "10001", "--cap-drop", "ALL", "--unshare-pid", "--die-with-parent"]
    path = next(entry.split("=", 1)[1] for entry in image.config["Env"] if entry.startswith("PATH="))
    command = ["bwrap", *user, *files, "--chdir", "/app", "--setenv", "PATH", path]
    settings = {"model_repository": "/models", "provider": "cpu", "intra_op_threads": 1, "decode_threads": 1}
    with Service(tmp_path / "log", command=[*command, *image.config["Entrypoint"]], **settings) as service:
        service.until_ready()
        assert httpx.post(f"{service.url}/v1/detect", content=picture(), timeout=20).status_code == 200
        health = [*command, "--setenv", "DETECTOR_PORT", str(service.port), "python", "healthcheck.py"]
        assert subprocess.run([str(part) for part in health], check=False, timeout=30).returncode == 0
