"""The entry point of the images under their restrictions, without a container: other user, no capability, read-only root, little memory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from service_onnx import write_model

from benchmarks.live import ROOT, Service

USER = 10001
MEMORY_BYTES = 1 << 30
"""Half of what docker-compose.yml allows."""
HEALTHCHECK = [sys.executable, str(ROOT / "deploy" / "healthcheck.py")]


@dataclass
class Restricted:
    """A running service, and what it takes to start another process beside it."""

    service: Service
    sandbox: list[str | Path]

    @property
    def pid(self) -> int:
        """The service itself: the last of the chain sandbox -> its init -> service."""
        pid = self.service.process.pid
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = int(children[0])
        return pid

    def status(self, name: str) -> str:
        """One line of /proc/PID/status."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))


def _sandbox(repository: Path) -> list[str | Path]:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        pytest.skip("no bwrap here; install the Debian package `bubblewrap`")
    user = ["--unshare-user", "--uid", str(USER), "--gid", str(USER), "--cap-drop", "ALL"]
    system = ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp"]
    # the checkout and this Python stay visible where they lie under /tmp themselves
    own = [argument for place in (ROOT, sys.prefix, sys.base_prefix) for argument in ("--ro-bind", place, place)]
    command = [bwrap, "--unshare-pid", "--die-with-parent", *user, *system, *own, "--ro-bind", repository, "/tmp/models"]
    probe = subprocess.run([*command, "true"], capture_output=True, text=True, check=False, timeout=30)
    if probe.returncode:
        pytest.skip(f"this machine lets nobody make namespaces: {probe.stderr.strip()}")
    return command


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Restricted]:
    folder = tmp_path_factory.mktemp("restricted")
    write_model(folder / "models")
    sandbox = _sandbox(folder / "models")
    command = [*sandbox, "prlimit", f"--data={MEMORY_BYTES}", sys.executable, "-m", "service"]
    settings = {"model_repository": "/tmp/models", "provider": "cpu", "intra_op_threads": 1, "decode_threads": 1, "drain_seconds": 0}
    with Service(folder / "log", command=command, **settings) as service:
        yield Restricted(service.until_ready(), sandbox)


def test_it_has_neither_rights_nor_room(restricted: Restricted) -> None:
    assert int(restricted.status("CapEff"), 16) == 0
    assert restricted.status("NoNewPrivs") == "1"
    assert int(Path(f"/proc/{restricted.pid}/limits").read_text().split("Max data size")[1].split()[0]) == MEMORY_BYTES
    inside = subprocess.run([*restricted.sandbox, "id", "-u"], capture_output=True, text=True, check=True, timeout=30)
    assert inside.stdout.strip() == str(USER)
    for place in (ROOT, Path("/etc"), Path("/tmp/models")):
        touched = subprocess.run([*restricted.sandbox, "touch", place / "x"], capture_output=True, text=True, check=False, timeout=30)
        assert "Read-only file system" in touched.stderr


def test_it_answers_and_spools_large_uploads(restricted: Restricted, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    data = (tmp_path / "large.png").read_bytes()
    assert len(data) > 1 << 20  # above what multipart parsers keep in memory
    answer = httpx.post(f"{restricted.service.url}/v1/detect", files={"image": ("large.png", data, "image/png")}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["image"] == {"width": 900, "height": 700}


def test_the_healthcheck_and_a_stop_tell_the_truth(restricted: Restricted) -> None:
    """The last test of the module: it ends the service."""
    environment = {**os.environ, "DETECTOR_PORT": str(restricted.service.port)}
    assert subprocess.run(HEALTHCHECK, env=environment, check=False, timeout=30).returncode == 0
    os.kill(restricted.pid, signal.SIGTERM)
    assert restricted.service.process.wait(30) == 0
    gone = subprocess.run(HEALTHCHECK, env=environment, check=False, timeout=30, capture_output=True, text=True)
    assert gone.returncode == 1
    assert gone.stdout.startswith("no answer")


def test_the_runtime_keeps_no_usage_events_to_send(tmp_path: Path) -> None:
    """ONNX Runtime's wheels store them under the home folder as soon as they are imported, and send them to their makers."""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", "import service.runtime, onnxruntime; print(onnxruntime.get_available_providers())"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "CPUExecutionProvider" in done.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
