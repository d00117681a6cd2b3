"""What docker/ ships is valid, asks for a token, publishes nothing beyond loopback and shows every metric."""

import copy
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import REPOSITORY
from workers.cluster.metrics import COUNTERS, GAUGES, SECONDS, TAGS
from workers.cluster.settings import WorkerSettings

DOCKER = REPOSITORY / "docker"
SCHEMA = json.loads((Path(__file__).parent / "kuberay-v1.schema.json").read_text())
POD_MONITOR = json.loads((Path(__file__).parent / "podmonitor-v1.schema.json").read_text())
MANIFESTS = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}
COMPOSE = [["docker-compose"], ["docker", "compose"]]


def call(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)


def compose_file(**variables: str) -> dict[str, Any]:
    """compose.yaml, its ${NAME:-default} replaced by ``variables`` or the defaults."""
    text = (DOCKER / "compose.yaml").read_text()
    text = re.sub(r"\$\{(\w+):-(.*?)\}", lambda found: variables.get(found[1], found[2]), text)
    services: dict[str, Any] = yaml.safe_load(text)
    return services


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert found
    return found[1]


def check_manifest(manifest: dict[str, Any]) -> None:
    kind = {"RayCluster": "rayCluster", "RayJob": "rayJob"}[manifest["kind"]]
    jsonschema.validate(manifest, {**SCHEMA, "$ref": f"#/$defs/{kind}"})


def manifest(kind: str, uncommented: str = "#") -> dict[str, Any]:
    text = (DOCKER / "kuberay" / MANIFESTS[kind]).read_text().replace(f"# {uncommented}", uncommented)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def cluster_spec(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = manifest(kind)["spec"]
    return spec if kind == "RayCluster" else spec["rayClusterSpec"]


def pod_specs(kind: str) -> list[dict[str, Any]]:
    spec = cluster_spec(kind)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("command", COMPOSE, ids=" ".join)
@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]], ids=["cpu", "gpu"])
def test_compose_accepts_its_file(command: list[str], files: list[str]) -> None:
    if not shutil.which(command[0]) or call(*command, "version").returncode:
        pytest.skip(f"no {' '.join(command)} here")
    named = [argument for file in files for argument in ("--file", str(DOCKER / file))]
    done = call(*command, *named, "config", "--quiet")
    assert done.returncode == 0, done.stderr


def test_compose_publishes_to_loopback_alone_and_every_node_asks_for_the_token() -> None:
    services = compose_file()["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    for node in ("head", "worker"):
        assert services[node]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[node]["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray-token"
        assert services[node]["secrets"] == ["ray-token"]
    assert all(service["read_only"] and service["healthcheck"] for service in services.values())


@pytest.mark.parametrize("size", [None, "3"])
def test_the_object_store_fits_into_the_shared_memory_of_each_node(size: str | None) -> None:
    services = compose_file(**({"OBJECT_STORE_GB": size} if size else {}))["services"]
    for node in ("head", "worker"):
        (store,) = [word for word in services[node]["entrypoint"] if word.startswith("--object-store-memory=")]
        assert services[node]["shm_size"] == f"{size or 1}g"  # of 2^30 bytes
        assert int(store.partition("=")[2]) == int(size or 1) * 10**9 < int(size or 1) * 2**30


def test_credentials_of_an_object_store_are_passed_on_only_where_they_are_set() -> None:
    services = compose_file()["services"]
    for node in ("head", "worker"):
        passed = {name: value for name, value in services[node]["environment"].items() if name.startswith("AWS_")}
        assert {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"} <= set(passed)
        assert set(passed.values()) == {None}  # an empty string would be a region to botocore


def test_the_token_and_the_variables_of_the_compose_file_cannot_be_committed() -> None:
    for file in (DOCKER / compose_file()["secrets"]["ray-token"]["file"], DOCKER / ".env"):
        assert call("git", "check-ignore", "--quiet", str(file)).returncode == 0, file


def test_the_image_is_pinned_and_runs_as_an_ordinary_user() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER ${UID}"]
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("--constraint constraints.txt" in line or "'^torch=='" in line for line in installs)
    assert installs[-1].endswith("'.[s3]'") and pinned("s3fs")
    copied = {line.split()[1] for line in lines if line.startswith("COPY ") and len(line.split()) == 3}
    assert {"search", "evaluators", "workers", "quantizers", "exporters", "bitgenome", "models", "configs"} <= copied
    sent = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied | {"pyproject.toml", "README.md", "LICENSE"} == sent


@pytest.mark.skipif(not shutil.which("dash"), reason="the image's sh is dash")
def test_the_image_refuses_root_in_words() -> None:
    check = (DOCKER / "Dockerfile").read_text().partition("RUN ")[2].partition("\\\n")[0]
    refused = call("dash", "-c", check, UID="0")
    assert refused.returncode == 1 and "expected the number of an ordinary user as UID, found 0" in refused.stderr
    assert call("dash", "-c", check, UID="1000").returncode == 0


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_have_the_published_fields_and_no_others(kind: str) -> None:
    found = manifest(kind)
    check_manifest(found)
    for path, wrong in ((("spec",), "shutdownAfterFinish"), (("metadata",), "lables")):
        broken = copy.deepcopy(found)
        broken[path[0]][wrong] = True
        with pytest.raises(jsonschema.ValidationError):
            check_manifest(broken)


@pytest.mark.parametrize("kind", MANIFESTS)
def test_clusters_ask_for_a_token_scale_by_themselves_and_run_without_privileges(kind: str) -> None:
    spec = cluster_spec(kind)
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"] is True
    assert spec["rayVersion"] == pinned("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert all(group["minReplicas"] < group["maxReplicas"] for group in spec["workerGroupSpecs"])
    for pod in pod_specs(kind):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert all(c["securityContext"]["capabilities"] == {"drop": ["ALL"]} for c in pod["containers"])


@pytest.mark.parametrize("kind", MANIFESTS)
def test_credentials_of_an_object_store_come_from_one_secret_once_a_comment_is_gone(kind: str) -> None:
    text = (DOCKER / "kuberay" / MANIFESTS[kind]).read_text()
    assert text.count("# envFrom:") == len(pod_specs(kind))
    found = manifest(kind, uncommented="envFrom:")
    check_manifest(found)
    assert json.dumps(found).count('"envFrom": [{"secretRef": {"name": "bitgenome-s3"}}]') == len(pod_specs(kind))


def test_a_job_asks_for_as_many_workers_as_its_cluster_may_grow_to() -> None:
    (group,) = cluster_spec("RayJob")["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    room = group["maxReplicas"] * cpus // WorkerSettings().cpus_per_worker
    assert f" --set workers.max={room} " in manifest("RayJob")["spec"]["entrypoint"]
    assert f"--set workers.max={room} " in (DOCKER / "README.md").read_text()


def test_a_job_that_fails_is_tried_again_on_the_same_volume_and_leaves_no_cluster() -> None:
    spec = manifest("RayJob")["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    shared = {"name": "runs", "persistentVolumeClaim": {"claimName": "bitgenome-runs"}}
    mount = {"name": "runs", "mountPath": "/home/bitgenome/app/runs"}
    for pod in pod_specs("RayJob"):
        assert shared in pod["volumes"] and mount in pod["containers"][0]["volumeMounts"]
    assert spec["entrypoint"].endswith(f"--set storage_path={mount['mountPath']}")


def test_the_network_policy_covers_every_pod_and_lets_in_no_strangers() -> None:
    claim, policy = yaml.safe_load_all((DOCKER / "kuberay" / "common.yaml").read_text())
    assert claim["metadata"]["name"] == "bitgenome-runs"
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    templates = [manifest("RayJob")["spec"]["submitterPodTemplate"]]
    for kind in MANIFESTS:
        spec = cluster_spec(kind)
        templates += [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    assert all(chosen.items() <= template["metadata"]["labels"].items() for template in templates)
    assert all(rule["from"] for rule in policy["spec"]["ingress"])


def test_the_pod_monitor_has_the_published_fields_and_finds_the_metrics_of_every_node() -> None:
    monitor = yaml.safe_load((DOCKER / "kuberay" / "podmonitor.yaml").read_text())
    jsonschema.validate(monitor, POD_MONITOR)
    broken = copy.deepcopy(monitor)
    broken["spec"]["podMetricsEndpoints"][0]["interval"] = "10 s"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, POD_MONITOR)
    chosen = monitor["spec"]["selector"]["matchLabels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for kind in MANIFESTS:
        spec = cluster_spec(kind)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (container,) = group["template"]["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert chosen <= group["template"]["metadata"]["labels"].items()
            assert str(ports[endpoint["port"]]) == group["rayStartParams"]["metrics-export-port"]


def test_the_dashboard_shows_every_metric_by_run_and_can_choose_by_every_tag() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "bitgenome.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = " ".join(expressions)
    for name in [*GAUGES, *(f"{counter}_total" for counter in COUNTERS), f"{SECONDS}_bucket"]:
        assert f"ray_{name}{{" in shown, f"no panel shows {name}"
    for expression in expressions:
        assert re.search(r"by \(run(, le)?\)", expression), expression
        assert all(f'{tag}=~"${tag}"' in expression for tag in TAGS), expression
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == list(TAGS)


def test_the_dashboard_reads_the_provisioned_source() -> None:
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "bitgenome.json").read_text())
    used = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert used == {source["uid"]}
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/bitgenome.yaml").read_text())["providers"][0]
    mounts = compose_file()["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool here")
def test_promtool_accepts_the_prometheus_configuration() -> None:
    done = call("promtool", "check", "config", str(DOCKER / "prometheus" / "prometheus.yml"))
    assert done.returncode == 0, done.stderr
