"""The images, built for real without a Docker daemon and without an image registry: `make test-image`.

buildah runs the Dockerfile on a base that debootstrap makes, in a chroot, one target after the other. What it gives is inspected, and then
started in a sandbox: another user, no capability, a read-only root. Needs 30 GB of disk for a while, since torch brings CUDA.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from service_fakes import picture
from service_onnx import write_model
from test_deploy_restricted import USER
from test_model_train import arguments

from benchmarks.live import ROOT, Service, free_port
from model.data.synthetic import write_voc
from service.health import EXIT_NO_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TOOLS = {"debootstrap": "debootstrap", "buildah": "buildah", "bwrap": "bubblewrap"}
BASE = "localhost/python-base"
BASE_PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_S = 3000


@dataclass(frozen=True)
class Target:
    """What one target of the Dockerfile promises."""

    most_bytes: int
    app: frozenset[str]
    """What lies in /app."""
    holds: frozenset[str]
    holds_not: frozenset[str]
    entrypoint: tuple[str, ...]


SERVICE = frozenset({"healthcheck.py", "service"})
BUILDERS = frozenset({"pip", "pytest", "cyclonedx_bom", "ruff"})
SERVE = ("python", "-m", "service")
TARGETS = {
    "cpu": Target(700_000_000, SERVICE, frozenset({"fastapi", "onnxruntime"}), BUILDERS | {"torch", "onnxruntime_gpu"}, SERVE),
    "gpu": Target(
        3_500_000_000,
        SERVICE,
        frozenset({"fastapi", "onnxruntime_gpu", "nvidia_cudnn_cu13", "nvidia_cublas"}),
        BUILDERS | {"torch", "onnxruntime"},
        SERVE,
    ),
    "train": Target(
        10_000_000_000,
        frozenset({"service", "model", "export"}),
        frozenset({"torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "pycocotools"}),
        BUILDERS | {"onnxruntime_gpu"},
        ("python", "-m"),
    ),
    "load": Target(
        700_000_000,
        frozenset({"benchmarks"}),
        frozenset({"httptools", "matplotlib"}),
        BUILDERS | {"torch", "onnxruntime", "fastapi"},
        ("python", "-m", "benchmarks.load"),
    ),
}


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own."""

    folder: Path
    driver: str

    def __call__(self, *arguments: str | Path) -> str:
        storage = ["--root", self.folder / "storage", "--runroot", self.folder / "run", "--storage-driver", self.driver]
        done = subprocess.run(["buildah", *storage, *arguments], capture_output=True, text=True, check=False, timeout=BUILD_S)
        assert done.returncode == 0, f"buildah {arguments[0]}: {done.stderr[-3000:]}"
        return done.stdout.strip()


@dataclass(frozen=True)
class Image:
    """A built image: its configuration, and where its files lie."""

    name: str
    config: dict[str, Any]
    root: Path

    @property
    def target(self) -> Target:
        """What it promises."""
        return TARGETS[self.name]

    @property
    def bytes(self) -> int:
        """Of all files; a file with several names counts once."""
        found = (path.lstat() for path in self.root.rglob("*") if not path.is_symlink())
        return sum({status.st_ino: status.st_size for status in found}.values())

    @property
    def packages(self) -> set[tuple[str, str]]:
        """Names and versions of the Python packages; not those that a package carries inside itself, as setuptools does."""
        names = (path.name.removesuffix(".dist-info") for path in self.root.glob("opt/venv/lib/python*/site-packages/*.dist-info"))
        return {(name.rsplit("-", 1)[0].lower(), name.rsplit("-", 1)[1]) for name in names}

    def sandbox(self, *options: str | Path) -> list[str]:
        """The beginning of a command that runs inside, as Docker would with --read-only, --cap-drop ALL and a tmpfs at /tmp."""
        user = ["--unshare-user", "--uid", str(USER), "--gid", str(USER), "--cap-drop", "ALL", "--unshare-pid", "--die-with-parent"]
        files = ["--ro-bind", self.root, "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
        environment = [part for entry in self.config["Env"] for part in ("--setenv", *entry.split("=", 1))]
        return [str(part) for part in ["bwrap", *user, *files, *environment, "--chdir", "/app", *options]]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """buildah, and in its storage the base of all targets."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"cannot build an image here; install the Debian packages {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("debootstrap makes a base image only for root")
    folder = tmp_path_factory.mktemp("image")
    buildah = Buildah(folder, _storage_driver(folder))
    _make_base(buildah)
    yield buildah
    if (storage := folder / "storage" / "overlay").is_mount():  # the overlay driver leaves it mounted on itself
        subprocess.run(["umount", storage], check=True)
    shutil.rmtree(folder)


def _storage_driver(folder: Path) -> str:
    """overlay where this file system bears one, for it copies nothing; else vfs, which copies everything at every stage."""
    places = {name: folder / "probe" / name for name in ("lower", "upper", "work", "merged")}
    for place in places.values():
        place.mkdir(parents=True)
    options = f"lowerdir={places['lower']},upperdir={places['upper']},workdir={places['work']}"
    probe = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, places["merged"]], check=False, capture_output=True)
    if probe.returncode:
        return "vfs"
    subprocess.run(["umount", places["merged"]], check=True)
    return "overlay"


def _make_base(buildah: Buildah) -> None:
    files = buildah.folder / "base"
    command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", files]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    for path in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(files / path)
    # as every container runtime writes it: torchrun looks up localhost, gloo the machine's own name
    (files / "etc" / "hosts").write_text(f"127.0.0.1 localhost {platform.node()}\n")
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, files, "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    shutil.rmtree(files)


@pytest.fixture(scope="module", params=TARGETS)
def image(request: pytest.FixtureRequest, buildah: Buildah) -> Iterator[Image]:
    """Each target in turn; pytest runs all tests of one before it builds the next, and the one before is gone by then."""
    name: str = request.param
    options = ["--isolation", "chroot", "--build-arg", f"PYTHON_IMAGE={BASE}", "--build-arg", "REVISION=abc123"]
    buildah("bud", *options, *_registry(buildah.folder), "--target", name, "-t", name, ROOT)
    container = buildah("from", name)
    config = json.loads(buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
    yield Image(name, config, Path(buildah("mount", container)))
    buildah("rm", container)
    buildah("rmi", name)


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


def run(command: list[str], *, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)


def test_it_is_as_small_as_promised_and_says_what_it_is(image: Image, record_property: pytest.RecordProperty) -> None:
    record_property("bytes", image.bytes)
    print(f"{image.name}: {image.bytes / 1e6:.0f} MB")
    assert image.bytes < image.target.most_bytes
    assert image.config["User"] == f"{USER}:{USER}"
    assert image.config["Entrypoint"] == list(image.target.entrypoint)
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in image.config["Labels"].items()}
    assert labels["title"] == f"faster-rcnn-service {image.name}"
    assert labels["revision"] == "abc123"
    assert labels["licenses"] == "Apache-2.0"


def test_it_holds_what_its_job_needs_alone(image: Image) -> None:
    assert {path.name for path in (image.root / "app").iterdir() if path.name != "__pycache__"} == image.target.app
    names = {name for name, _ in image.packages}
    assert image.target.holds - names == set()
    assert image.target.holds_not & names == set()
    assert not (image.root / "etc/pip.conf").exists() or (image.root / "etc/pip.conf").stat().st_size == 0


def test_its_bill_of_materials_lists_what_is_installed(image: Image) -> None:
    bill = json.loads((image.root / "usr/share/sbom/python.cdx.json").read_text())
    listed = {(_normal(component["name"]), component["version"]) for component in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    assert {(_normal(name), version) for name, version in image.packages} - listed == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_it_does_its_job_on_a_read_only_root_as_nobody_in_particular(image: Image, tmp_path: Path) -> None:
    JOBS[image.name](image, tmp_path)


def cpu_serves(image: Image, folder: Path) -> None:
    write_model(folder / "models")
    command = image.sandbox("--ro-bind", folder / "models", "/models")
    with _started(image, command, folder / "log") as service:
        health = [*command, "--setenv", "DETECTOR_PORT", str(service.port), "python", "healthcheck.py"]
        assert run(health, seconds=30).returncode == 0


def gpu_refuses_to_start_without_one(image: Image, folder: Path) -> None:
    """And on the CPU, where that is asked for, it serves: every library of it loads, only the device is missing."""
    if not Path("/dev/nvidia0").exists():
        done = run([*image.sandbox("--setenv", "DETECTOR_PORT", str(free_port())), *image.config["Entrypoint"]], seconds=120)
        assert done.returncode == EXIT_NO_MODEL, done.stdout + done.stderr
        last = json.loads((done.stdout + done.stderr).strip().splitlines()[-1])
        assert "provider 'cuda' was asked for" in last["message"]
        assert "--gpus all" in last["message"]
    with _started(image, image.sandbox("--setenv", "DETECTOR_PROVIDER", "cpu"), folder / "log"):
        pass


@contextmanager
def _started(image: Image, command: list[str], log: Path) -> Iterator[Service]:
    """The service of the image, with its bundled models or those mounted over them, after its first answer."""
    port = free_port()
    with Service(log, port=port, command=[*command, "--setenv", "DETECTOR_PORT", str(port), *image.config["Entrypoint"]]) as service:
        service.until_ready()
        assert httpx.post(f"{service.url}/v1/detect", content=picture(), timeout=20).status_code == 200
        yield service


def train_trains_and_exports(image: Image, folder: Path) -> None:
    """Under torchrun, as the Kubernetes Job starts it: two processes here."""
    write_voc(folder / "data", {"train": 4, "val": 2})
    (folder / "runs").mkdir()
    mounts = ["--ro-bind", folder / "data", "/tmp/data", "--bind", folder / "runs", "/tmp/runs"]
    inside = image.sandbox(*mounts, "--setenv", "OMP_NUM_THREADS", "1")
    settings = ("training.batch_size=2", "training.workers=0", "training.epochs=1")
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "model.train"]
    trained = run([*inside, *torchrun, *arguments(Path("/tmp/data"), Path("/tmp/runs/one"), *settings, options=("--resume-if-present",))])
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert json.loads((folder / "runs" / "one" / "environment.json").read_text())["commit"] == "abc123"
    for module in ("model.train", "export"):
        assert "usage:" in run([*inside, *image.config["Entrypoint"], module, "--help"]).stdout
    export = [*image.config["Entrypoint"], "export", "/tmp/runs/one/last.pt", "--name", "scenes", "--repository", "/tmp/runs/models"]
    exported = run([*inside, *export], seconds=900)
    assert exported.returncode == 0, exported.stdout[-1500:] + exported.stderr[-1500:]
    assert (folder / "runs" / "models" / "scenes" / "1" / "model.onnx").is_file()


def load_measures(image: Image, folder: Path) -> None:
    write_model(folder / "models")
    settings = {"model_repository": folder / "models", "provider": "cpu", "intra_op_threads": 1, "decode_threads": 1}
    with Service(folder / "log", **settings) as service:
        service.until_ready()
        options = ["--rate", "5", "--seconds", "4", "--warm-up", "1", "--html", "/tmp/report.html"]
        done = run([*image.sandbox(), *image.config["Entrypoint"], f"{service.url}/v1/detect", *options], seconds=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "p99" in done.stdout


JOBS = {"cpu": cpu_serves, "gpu": gpu_refuses_to_start_without_one, "train": train_trains_and_exports, "load": load_measures}
