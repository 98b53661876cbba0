"""Start a server of the comparison in a process group of its own, wait until it answers, count its CPU, and end the whole group."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load_pictures import Picture
from benchmarks.peers.simulated import LOCK_VARIABLE

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
QUIET = {  # nothing of this may leave the machine
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "LITSERVE_TRACKING": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


class ServerMissing(RuntimeError):
    """A server that did not come up, as a sentence: its package is not installed, or what it last wrote."""


@dataclass(frozen=True)
class Serving:
    """A running server."""

    url: str
    group: int

    def cpu_seconds(self) -> float:
        """CPU that the living processes of its group used so far."""
        return sum(_cpu_seconds(pid) for pid in _group_members(self.group))


def serving(name: str, probe: Picture) -> contextlib.AbstractContextManager[Serving]:
    """Run `python -m benchmarks.peers.<name>`; see running."""
    return running(["-m", f"benchmarks.peers.{name}"], probe)


@contextlib.contextmanager
def running(arguments: Sequence[str], probe: Picture) -> Iterator[Serving]:
    """Run a server with this Python and `--port` of a free port, until the end of the block.

    Args:
        arguments: of the interpreter; the port is added.
        probe: posted until it is answered with 200.

    Raises:
        ServerMissing: it ended, or did not answer in time.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        output = Path(folder, "output")
        environment = os.environ | QUIET | {LOCK_VARIABLE: str(Path(folder, "device")), "OMP_NUM_THREADS": "1"}
        with output.open("w") as stream:
            command = [sys.executable, *arguments, "--port", str(port)]
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        try:
            server = Serving(f"http://127.0.0.1:{port}/v1/detect", process.pid)
            _wait_until_answered(server.url, probe, process, output)
            yield server
        finally:
            _end_group(process)


def busy_cpu_seconds() -> float:
    """CPU that everything on this machine used since it started, waiting for a hypervisor included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / TICKS_A_SECOND


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_answered(url: str, probe: Picture, process: subprocess.Popen[bytes], output: Path) -> None:
    patience = time.monotonic() + START_TIMEOUT_S
    refusal = "no connection"
    while time.monotonic() < patience:
        if process.poll() is not None:
            raise ServerMissing(_last_words(output) or f"ended with status {process.returncode}")
        request = urllib.request.Request(url, data=probe.body, headers={"Content-Type": probe.content_type})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=5):  # noqa: S310  # our own loopback URL
                return
        except urllib.error.HTTPError as error:
            refusal = f"status {error.code}: {error.read(200)!r}"
        except OSError:
            pass
        time.sleep(0.1)
    raise ServerMissing(f"did not answer within {START_TIMEOUT_S:g} s ({refusal}); {_last_words(output)}")


def _last_words(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask, wait, insist: also for children that left the parent."""
    children = _descendants(process.pid)
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            break
    for pid in [*_group_members(process.pid), *(child for child in children if _alive(child))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _group_members(group: int) -> list[int]:
    """Processes of the session that the server leads, and their descendants in sessions of their own (Ray's)."""
    session = [pid for pid in _pids() if _stat(pid)[3:4] == [str(group)]]
    return sorted({*session, *_descendants(group)})


def _descendants(ancestor: int) -> list[int]:
    parents = {pid: int(stat[1]) for pid in _pids() if len(stat := _stat(pid)) > 1}
    found, frontier = [], [ancestor]
    while frontier:
        frontier = [pid for pid, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208  # a Path an entry would cost more than the rest


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, group, session, ... Empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _alive(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"])


def _cpu_seconds(pid: int) -> float:
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / TICKS_A_SECOND if len(stat) > 12 else 0.0
