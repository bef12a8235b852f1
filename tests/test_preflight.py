"""The check before a sweep: the sums, what it makes of the nodes' answers, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from diffult_ray import config, fleet, preflight, probe
from diffult_ray.cluster import Capacity, check_fits
from diffult_ray.errors import DoesNotFit
from diffult_ray.fleet import Fleet, Kind
from diffult_ray.plan import make_plan

HEAD = Kind("head", 1, 0, 0, is_head=True)
SPOT, FALLBACK = Kind("spot", 8, 8, 1), Kind("fallback", 4, 8, 1)
ROOT = Path(__file__).parents[1]
VERSIONS = {"Python": "3.11.7", "Ray": "2.60.0", "torch": "2.14.1", "diffult_ray": "0.1.0 (abc)"}


def capacity(*kinds: Kind, limit: int | None = None) -> Capacity:
    return Capacity.of(Fleet((HEAD, *kinds), limit), "the cluster at x at its largest")


def plan(*overrides: str):
    return make_plan(config.load("digits", list(overrides)))


# --- the fleet ---


def test_the_sum_is_of_machines_that_can_be_up_together():
    found = Fleet((HEAD, SPOT, FALLBACK), 8)
    assert found.total("cpus") == 64 and found.total("gpus") == 8
    assert found.shown("gpus") == "1 head x 0 + 8 spot x 1 = 8 GPUs"
    assert Fleet((HEAD, SPOT, FALLBACK)).total("cpus") == 96


def test_the_limit_takes_the_larger_machines_first():
    large = Kind("large", 2, 32, 0)
    found = Fleet((HEAD, SPOT, large), 3)
    assert found.shown("cpus") == "1 head x 0 + 2 large x 32 + 1 spot x 8 = 72 CPUs"
    assert found.shown("gpus") == "1 head x 0 + 3 spot x 1 = 3 GPUs"


def test_the_dearest_hour_is_a_sum_and_unknown_where_a_price_is_missing():
    kinds = [replace(k, price=p) for k, p in ((HEAD, 0.2), (SPOT, 0.4), (FALLBACK, 1.0))]
    assert Fleet(tuple(kinds), 8).price() == "1 head x 0.20 + 4 fallback x 1.00 + 4 spot x 0.40 = 5.80"
    assert Fleet((HEAD, *kinds[1:]), 8).price() is None


@pytest.mark.parametrize(
    ("cpus", "gpus", "places"), [(8, 1, 8), (4, 1, 8), (4, 0, 16), (9, 0, 0), (0.5, 0.5, 16), (1, 2, 0)]
)
def test_a_worker_is_on_one_machine(cpus, gpus, places):
    assert Fleet((HEAD, SPOT), 8).places(cpus, gpus) == places


def test_an_autoscaler_that_does_not_say_what_its_machines_hold_is_not_believed():
    types = {"head": {"resources": {}, "max_workers": 0}, "node": {"resources": {}, "max_workers": 2}}
    assert fleet.of_autoscaling({"head_node_type": "head", "available_node_types": types}) is None
    assert fleet.of_autoscaling({}) is None


def test_machines_that_are_up_are_counted_by_what_they_hold():
    head = {"Alive": True, "Resources": {"node:__internal_head__": 1.0}}
    node = {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}
    found = fleet.of_nodes([head, node, node, {**node, "Alive": False}])
    assert found.shown("cpus") == "1 head x 0 + 2 node x 4 = 8 CPUs"


def test_of_the_autoscalers_file_only_sizes_leave_the_head(tmp_path, monkeypatch):
    file = tmp_path / "bootstrap.yaml"
    file.write_text(
        "auth: {ssh_private_key: SECRET}\nprovider: {type: aws, aws_credentials: {x: SECRET}}\n"
        "head_node_type: head\nmax_workers: 2\navailable_node_types:\n"
        "  head: {resources: {CPU: 0}, max_workers: 0, node_config: {KeyName: SECRET}}\n"
        "  node: {resources: {CPU: 4}, max_workers: 2, node_config: {UserData: SECRET}}\n"
    )
    line = ["python", "monitor.py", "--gcs-address=10.0.0.1:6379", f"--autoscaling-config={file}"]
    monkeypatch.setattr(fleet, "_command_lines", lambda: iter([["other"], line]))
    monkeypatch.delenv("RAY_CLUSTER_NAME", raising=False)
    found = fleet.configured("10.0.0.1:6379")
    assert "SECRET" not in str(found)
    assert fleet.of_autoscaling(found).shown("cpus") == "1 head x 0 + 2 node x 4 = 8 CPUs"
    assert fleet.configured("10.0.0.2:6379") is None


@pytest.mark.parametrize("scales", [True, False])
def test_on_kubernetes_the_resource_is_read_where_it_scales(scales, monkeypatch):
    from ray.autoscaler._private.kuberay import node_provider

    resource = yaml.safe_load((ROOT / "clusters/kuberay/raycluster.yaml").read_text())
    resource["metadata"]["namespace"] = "research"
    resource["spec"]["enableInTreeAutoscaling"] = scales
    client = SimpleNamespace(get=lambda path: {"rayclusters/diffult": resource}[path])
    monkeypatch.setattr(node_provider, "KubernetesHttpApiClient", lambda namespace: client)
    monkeypatch.setattr(Path, "read_text", lambda path: "research\n")
    monkeypatch.setenv("RAY_CLUSTER_NAME", "diffult")
    found = fleet.configured("10.0.0.1:6379")
    assert (fleet.of_autoscaling(found).total("gpus") == 12) if scales else (found is None)


# --- the request ---


def test_a_request_is_set_against_the_maximum_with_both_sums():
    found = preflight.request(plan("resources.generator.workers=3"), capacity(SPOT, limit=8))
    assert str(found) == (
        "ok      request   at most generator 3 x 1 = 3 CPUs, the cluster at x at its largest holds "
        "1 head x 0 + 8 spot x 8 = 64 CPUs"
    )


def test_a_sum_that_is_too_large_is_shown_and_ends_with_3():
    wanted = plan("resources.generator.workers=9", "resources.generator.gpus=1")
    found = preflight.request(wanted, capacity(SPOT, limit=8))
    assert "9 workers x 1 GPUs = 9 GPUs, but the cluster at x at its largest holds" in found.text
    assert "1 head x 0 + 8 spot x 1 = 8 GPUs" in found.text
    assert preflight.exit_code([found]) == 3


def test_a_worker_that_no_machine_holds_is_refused_though_the_sum_fits():
    wanted = plan("resources.classifier.cpus=9")
    with pytest.raises(DoesNotFit, match="1 workers of 9 CPUs and 0 GPUs, each on one machine.*place for 0"):
        check_fits(wanted, capacity(SPOT, limit=8))
    assert preflight.placement(wanted, capacity(SPOT, limit=8)) is None


def test_the_largest_trainer_is_told_with_its_places():
    wanted = plan("resources.generator.workers=4", "resources.generator.gpus=1", "resources.generator.cpus=2")
    found = preflight.placement(wanted, capacity(SPOT, limit=8))
    assert found.text == (
        "generator needs 4 workers of 2 CPUs and 1 GPUs, each on one machine; there is place for 8"
    )


def test_of_an_elastic_generator_only_the_fewest_workers_must_fit():
    wanted = plan("resources.generator.workers=2", "resources.generator.max_workers=30")
    few = capacity(Kind("node", 3, 1, 0))
    check_fits(wanted, few)
    assert "generator 2 x 1 = 2 CPUs" in preflight.request(wanted, few).text
    assert preflight.placement(wanted, few).text == (
        "generator needs 2 workers, wishes for 30, of 1 CPUs and 0 GPUs, each on one machine; "
        "there is place for 3"
    )


# --- the nodes' answers ---


def answer(**changed) -> dict:
    return {"versions": VERSIONS, "gpus": [], "storage": "nonce", **changed}


def test_equal_versions_are_one_line_and_each_other_one_is_told():
    assert str(preflight.versions(VERSIONS, {"a": answer(), "b": answer()})[0]) == (
        "ok      versions  Python 3.11.7, Ray 2.60.0, torch 2.14.1, diffult_ray 0.1.0 (abc) on 2 nodes"
    )
    stale = answer(versions={**VERSIONS, "torch": "2.13.0", "diffult_ray": "0.1.0 (def)"})
    (found,) = preflight.versions(VERSIONS, {"a": answer(), "b": stale})
    assert found.level == "error" and found.code == 2
    assert found.text == "b has torch 2.13.0 (here 2.14.1), diffult_ray 0.1.0 (def) (here 0.1.0 (abc))"


def test_a_storage_that_a_node_does_not_share_is_told(tmp_path):
    nonce = "f" * 32
    probe.prepare(str(tmp_path), nonce)
    probe.write(str(tmp_path), nonce, "a")
    answers = {n: answer(storage=nonce) for n in "abc"} | {"b": answer(storage="FileNotFoundError: no")}
    first, second = preflight.storage(str(tmp_path), nonce, answers)
    assert "b cannot use" in first.text and "name storage that every node sees" in first.text
    assert "what c wrote" in second.text and "is not seen here" in second.text
    assert preflight.storage(str(tmp_path), nonce, {"a": answers["a"]})[0].level == "ok"
    probe.clear(str(tmp_path), nonce)
    assert list(tmp_path.iterdir()) == []


def test_a_nodes_own_try_of_the_storage(tmp_path):
    nonce = "a" * 32
    probe.prepare(str(tmp_path), nonce)
    assert probe.run(str(tmp_path), nonce, "n")["storage"] == nonce
    assert probe.read(str(tmp_path), nonce, "n") == nonce
    assert "FileNotFoundError" in probe.run(str(tmp_path / "elsewhere"), nonce, "n")["storage"]


def gpu(free: float = 22_000, total: float = 23_000) -> dict:
    return {"name": "NVIDIA L4", "total": total, "free": free}


def test_gpus_are_there_and_free():
    good = answer(gpus=[gpu()])
    (found,) = preflight.gpus({"a": good, "b": good, "head": answer()}, {"a": 1, "b": 1, "head": 0}, True)
    assert str(found) == "ok      gpus      2 x NVIDIA L4, at least 21.5 of 22.5 GiB free"


@pytest.mark.parametrize(
    ("seen", "level", "text"),
    [
        (answer(), "error", "a offers 1 GPUs to Ray, nvidia-smi shows 0"),
        (answer(gpus=[gpu(free=9000)]), "warning", "a, GPU 0: 8.8 of 22.5 GiB free: something else is on it"),
        (answer(gpus=[gpu()], versions={**VERSIONS, "torch": "2.14.1+cpu"}), "error", "a torch without CUDA"),
    ],
)
def test_a_gpu_that_is_missing_used_or_not_for_this_torch_is_told(seen, level, text):
    found = preflight.gpus({"a": seen}, {"a": 1}, True)[0]
    assert found.level == level and text in found.text


def test_gpus_that_the_autoscaler_has_still_to_start_are_no_fault():
    assert preflight.gpus({"head": answer()}, {}, True)[0].text.startswith("none is up yet")
    assert preflight.gpus({"head": answer()}, {}, False)[0].text == "none asked for"


def test_nvidia_smi_is_read_and_its_absence_is_no_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 81000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert probe.graphics() == [{"name": "NVIDIA H100 80GB HBM3", "total": 81559, "free": 81000}]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert probe.graphics() == []


def test_a_clock_is_told_only_where_the_network_does_not_explain_it():
    assert preflight.clocks({"a": (0.01, 0.2), "b": (5.0, 4.0)})[0].text == "within 1.0 s on 2 nodes"
    (found,) = preflight.clocks({"a": (0.0, 0.1), "b": (-7.5, 0.1)})
    assert found.level == "warning" and found.text.startswith("b is 7.5 s behind (+-0.1 s)")
    assert preflight.exit_code([found]) == 0


def test_no_password_of_a_storage_is_told():
    found = preflight.broken("storage", "s3://KEY:SECRET@bucket/x cannot be written")
    assert "SECRET" not in str(found) and "SECRET" not in str(preflight.Unfit(found))


def test_the_first_error_gives_the_exit_code():
    unfit = preflight.Finding("error", "request", "", 3)
    errors = [preflight.Finding("ok", "clock", ""), preflight.broken("storage", ""), unfit]
    assert preflight.exit_code(errors) == 2 and preflight.exit_code(errors[:1]) == 0


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["cifar100_lt/weight", "--fleet", "clusters/aws.yaml"], 0, "8 gpu_spot x 1 = 8 GPUs"),
        (["digits", "resources.generator.cpus=100", "--fleet", "clusters/aws.yaml"], 3, "200 CPUs, but"),
        (["digits", "--fleet", "clusters/none.yaml"], 2, "clusters/none.yaml: must be a readable YAML file"),
        (["digits", "--address", "127.0.0.1:1"], 2, "--address: must be a Ray cluster that can be joined"),
        (["nothing", "--fleet", "clusters/aws.yaml"], 2, "nothing"),
    ],
)
def test_the_command_has_the_front_doors_exit_codes(arguments, code, text, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert preflight.main(arguments) == code
    told = capsys.readouterr()
    assert text in told.out + told.err


@pytest.mark.slow
def test_the_command_alone_checks_a_cluster_on_this_machine(tmp_path, ray_folder):
    without = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "DIFFULT_"))}
    done = subprocess.run(
        [sys.executable, "-m", "diffult_ray.cluster", "digits", "--storage", str(tmp_path / "storage")],
        env={**without, "RAY_TMPDIR": str(ray_folder)}, capture_output=True, text=True, timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    subjects = [line.split()[1] for line in done.stdout.splitlines()]
    assert subjects == ["request", "versions", "storage", "gpus", "clock"]
    assert not (tmp_path / "storage").exists()
