from __future__ import annotations

import os

import pytest

from service.quota import cpu_quota

ALLOWED = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "expected"), [("150000 100000", min(2, ALLOWED)), ("50000 100000", 1), ("max 100000", ALLOWED)])
def test_cgroup_v2_quota_is_rounded_up(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("50000", 1), ("-1", ALLOWED)])
def test_cgroup_v1_quota(tmp_path, quota, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path) == expected


def test_without_a_control_group_the_affinity_counts(tmp_path):
    assert cpu_quota(tmp_path) == ALLOWED


def test_nonsense_is_not_believed(tmp_path):
    (tmp_path / "cpu.max").write_text("garbage")
    assert cpu_quota(tmp_path) == ALLOWED
