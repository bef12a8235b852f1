"""The files in `clusters/`: of the form that Ray and KubeRay take, bounded in cost, closed to strangers."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffult_ray import fleet, metrics
from diffult_ray.errors import BadInput

ROOT = Path(__file__).parents[1]
CLUSTERS = ROOT / "clusters"
CLOUDS = ("aws", "gcp")
LAUNCHERS = (*CLOUDS, "local")
MANIFESTS = ("raycluster", "rayjob")


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


def manifest(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / "kuberay" / f"{name}.yaml").read_text()))


def cluster_spec(name: str) -> dict[str, Any]:
    spec = manifest(name)[0]["spec"]
    return spec["rayClusterSpec"] if name == "rayjob" else spec


# --- launcher files ---


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_passes_rays_own_validation(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(launcher(name))
    validate_config(config)
    assert config["max_workers"] > 0 and config["idle_timeout_minutes"] > 0


def test_rays_validation_refuses_a_field_that_it_does_not_know():
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config({**launcher("aws"), "max_wrokers": 3}))


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_is_on_demand_without_gpu_and_workers_are_spot_before_on_demand(name):
    types = launcher(name)["available_node_types"]
    head, spot, fallback = types["head"], types["gpu_spot"], types["gpu_on_demand"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert [_is_spot(t["node_config"]) for t in (head, spot, fallback)] == [False, True, False]
    assert spot["priority"] > fallback["priority"] and spot["resources"] == fallback["resources"]
    assert all(t["min_workers"] == 0 for t in types.values()) and fallback["max_workers"] > 0
    if name == "aws":
        assert spot["node_config"]["InstanceType"] == fallback["node_config"]["InstanceType"]
    else:
        assert spot["node_config"]["machineType"] == fallback["node_config"]["machineType"]


def _is_spot(node: dict[str, Any]) -> bool:
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    models = [s.get("provisioningModel") for s in node.get("scheduling", [])]
    return market == "spot" or "SPOT" in models


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_file_has_shared_storage_a_token_and_a_dashboard_on_loopback(name):
    config, text = launcher(name), (CLUSTERS / f"{name}.yaml").read_text()
    assert re.search(r"DIFFULT_STORAGE=/(mnt|shared)/diffult", text)
    assert any(remote.endswith("/.ray/auth_token") for remote in config["file_mounts"])
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [c for c in commands if " start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in c for c in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert not any("ray stop --force" in c for c in config["head_start_ray_commands"])


@pytest.mark.parametrize("name", CLOUDS)
def test_every_machine_of_a_launcher_file_has_a_price(name):
    kinds = fleet.read(CLUSTERS / f"{name}.yaml").kinds
    assert all(k.price and k.price > 0 for k in kinds)
    price = {k.name: k.price for k in kinds}
    assert price["gpu_spot"] < price["gpu_on_demand"]


# --- KubeRay ---

# The fields that our manifests use, of the CRDs of KubeRay 1.7.0 (ray.io/v1).
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "priority", "rayStartParams", "template"}
FIELDS = {
    "RayCluster": {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs",
    },
    "RayJob": {
        "entrypoint", "activeDeadlineSeconds", "backoffLimit", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "submissionMode", "submitterPodTemplate", "rayClusterSpec",
    },
    "authOptions": {"mode", "secretName"},
    "autoscalerOptions": {"version", "idleTimeoutSeconds", "upscalingMode", "resources"},
    "headGroupSpec": {"rayStartParams", "template"},
    "pod": {
        "containers", "volumes", "tolerations", "nodeSelector", "restartPolicy",
        "terminationGracePeriodSeconds",
    },
    "container": {"name", "image", "env", "ports", "resources", "volumeMounts"},
    "toleration": {"key", "operator", "value", "effect"},
}  # fmt: skip


def objects(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is, the object) of all that the CRD describes in a manifest."""
    first = manifest(name)[0]
    yield first["kind"], first["spec"]
    spec = cluster_spec(name)
    yield "RayCluster", spec
    for part in ("authOptions", "autoscalerOptions", "headGroupSpec"):
        yield part, spec[part]
    templates = [spec["headGroupSpec"]["template"]]
    for group in spec["workerGroupSpecs"]:
        yield "group", group
        templates.append(group["template"])
    if name == "rayjob":
        templates.append(first["spec"]["submitterPodTemplate"])
    for template in templates:
        yield "pod", template["spec"]
        yield from (("container", c) for c in template["spec"]["containers"])
        yield from (("toleration", t) for t in template["spec"].get("tolerations", []))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_no_field_that_the_crd_does_not_have(name):
    assert manifest(name)[0]["apiVersion"] == "ray.io/v1"
    for what, each in objects(name):
        known = GROUP if what == "group" else FIELDS[what]
        assert set(each) <= known, f"{what}: {sorted(set(each) - known)}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_a_token_a_zero_cpu_head_and_autoscaler_v2(name):
    import ray

    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token", "secretName": "diffult-token"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["rayVersion"] == ray.__version__
    parameters = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert all(isinstance(v, str) for group in parameters for v in group["rayStartParams"].values())


@pytest.mark.parametrize("name", MANIFESTS)
def test_spot_workers_are_tolerated_preferred_and_have_a_fallback(name):
    spot, fallback = cluster_spec(name)["workerGroupSpecs"]
    tolerated = {t["key"] for t in spot["template"]["spec"]["tolerations"]}
    assert {"cloud.google.com/gke-spot", "nvidia.com/gpu"} <= tolerated
    assert spot["priority"] > fallback["priority"] and fallback["maxReplicas"] > 0
    assert [g["minReplicas"] for g in (spot, fallback)] == [0, 0]
    assert "nodeSelector" not in fallback["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_of_a_cluster_mounts_the_shared_storage(name):
    claim = next(iter(yaml.safe_load_all((CLUSTERS / "kuberay/storage.yaml").read_text())))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = cluster_spec(name)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if v["name"] == "storage"]
        assert claims == [claim["metadata"]["name"]]
        assert {"name": "storage", "mountPath": "/mnt/diffult"} in pod["containers"][0]["volumeMounts"]


def test_a_job_ends_and_both_manifests_describe_the_same_cluster():
    job, policy = manifest("rayjob")
    assert job["spec"]["activeDeadlineSeconds"] > 0 and job["spec"]["shutdownAfterJobFinishes"]
    assert cluster_spec("rayjob")["workerGroupSpecs"] == cluster_spec("raycluster")["workerGroupSpecs"]
    labels = policy["spec"]["podSelector"]["matchLabels"]
    groups = [cluster_spec("rayjob")["headGroupSpec"], *cluster_spec("rayjob")["workerGroupSpecs"]]
    for template in (*(g["template"] for g in groups), job["spec"]["submitterPodTemplate"]):
        assert labels.items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_says_what_its_cluster_holds_and_costs(name):
    found = fleet.read(CLUSTERS / "kuberay" / f"{name}.yaml")
    assert found.total("gpus") == 12 and found.places(7, 1) == 12 and found.places(8, 1) == 0
    assert {k.name for k in found.kinds} == {"headgroup", "gpu-spot", "gpu-on-demand"}
    assert all(k.price for k in found.kinds)


def test_a_file_that_is_no_cluster_is_refused_in_one_line(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("name: digits\n")
    with pytest.raises(BadInput, match="must be a Ray launcher file, or a RayCluster or RayJob manifest"):
        fleet.read(other)
    with pytest.raises(BadInput, match="only the running cluster can tell"):
        fleet.read(CLUSTERS / "local.yaml")


# --- the container and a job's working directory ---


def test_the_containers_base_and_the_clusters_have_the_ray_that_is_locked():
    locked = re.search(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    texts = [p.read_text() for p in CLUSTERS.rglob("*") if p.is_file() and p.suffix in ("", ".yaml")]
    images = {v for text in texts for v in re.findall(r"rayproject/ray:([\d.]+)-", text)}
    assert locked and images == {locked[1]}


JUNK = (
    ".venv/lib/x", ".git/objects/x", "data/x", "mlruns/0/x", "mlflow.db", "results/x", "a.safetensors",
    "diffult_ray/__pycache__/x.pyc", "dist/x.whl", ".ruff_cache/x", "pool.parquet", "build/x", ".env",
)  # fmt: skip


def test_a_job_from_a_checkout_packs_under_10_mib(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    (checkout / ".rayignore").write_bytes((ROOT / ".rayignore").read_bytes())
    for name in JUNK:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(2**20))
    create_package(str(checkout), package, include_gitignore=True)
    packed = zipfile.ZipFile(package).namelist()
    assert sum(i.file_size for i in zipfile.ZipFile(package).infolist()) < 10 * 2**20
    assert not set(JUNK) & set(packed)
    assert {"diffult_ray/sweep.py", "diffult_ray/data/digits.py", "sweeps/digits.yaml"} <= set(packed)
    assert not [n for n in packed if n.startswith((".git/", ".venv/", "tests/"))]


# --- one machine ---


@pytest.fixture
def one_machine():
    spec = importlib.util.spec_from_file_location("one_machine", CLUSTERS / "one_machine/__main__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["one_machine"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["one_machine"]


def test_the_one_machine_configuration_is_what_ray_and_we_read(one_machine):
    from ray.autoscaler._private.util import validate_config

    config = one_machine.autoscaling("127.0.0.1:1", nodes=3, cpus=2, idle_minutes=1.0)
    validate_config(config)
    found = fleet.of_autoscaling(config)
    assert found.shown("cpus") == "1 ray.head.default x 0 + 3 node x 2 = 6 CPUs"


def test_a_one_machine_cluster_has_its_own_ports_and_token_and_binds_to_loopback(one_machine, tmp_path):
    ports = one_machine.free_ports(one_machine.PORTS)
    assert len(set(ports.values())) == len(one_machine.PORTS)
    cluster = one_machine.Cluster(tmp_path, tmp_path / "storage", ports)
    options = one_machine._head(cluster)
    assert {"--dashboard-host=127.0.0.1", "--num-cpus=0"} <= set(options)
    environment = cluster.environment
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert not [k for k in environment if k.startswith("RAY_") and k == "RAY_AUTH_TOKEN"]


def test_results_are_fetched_and_processes_of_no_cluster_are_let_be(one_machine, tmp_path, capsys):
    storage = tmp_path / "storage"
    (storage / "sweeps/digits/figures").mkdir(parents=True)
    (storage / "sweeps/digits/report.html").write_text("report")
    (storage / "sweeps/digits/figures/a.png").write_text("figure")
    (storage / "sweeps/digits/work.bin").write_text("large")
    cluster = one_machine.Cluster(tmp_path, storage, {})
    cluster.write()
    assert cluster.processes() == []
    one_machine.main(["--folder", str(tmp_path), "fetch", str(tmp_path / "got")])
    got = sorted(p.relative_to(tmp_path / "got").as_posix() for p in (tmp_path / "got").rglob("*.*"))
    assert got == ["digits/figures/a.png", "digits/report.html"]
    one_machine.main(["--folder", str(tmp_path), "down"])
    assert storage.exists() and not (tmp_path / "cluster.json").exists()


# --- watching ---


def test_every_metric_of_ours_that_the_dashboard_plots_is_one_the_code_counts():
    board = json.loads((CLUSTERS / "grafana.json").read_text())
    plotted = [t["expr"] for p in board["panels"] for t in p["targets"]]
    ours = set(re.findall(r"ray_(diffult_\w+?)_total", " ".join(plotted)))
    assert ours == set(metrics.COUNTERS)
    assert "ray_diffult" not in re.sub(r"ray_diffult_\w+_total", "", " ".join(plotted))
    for name, (_, tags) in metrics.COUNTERS.items():
        by = re.findall(rf"by \(([\w, ]+)\) \(ray_{name}_total", " ".join(plotted))
        assert all(set(b.split(", ")) <= set(tags) for b in by)


def test_every_metric_is_counted_somewhere_and_none_without_a_definition():
    source = "".join(p.read_text() for p in (ROOT / "diffult_ray").rglob("*.py") if p.name != "metrics.py")
    assert set(re.findall(r'metrics\.count\(\s*"(\w+)"', source)) == set(metrics.COUNTERS)


def test_without_a_cluster_nothing_is_counted():
    metrics.count("diffult_images_generated", 3)
