from __future__ import annotations

import os

import pytest

from service.quota import cpu_quota

ALLOWED = 8


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(ALLOWED)))


@pytest.fixture
def quota(tmp_path):
    """`quota(own, {group: cpu.max})`: CPUs of a process whose /proc/self/cgroup holds `own`."""

    def read(own: str, groups: dict[str, str], name: str = "cpu.max") -> int:
        for group, text in groups.items():
            folder = tmp_path / "cgroup" / group
            folder.mkdir(parents=True, exist_ok=True)
            for number, part in enumerate([text] if name == "cpu.max" else text.split()):
                (folder / (name if name == "cpu.max" else ("cpu.cfs_quota_us", "cpu.cfs_period_us")[number])).write_text(part + "\n")
        (tmp_path / "self").write_text(own)
        return cpu_quota(tmp_path / "cgroup", tmp_path / "self")

    return read


@pytest.mark.parametrize(
    ("text", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", ALLOWED), ("garbage", ALLOWED), ("5 0", ALLOWED)]
)
def test_a_containers_quota_is_rounded_up(quota, text, expected):
    assert quota("0::/\n", {"": text}) == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("0::/system.slice/detector.service\n", 3),
        ("0::/system.slice/other.service\n", 6),
        ("0::/system.slice/detector.service/worker\n", 2),
        ("0::/kubepods/pod1/unknown\n", ALLOWED),
        ("0::/../../elsewhere\n", ALLOWED),
    ],
)
def test_the_least_quota_from_the_own_group_to_the_root_counts(quota, own, expected):
    groups = {
        "system.slice": "600000 100000",
        "system.slice/detector.service": "300000 100000",
        "system.slice/detector.service/worker": "200000 100000",
        "elsewhere": "100000 100000",
    }
    assert quota(own, groups) == expected


def test_a_path_of_the_host_that_is_not_mounted_leaves_the_containers_own_group(quota):
    assert quota("0::/system.slice/docker-1234.scope\n", {"": "200000 100000"}) == 2


@pytest.mark.parametrize(("text", "expected"), [("250000 100000", 3), ("-1 100000", ALLOWED)])
def test_version_1_has_a_hierarchy_of_its_own_for_the_cpu(quota, text, expected):
    own = "5:memory:/elsewhere\n4:cpu,cpuacct:/docker/1234\n0::/\n"
    assert quota(own, {"cpu/docker/1234": text, "cpu/elsewhere": "100000 100000"}, "cpu.cfs") == expected


def test_version_1_in_a_container_is_mounted_at_the_root(quota):
    assert quota("4:cpu,cpuacct:/docker/1234\n", {"cpu": "200000 100000"}, "cpu.cfs") == 2


def test_without_a_control_group_the_affinity_counts(tmp_path):
    assert cpu_quota(tmp_path / "none", tmp_path / "nothing") == ALLOWED


def test_a_line_that_is_none_is_passed_over(quota):
    assert quota("nonsense\n0::/a\n", {"a": "100000 100000"}) == 1
