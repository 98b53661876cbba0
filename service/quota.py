"""How many CPUs this process may use: the container's quota, not the machine's count."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def cpu_quota(cgroup_root: Path = CGROUP_ROOT, own_cgroup: Path = OWN_CGROUP) -> int:
    """CPUs granted by affinity and by the control groups (version 2 and 1), rounded up, at least 1.

    A quota holds for a group and all below it, so the least one counts on the way from the process's own group to the root: systemd sets
    it on the service's group, Kubernetes on the container's and on the pod's. In a container the path may be one of the host's, of which
    nothing is mounted; then the container's own group is the root.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    for root, path, read in _hierarchies(cgroup_root, own_cgroup):
        quotas += [quota for folder in _up_to(root, path) if (quota := read(folder)) is not None]
    return max(1, min([allowed, *(math.ceil(quota) for quota in quotas)]))


def _hierarchies(cgroup_root: Path, own_cgroup: Path) -> list[tuple[Path, PurePosixPath, Callable[[Path], float | None]]]:
    """(mount point, the process's path in it, how a group's quota is read). Lines are `<number>:<controllers>:<path>`."""
    unified, cpu = PurePosixPath(), PurePosixPath()
    try:
        lines = [line.split(":", 2) for line in own_cgroup.read_text().splitlines()]
    except OSError:
        lines = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            unified = PurePosixPath(path.lstrip("/"))
        elif "cpu" in controllers.split(","):
            cpu = PurePosixPath(path.lstrip("/"))
    return [(cgroup_root, unified, _quota_v2), (cgroup_root / "cpu", cpu, _quota_v1)]


def _up_to(root: Path, path: PurePosixPath) -> list[Path]:
    """The group's folder and those above it, the root last. A path that leads out of the root names none of them."""
    inside = PurePosixPath() if ".." in path.parts else path
    return [root / inside, *(root / parent for parent in inside.parents)]


def _quota_v2(group: Path) -> float | None:
    """`cpu.max` holds `<quota> <period>` in microseconds, or `max <period>`."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 and period > 0 else None
    except (OSError, ValueError):
        return None
