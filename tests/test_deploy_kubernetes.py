"""The manifests against the Kubernetes schemas, and against the service's settings, ports, routes and metrics."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics
from service.server import FINISH_GRACE_S
from service.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
OLDEST, NEWEST = "1.30", "1.37"
"""Schemas to check against: the oldest release that has the sleep action, and a current one."""
THEIR_OWN_SCHEMA = {"PodMonitor", "PrometheusRule", "InferenceService", "Kustomization"}
"""Kinds that other projects define: no schema in Kubernetes, so their fields are checked by hand below."""
FOLDERS = ("base", "gpu", "training")


def _documents(folder: str) -> list[dict[str, Any]]:
    return [document for path in sorted((KUBERNETES / folder).glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]


def _object(folder: str, kind: str) -> dict[str, Any]:
    return next(document for document in _documents(folder) if document["kind"] == kind)


def _pod(folder: str, kind: str) -> dict[str, Any]:
    return _object(folder, kind)["spec"]["template"]["spec"]


def _literals() -> dict[str, str]:
    return dict(line.split("=", 1) for line in _object("base", "Kustomization")["configMapGenerator"][0]["literals"])


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("folder", ["base", "training"])
def test_manifests_follow_the_schemas(folder: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="install the package kubernetes-validate (group `test`)")
    checked = [document for document in _documents(folder) if document["kind"] not in THEIR_OWN_SCHEMA]
    assert checked
    for document in checked:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds(folder: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="install the package kubernetes-validate (group `test`)")
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here; install it to build the kustomizations")
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    built = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    for kind in built.keys() - THEIR_OWN_SCHEMA:
        kubernetes_validate.validate(built[kind], NEWEST, strict=True)
    if folder == "gpu":
        container = built["Deployment"]["spec"]["template"]["spec"]["containers"][0]
        assert container["image"] == "faster-rcnn-service:gpu"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert container["envFrom"][0]["configMapRef"]["name"] == built["ConfigMap"]["metadata"]["name"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_kustomization_lists_every_file_beside_it(folder: str) -> None:
    kustomization = _object(folder, "Kustomization")
    named = {*kustomization.get("resources", []), *(patch["path"] for patch in kustomization.get("patches", []))} - {"../base"}
    assert named == {path.name for path in (KUBERNETES / folder).glob("*.yaml")} - {"kustomization.yaml"}


def _readme_patches() -> list[dict[str, Any]]:
    """The operations of every patch that the README shows."""
    blocks = re.findall(r"```yaml\n(.*?)```", (KUBERNETES / "README.md").read_text(), re.DOTALL)
    return [step for block in blocks for patch in yaml.safe_load(block)["patches"] for step in yaml.safe_load(patch["patch"])]


def test_the_patches_of_the_readme_give_a_valid_deployment() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="install the package kubernetes-validate (group `test`)")
    deployment, steps = _object("base", "Deployment"), _readme_patches()
    assert len(steps) >= 5
    for step in steps:
        *parents, last = step["path"].strip("/").split("/")
        place: Any = deployment
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        assert step["op"] == "add"
        if last == "-":
            place.append(step["value"])
        else:
            assert last not in place, f"{step['path']}: this patch would take away what the base has there"
            place[last] = step["value"]
    kubernetes_validate.validate(deployment, NEWEST, strict=True)
    pod = deployment["spec"]["template"]["spec"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (admin,) = pod["containers"][0]["env"]
    mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert str(Path(admin["value"]).parent) in mounted


def test_the_runbook_goes_where_the_manifests_put_the_operations() -> None:
    runbook = (ROOT / "deploy" / "RUNBOOK.md").read_text()
    port, namespace = _literals()["DETECTOR_OPERATIONS_PORT"], _object("base", "Namespace")["metadata"]["name"]
    assert f"127.0.0.1:{port}/v1/models/NAME/rollback" in runbook
    assert f"-n {namespace} port-forward pod/POD 8000 {port}" in runbook
    assert (
        "-l " + ",".join(f"{key}={value}" for key, value in _object("base", "PodMonitor")["spec"]["selector"]["matchLabels"].items())
        in runbook
    )


def test_settings_exist() -> None:
    text = "".join(path.read_text() for path in [*KUBERNETES.rglob("*.yaml"), KUBERNETES / "README.md"])
    given = set(re.findall(r"(?:^\s+- |name: )(" + ENV_PREFIX + r"[A-Z_]+)[=,]", text, re.MULTILINE))
    assert len(given) >= 5
    assert given <= {ENV_PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize(("folder", "kind"), [("base", "Deployment"), ("training", "Job")])
def test_pods_are_restricted_and_get_no_foreign_environment(folder: str, kind: str) -> None:
    _check_restricted(_pod(folder, kind))


def test_the_inference_service_is_restricted_and_speaks_v2() -> None:
    predictor = _object("kserve", "InferenceService")["spec"]["predictor"]
    _check_restricted(predictor)
    container = predictor["containers"][0]
    assert {"name": "PROTOCOL", "value": "v2"} in container["env"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"


def _check_restricted(pod: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_pod_is_given_the_time_that_its_end_takes() -> None:
    pod, literals = _pod("base", "Deployment"), _literals()
    pre_stop = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain, request = float(literals["DETECTOR_DRAIN_SECONDS"]), float(literals["DETECTOR_REQUEST_TIMEOUT_MS"]) / 1000
    assert pod["terminationGracePeriodSeconds"] > pre_stop + drain + request + FINISH_GRACE_S


def test_probes_and_ports_are_the_services_own() -> None:
    container = _pod("base", "Deployment")["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": Settings.model_fields["port"].default, "operations": int(_literals()["DETECTOR_OPERATIONS_PORT"])}
    assert [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")] == [
        "/readyz",
        "/readyz",
        "/healthz",
    ]
    assert _object("base", "PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] == "operations"
    open_to = {rule["ports"][0]["port"]: rule["from"] for rule in _object("base", "NetworkPolicy")["spec"]["ingress"]}
    assert open_to.keys() == set(ports)
    assert open_to["operations"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]


def test_selectors_name_the_pods() -> None:
    labels = _object("base", "Deployment")["spec"]["template"]["metadata"]["labels"]
    for kind, path in {
        "Deployment": ("selector", "matchLabels"),
        "Service": ("selector",),
        "PodDisruptionBudget": ("selector", "matchLabels"),
        "NetworkPolicy": ("podSelector", "matchLabels"),
        "PodMonitor": ("selector", "matchLabels"),
    }.items():
        selector = _object("base", kind)["spec"]
        for step in path:
            selector = selector[step]
        assert selector == labels, kind


def test_the_autoscaler_reads_what_the_adapter_gives_and_the_service_exports() -> None:
    asked = {metric["pods"]["metric"]["name"] for metric in _object("base", "HorizontalPodAutoscaler")["spec"]["metrics"]}
    rules = yaml.safe_load((KUBERNETES / "prometheus-adapter" / "values.yaml").read_text())["rules"]["custom"]
    assert asked == {rule["name"]["as"] for rule in rules}
    exported = Metrics().render().decode()
    for rule in rules:
        assert f"\n{rule['seriesQuery'].split('{')[0].removesuffix('_bucket')}" in exported


def test_prometheus_rules_are_those_of_the_folder_prometheus() -> None:
    made = runpy.run_path(str(KUBERNETES / "rules.py"))["prometheus_rule"]()
    assert made == _object("base", "PrometheusRule"), "run `python deploy/kubernetes/rules.py` and commit what it writes"


def test_training_starts_and_resumes_with_one_command_that_exists() -> None:
    from model.train import build_parser

    job = _object("training", "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    launcher, trainer = (container["args"][: (split := container["args"].index("-m"))], container["args"][split + 2 :])
    assert container["args"][split + 1] == "model.train"
    options = build_parser().parse_args(trainer)
    assert options.resume_if_present
    assert options.preset
    assert f"--nnodes={job['spec']['parallelism']}" in launcher
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    service = _object("training", "Service")
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{name}:{port}" in launcher
