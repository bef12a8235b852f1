"""The front door from end to end on digits: real Ray, real training, a real MLflow store."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import MEASURED, TINY, FrontDoor

COLUMNS = [
    "trial", "method", "status", "seed", "filter.threshold", "classifier.seed", "generator.steps",
    "accuracy", "balanced_accuracy", "accuracy_many", "accuracy_medium", "accuracy_few", "generated",
    "kept", "p_id", "p_aid", "p_ood", "fid", "inception_score", "quality_network", "seconds",
]
TRIALS = 9  # 2 seeds x (ce, oversample, threshold 2, inf), and 40 steps with seed 0


def results(door: FrontDoor) -> pd.DataFrame:
    return pd.read_parquet(door.storage / "sweeps" / "tiny" / "results.parquet")


def measured(door: FrontDoor) -> pd.DataFrame:
    """Results without what a clock says."""
    return results(door).drop(columns=MEASURED).set_index("trial").sort_index()


@pytest.fixture(scope="module")
def finished(new_door):
    door = new_door()
    done = door.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return door, done


@pytest.fixture(scope="module")
def mlflow_runs(finished):
    from mlflow import MlflowClient

    door, _ = finished
    client = MlflowClient(f"sqlite:///{door.storage}/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    return client, client.search_runs([experiment.experiment_id], max_results=1000)


def test_results_have_one_row_a_trial_and_the_documented_columns(finished):
    frame = results(finished[0])
    assert [c for c in frame.columns if c in COLUMNS] == COLUMNS
    assert frame["trial"].nunique() == len(frame) == TRIALS
    assert set(frame["status"]) == {"done"}
    assert frame["accuracy"].between(10, 100).all()
    synthetic = frame[frame["method"] == "diffult"]
    assert synthetic["fid"].gt(0).all() and set(synthetic["quality_network"]) == {"reference"}
    assert (synthetic["kept"] <= synthetic["generated"]).all()
    assert list(frame.columns[-14:]) == [
        "kid", "precision", "recall", "memorised", "per_class_fid", "fid_images", "synthetic", "pool",
        "steps", "train_images", "memorised_expected", "agreement", "memory_mib", "gpu_memory_mib",
    ]
    assert synthetic["pool"].notna().all() and frame["steps"].gt(0).all()
    assert (synthetic["train_images"] > frame[frame["method"] == "ce"]["train_images"].max()).all()
    assert synthetic["kid"].gt(0).all() and set(synthetic["fid_images"]) == {200}
    assert synthetic[["precision", "recall", "memorised"]].stack().between(0, 1).all()
    assert {len(row) for row in synthetic["per_class_fid"]} == {10}
    unfiltered = synthetic[synthetic["filter.threshold"] == float("inf")]
    assert len(unfiltered) == 2 and (unfiltered["kept"] == unfiltered["generated"]).all()
    shares = synthetic[["p_id", "p_aid", "p_ood"]].sum(axis=1)
    assert shares.tolist() == pytest.approx([1.0] * len(synthetic))


def test_each_distinct_stage_is_built_once(finished):
    stages = pd.Series([key.split("/")[0] for key in finished[0].manifests()]).value_counts().to_dict()
    assert stages == {
        "split": 1, "extractor": 1, "reference": 1, "generator": 2, "images": 2, "scores": 2,
        "quality": 2, "classifier": TRIALS,
    }


def test_a_manifest_tells_what_the_artifact_is(finished):
    import hashlib

    for key in finished[0].manifests():
        folder = finished[0].storage / "artifacts" / key
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {"config", "inputs", "code_version", "seconds", "machine"} <= set(manifest)
        assert 50 < manifest["peaks"]["memory_mib"] < 8192 and "gpu_memory_mib" not in manifest["peaks"]
        listed = {f["name"]: (f["bytes"], f["sha256"]) for f in manifest["files"]}
        there = {
            p.relative_to(folder).as_posix(): (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
            for p in folder.rglob("*") if p.is_file() and p != folder / "manifest.json"
        }
        assert listed == there


def test_nothing_that_is_unfinished_stays(finished):
    work = finished[0].storage / "work"
    assert not work.exists() or not list(work.iterdir())
    assert not list(finished[0].storage.rglob("*.tmp"))
    assert finished[0].processes() == []


def test_the_terminal_tells_stages_and_trials_and_nothing_of_rays(finished):
    text = finished[1].stdout
    assert finished[1].stderr == ""
    assert len(re.findall(r"trial \d+/9 .*accuracy \d", text)) == TRIALS
    for name in ("extractor", "generator", "reference", "images", "scores", "quality"):
        assert re.search(rf"{name} \S+.*: done in ", text), name
    told = [line for line in text.splitlines() if re.match(r"\[\d+:\d\d\]", line)]
    assert len(told) < 45
    assert "report.html" in text and "mlflow ui" in text
    assert "(raylet)" not in text and "WARNING" not in text


def test_the_report_is_one_file(finished):
    folder = finished[0].storage / "sweeps" / "tiny"
    html = (folder / "report.html").read_text()
    assert "data:image/png;base64," in html
    assert not re.search(r"""(src|href)=["']https?:""", html)
    assert list((folder / "figures").glob("*.png"))


def test_mlflow_has_the_sweep_its_trials_and_its_stages(mlflow_runs):
    client, runs = mlflow_runs
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(parents) == 1 and parents[0].info.status == "FINISHED"
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    trials = [r for r in children if "diffult.trial" in r.data.tags]
    stages = [r for r in children if "diffult.trial" not in r.data.tags]
    assert (len(trials), len(stages)) == (TRIALS, 11)
    assert all("accuracy" in r.data.metrics for r in trials)
    generators = [r for r in stages if r.data.tags.get("diffult.stage") == "generator"]
    longest = max(generators, key=lambda r: r.data.metrics.get("steps", 0))
    curve = client.get_metric_history(longest.info.run_id, "loss")
    assert max(point.step for point in curve) == 80 and len(curve) > 20
    logged = {f.path for f in client.list_artifacts(parents[0].info.run_id)}
    assert {"sweep.yaml", "report.html", "results.parquet", "figures"} <= logged


def test_the_selected_classifier_answers_for_raw_images(finished, mlflow_runs):
    import mlflow
    import numpy as np

    client, runs = mlflow_runs
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    models = client.search_logged_models([parent.info.experiment_id])
    assert len(models) == 1
    mlflow.set_tracking_uri(f"sqlite:///{finished[0].storage}/mlflow.db")
    try:
        loaded = mlflow.pyfunc.load_model(models[0].model_uri)
    finally:
        mlflow.set_tracking_uri(None)
    answer = np.asarray(loaded.predict(np.zeros((3, 1, 8, 8), np.uint8)))
    assert answer.shape == (3, 10)
    assert answer.sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)


def test_the_generator_opens_in_diffusers_and_the_pool_in_pandas(finished):
    from diffusers import UNet2DModel

    artifacts = finished[0].storage / "artifacts"
    for folder in (artifacts / "generator").iterdir():
        assert UNet2DModel.from_pretrained(folder / "unet").config.num_class_embeds == 11
    for folder in (artifacts / "scores").iterdir():
        frame = pd.read_parquet(folder / "pool")
        assert {"image", "label", "id", "seed", "distance", "band", "nearest"} <= set(frame.columns)
        assert len(frame) == sum(max(0, 30 - n) for n in [60, 43, 30, 22, 15, 11, 8, 5, 4, 3])
    assert not list(finished[0].storage.rglob("*.p*kl*"))


def test_the_same_command_again_builds_nothing_and_prints_the_results(finished):
    door, first = finished
    before = door.manifests()
    again = door.run(timeout=60)
    assert again.returncode == 0 and again.stderr == ""
    assert door.manifests() == before
    table = first.stdout[first.stdout.index("test accuracy"):]
    assert again.stdout[again.stdout.index("test accuracy"):] == table


def test_the_plan_says_what_is_stored_and_starts_nothing(finished):
    shown = finished[0].run("--plan", "search.classifier.seed.grid=[0,1,2]", timeout=60)
    assert shown.returncode == 0
    assert len(re.findall(r"generator +\w+ +stored", shown.stdout)) == 2
    assert "trials stored: 9" in shown.stdout and "trials to build: 6" in shown.stdout
    assert finished[0].processes() == []


def _continue_after(door: FrontDoor, sign: str, number: int) -> str:
    """Start the sweep, send it a signal when a line holds `sign`; what it said."""
    process = door.start()
    said = []
    for line in process.stdout:
        said.append(line)
        if sign in line:
            os.kill(process.pid, number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, "".join(said) + rest
    assert door.processes() == []
    return "".join(said) + rest


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "number"), [
    ("generator", signal.SIGINT), ("images", signal.SIGTERM), ("trial 2/9", signal.SIGINT),
])
def test_an_interrupted_sweep_goes_on_to_the_same_results(finished, new_door, sign, number):
    door = new_door()
    said = _continue_after(door, sign, number)
    assert "the same command continues" in said and "Traceback" not in said
    stored = door.manifests()
    again = door.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert {k: v for k, v in door.manifests().items() if k in stored} == stored
    pd.testing.assert_frame_equal(measured(door), measured(finished[0]))
    assert not list((door.storage / "work").glob("*"))


@pytest.mark.slow
def test_a_classifier_with_two_workers_trains_under_a_trainer_of_its_own(new_door):
    text = TINY.replace("generator: {workers: 2}", "classifier: {workers: 2}")
    short = "baselines: [ce]\nsearch: {classifier.seed: {grid: [0]}}"
    door = new_door(re.sub(r"baselines:.*", short, text, flags=re.S))
    done = door.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (results(door)["status"] == "done").all()
    assert results(door)["accuracy"].min() > 30


@pytest.mark.slow
def test_a_stage_that_fails_takes_only_its_own_trials_with_it(new_door):
    text = TINY.replace("learning_rate: 2.0e-3", "learning_rate: 1.0e+30")
    door = new_door(text)
    done = door.run()
    assert done.returncode == 1, done.stdout + done.stderr
    frame = results(door)
    assert set(frame[frame["method"] != "diffult"]["status"]) == {"done"}
    failed = frame[frame["status"] == "failed"]
    assert set(failed["method"]) == {"diffult"}
    assert failed["error"].str.contains("finite").all()
    assert "FAILED" in done.stdout


def _sweep_folder(door: FrontDoor) -> Path:
    return door.storage / "sweeps" / "tiny"


def test_a_broken_record_is_made_again_from_the_stored_artifacts(finished):
    door, _ = finished
    frame, before = measured(door), door.manifests()
    victim = sorted((_sweep_folder(door) / "trials").iterdir())[0]
    victim.write_text('{"half')
    with contextlib.suppress(FileNotFoundError):
        (_sweep_folder(door) / "finished.json").unlink()
    again = door.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert door.manifests() == before
    pd.testing.assert_frame_equal(measured(door), frame)
