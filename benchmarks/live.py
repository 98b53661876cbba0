"""The real service and a real Prometheus as child processes on free ports of this machine: for incidents, footprints and tests.

Prometheus runs with this project's own configuration and rules; only where it finds the service, and how often it looks, is replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import httpx
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "deploy" / "prometheus" / "prometheus.yml"
START_S = 120.0
STOP_S = 30.0


class Child:
    """A process of ours whose output goes to a file, and which ends with the `with` block."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self._output: IO[bytes] = log.open("ab")
        self.process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=self._output, stderr=subprocess.STDOUT
        )

    def until(self, condition: Callable[[], bool], what: str, seconds: float = START_S) -> None:
        """Wait for a condition.

        Raises:
            RuntimeError: the process ended or the time passed; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                how = f"ended with {ended}" if ended is not None else f"took over {seconds:g} s"
                raise RuntimeError(f"{what}: the process {how}\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, *, seconds: float = STOP_S) -> int:
        """SIGTERM, and SIGKILL if that is not enough. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._output.close()
        return self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Service(Child):
    """`python -m service`; settings by their names without the prefix. Ready only after `until_ready`."""

    def __init__(self, log: Path, *, port: int | None = None, command: Sequence[str | Path] | None = None, **settings: object) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        chosen = {"host": "127.0.0.1", "port": self.port, **settings}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DETECTOR_")}
        environment |= {f"DETECTOR_{name.upper()}": str(value) for name, value in chosen.items()}
        super().__init__(command or [sys.executable, "-m", "service"], log, environment)

    def until_ready(self) -> Self:
        """Wait for /readyz."""
        self.until(lambda: _answers(f"{self.url}/readyz"), "the service is not ready")
        return self


class Prometheus(Child):
    """Prometheus with the rules of deploy/prometheus, scraping one service.

    Args:
        folder: for its configuration, storage and log.
        target_port: of the service.
        interval_s: between scrapes, and between evaluations.
        exporter_port: of what stands for the exporters of a GPU machine, if anything does.
        hold: factor on how long the alerts want a fault to last.
    """

    def __init__(
        self, folder: Path, target_port: int, *, interval_s: float = 1.0, exporter_port: int | None = None, hold: float = 1.0
    ) -> None:
        binary = shutil.which("prometheus")
        if binary is None:
            raise FileNotFoundError("no prometheus here; install the Debian package `prometheus`")
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{free_port()}"
        configuration = folder / "prometheus.yml"
        pointed = pointed_at(target_port, interval_s, exporter_port)
        if hold != 1.0:
            pointed["rule_files"] = [str(path) for path in impatient_rules(folder / "rules", hold)]
        configuration.write_text(yaml.safe_dump(pointed))
        listen = f"--web.listen-address={self.url.removeprefix('http://')}"
        command = [binary, f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'data'}", listen, "--log.level=warn"]
        super().__init__(command, folder / "prometheus.log")
        self.until(lambda: _answers(f"{self.url}/-/ready"), "Prometheus is not ready")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series with their latest value.

        Raises:
            ValueError: the expression does not parse or cannot be evaluated.
        """
        return self._get("query", query=expression)["result"]

    def query_range(self, expression: str, start: float, end: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """Series with their values between two times, in seconds since 1970."""
        return self._get("query_range", query=expression, start=start, end=end, step=step_s)["result"]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {alert["labels"]["alertname"] for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"}

    def _get(self, what: str, **parameters: str | float) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=10).json()
        if answer["status"] != "success":
            raise ValueError(f"{parameters.get('query', what)}: {answer['error']}")
        return answer["data"]


def pointed_at(target_port: int, interval_s: float, exporter_port: int | None = None) -> dict[str, Any]:
    """The project's configuration with the service at a port of this machine; exporters that are not here are left out."""
    configuration: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
    every = f"{int(interval_s * 1000)}ms"
    configuration["global"] |= {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    configuration["rule_files"] = [str(CONFIGURATION.parent / pattern) for pattern in configuration["rule_files"]]
    ports = {"detector": target_port, "dcgm": exporter_port}
    jobs = [job for job in configuration["scrape_configs"] if ports.get(job["job_name"]) is not None]
    for job in jobs:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    configuration["scrape_configs"] = jobs
    return configuration


def impatient_rules(folder: Path, hold: float) -> list[Path]:
    """Copies of the rules whose alerts wait only this share of their `for:`; expressions and windows are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for path in sorted((CONFIGURATION.parent / "rules").glob("*.yml")):
        copies.append(folder / path.name)
        copies[-1].write_text(
            re.sub(r"(?m)^(\s*for: )(\d+)m$", lambda found: f"{found[1]}{round(int(found[2]) * 60 * hold)}s", path.read_text())
        )
    return copies


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread while inside; it returns soon after the event that it is given is set."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
