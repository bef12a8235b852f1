"""Tracking against real stores: an sqlite file, `mlflow server`, `mlflow models serve`."""

import http.server
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from diffult_ray import config, files, results, tracking
from diffult_ray.errors import BadInput, masked
from diffult_ray.logbook import Logbook
from diffult_ray.models import build_classifier
from diffult_ray.plan import make_plan
from diffult_ray.report import ReportData
from diffult_ray.store import Artifact, Store
from diffult_ray.tracking import Tracker

NETWORK = {"architecture": "cnn", "num_classes": 3, "channels": 1, "image_size": 8}


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database without runs: migrations are the slow part of a new one."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    Tracker(uri=f"sqlite:///{path}", experiment="other")
    return path


@pytest.fixture
def uri(tmp_path, empty):
    shutil.copy(empty, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def tracker(uri, tmp_path):
    return started(uri, tmp_path)


def started(uri, folder, **other):
    made = Tracker(uri=uri, experiment="digits", artifacts=str(folder / "artifacts"))
    made.start(**{"sweep": "digits", "sweep_id": "5eed", "params": {"a": 1}, "sweep_yaml": "x: 1", **other})
    return made


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs(uri, wanted="", experiment="digits"):
    """Newest last."""
    found = client(uri)
    where = [found.get_experiment_by_name(experiment).experiment_id]
    return found.search_runs(where, wanted, order_by=["attributes.start_time ASC"])


def parent(uri):
    (found,) = runs(uri, "tags.`diffult.sweep_id` = '5eed'")
    return found


def trial(**other):
    return {
        "trial": "0123456789abcdef",
        "method": "diffult",
        "status": "done",
        "stages": {"split": "s1", "classifier": "0123456789abcdef"},
        "error": None,
        "params": {"filter.threshold": 1.5, "seed": 0},
        "metrics": {"accuracy": 91.25, "seconds": 12.0},
        **other,
    }


def classifier(folder, seed=0):
    torch.manual_seed(seed)
    network = build_classifier(**NETWORK).eval()
    facts = {**NETWORK, "class_names": ["a", "b", "c"], "mean": [0.25], "std": [0.5]}
    files.write_json(folder / "model.json", facts)
    files.write_tensors(folder / "model.safetensors", network.state_dict())
    return network


def some_images(n):
    return np.random.default_rng(0).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)


def expected(network, images):
    with torch.no_grad():
        normalised = (torch.from_numpy(images).float() / 255 - 0.25) / 0.5
        return network(normalised).softmax(1).numpy()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def tracking_uri(uri):
    """`runs:/` and `models:/` addresses are resolved by mlflow's own setting: restored afterwards."""
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(None)
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


# --- check ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("./mlruns", "a folder is refused by MLflow"),
        ("/abs/mlruns", "a folder is refused by MLflow"),
        ("file:///abs/mlruns", "a folder is refused by MLflow"),
        ("", "a folder is refused by MLflow"),
        ("ftp://host/x", "no store for ftp://"),
        ("postgresql://me:secret@host/db", "no store for postgresql://"),
        ("sqlite:///relative.db", "four slashes"),
        ("sqlite://", "four slashes"),
        ("sqlite:///:memory:", "four slashes"),
        ("sqlite:////tmp/", "four slashes"),
        ("sqlite:////dev/null/mlflow.db", "Not a directory"),
        ("sqlite:////proc/mlflow.db", "can be written"),
        ("sqlite:////proc/new/mlflow.db", "can be written"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_in_one_line(uri, told):
    with pytest.raises(BadInput) as caught:
        tracking.check(uri)
    line = str(caught.value)
    assert line.startswith("tracking.uri: ") and told in line and "tracking.enabled=false" in line
    assert "secret" not in line and "\n" not in line


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.db").write_text("by hand, and long enough")
    with pytest.raises(BadInput, match="not an SQLite database"):
        tracking.check(f"sqlite:///{tmp_path}/notes.db")
    assert (tmp_path / "notes.db").read_text() == "by hand, and long enough"


def test_check_of_a_file_creates_nothing(tmp_path):
    tracking.check(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_connection_is_told_without_the_password():
    start = time.monotonic()
    with pytest.raises(BadInput) as caught:
        tracking.check(f"http://me:s3cr@t@127.0.0.1:{free_port()}/mlflow")
    assert time.monotonic() - start < 5
    assert "Connection refused" in str(caught.value) and "http://me:***@127.0.0.1" in str(caught.value)
    assert "s3cr" not in str(caught.value) and "t@" not in str(caught.value).replace("***@", "")


@pytest.mark.parametrize("uri", ["http://no-such-host.invalid:5000", "http://", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused_within_seconds(uri):
    start = time.monotonic()
    with pytest.raises(BadInput, match="can be reached"):
        tracking.check(uri)
    assert time.monotonic() - start < 5


def test_a_server_that_never_answers_is_refused_within_seconds(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(BadInput, match="can be reached"):
            tracking.check(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b"<html>a dashboard</html>", "as MLflow does"),
        (404, b"", "HTTP 404"),
        (503, b"", "HTTP 503"),
        (401, b"", "MLFLOW_TRACKING_USERNAME"),
        (403, b"", "MLFLOW_TRACKING_TOKEN"),
        (200, b"{}", None),
    ],
)
def test_a_server_must_answer_as_mlflow_does(status, body, told):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            uri = f"http://127.0.0.1:{server.server_port}"
            if told is None:
                tracking.check(uri)
            else:
                with pytest.raises(BadInput, match=told):
                    tracking.check(uri)
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000/x", "http://me:***@host:5000/x"),
        ("http://me:se:cr@t@host", "http://me:***@host"),
        ("http://me:pa/ss@host", "http://me:***@host"),
        ("http://:secret@host", "http://:***@host"),
        ("http://host:5000/p@th", "http://host:5000/p@th"),
        ("sqlite:////home/a:b@c/mlflow.db", "sqlite:////home/a:b@c/mlflow.db"),
        ("API request to https://me:secret@host/api failed", "API request to https://me:***@host/api failed"),
        ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
    ],
)
def test_passwords_are_masked(text, shown):
    assert masked(text) == shown


def test_the_ui_is_a_command_for_a_file_and_an_address_for_a_server():
    assert tracking.ui_command("sqlite:////data/my sweeps/mlflow.db") == (
        "mlflow ui --backend-store-uri 'sqlite:////data/my sweeps/mlflow.db' --host 127.0.0.1"
    )
    assert tracking.ui_command("http://me:secret@host:5000") == "http://me:***@host:5000"


# --- the sweep --------------------------------------------------------------------------------


def test_a_sweep_is_a_parent_run(uri, tmp_path):
    long = "x" * 7000
    tracker = started(uri, tmp_path, params={"generator.steps": 2000, "long": long, "none": None})
    run = parent(uri)
    assert run.info.status == "RUNNING" and run.info.run_name == "digits"
    assert run.data.params == {"generator.steps": "2000", "long": long[:6000]}
    assert "mlflow.parentRunId" not in run.data.tags
    assert (Path(run.info.artifact_uri.removeprefix("file://")) / "sweep.yaml").read_text() == "x: 1"
    assert run.info.artifact_uri.startswith(f"file://{tmp_path}/artifacts/")
    tracker.finish("FAILED")
    assert parent(uri).info.status == "FAILED"


def test_a_sweep_that_goes_on_has_one_parent_and_keeps_its_params(uri, tmp_path):
    started(uri, tmp_path).finish("KILLED")
    again = started(uri, tmp_path, params={"a": 2, "b": 3})
    assert parent(uri).info.status == "RUNNING"
    assert parent(uri).data.params == {"a": "1", "b": "3"}
    again.finish("FINISHED")
    assert parent(uri).info.status == "FINISHED" and len(runs(uri)) == 1


def test_another_sweep_of_the_same_name_has_its_own_parent(uri, tmp_path):
    started(uri, tmp_path).trial(trial())
    started(uri, tmp_path, sweep_id="07he4").trial(trial())
    children = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    assert len(runs(uri)) == 4
    assert len({run.data.tags["mlflow.parentRunId"] for run in children}) == 2


def test_a_deleted_experiment_is_restored(uri, tmp_path, tracker):
    found = client(uri)
    found.delete_experiment(found.get_experiment_by_name("digits").experiment_id)
    started(uri, tmp_path).trial(trial())
    assert found.get_experiment_by_name("digits").lifecycle_stage == "active"


def test_more_params_than_one_request_holds(uri, tmp_path):
    started(uri, tmp_path, params={f"p{i}": i for i in range(250)})
    assert len(parent(uri).data.params) == 250


def test_sweeps_that_start_together_share_one_new_database(tmp_path):
    uri, errors = f"sqlite:///{tmp_path}/mlflow.db", []

    def start(i):
        try:
            started(uri, tmp_path, sweep_id=f"id{i}").finish("FINISHED")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(runs(uri)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifacts", "mlflow.db"]


def test_files_keep_their_subfolders(uri, tracker, tmp_path):
    files.write_bytes(tmp_path / "sweep" / "report.html", b"report")
    files.write_bytes(tmp_path / "sweep" / "figures" / "x.png", b"figure")
    for _ in range(2):
        tracker.files(tmp_path / "sweep", ["report.html", "figures/x.png"])
    root = Path(parent(uri).info.artifact_uri.removeprefix("file://"))
    kept = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert kept == {"sweep.yaml": b"x: 1", "report.html": b"report", "figures/x.png": b"figure"}


def test_a_missing_file_is_an_error(tracker, tmp_path):
    with pytest.raises(FileNotFoundError):
        tracker.files(tmp_path, ["report.html"])


# --- stages -----------------------------------------------------------------------------------


def history(n):
    rows = [
        {"step": 10 * (i + 1), "seconds": 0.5 * (i + 1), "loss": 1 / (i + 1), "images_per_second": 100.0}
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def build(tracker, **other):
    tracker.stage(**{
        "stage": "generator",
        "key": "fedcba9876543210",
        "params": {"steps": 20, "channels": [32, 64], "tau": None},
        "metrics": {"seconds": 60.0, "loss": 0.5, "kept": True},
        "history": history(2),
        "tags": {"diffult.input.split": "s1"},
        **other,
    })


def test_a_stage_is_a_child_run_with_curves(uri, tracker):
    build(tracker)
    (run,) = runs(uri, "tags.`diffult.key` = 'fedcba9876543210'")
    assert run.info.run_name == "generator fedcba98" and run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent(uri).info.run_id
    assert run.data.tags["diffult.stage"] == "generator" and run.data.tags["diffult.input.split"] == "s1"
    assert run.data.params == {"steps": "20", "channels": "[32, 64]", "kept": "True"}
    assert run.data.metrics == {"seconds": 60.0, "loss": 0.5, "images_per_second": 100.0}
    curve = client(uri).get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in curve] == [(10, 1.0), (20, 0.5)]
    assert curve[1].timestamp - curve[0].timestamp == 500
    assert 60_000 <= run.info.end_time - run.info.start_time < 70_000


def test_a_stage_is_logged_once(uri, tracker, tmp_path):
    build(tracker)
    build(tracker)
    build(started(uri, tmp_path, sweep_id="07he4"))
    assert len(runs(uri, "tags.`diffult.stage` = 'generator'")) == 1


def test_a_stage_whose_logging_broke_off_is_logged_anew(uri, tracker):
    found = client(uri)
    experiment = found.get_experiment_by_name("digits").experiment_id
    broken = found.create_run(experiment, tags={"diffult.key": "fedcba9876543210"})
    build(tracker)
    (run,) = runs(uri, "tags.`diffult.key` = 'fedcba9876543210'")
    assert run.info.run_id != broken.info.run_id and run.info.status == "FINISHED"


def test_a_long_history_is_logged_whole(uri, tracker):
    build(tracker, history=history(1200))
    (run,) = runs(uri, "tags.`diffult.stage` = 'generator'")
    assert len(client(uri).get_metric_history(run.info.run_id, "loss")) == 1200


@pytest.mark.parametrize("none", [None, pd.DataFrame(columns=["step", "seconds", "loss"])])
def test_a_stage_without_a_history(uri, tracker, none):
    build(tracker, history=none)
    (run,) = runs(uri, "tags.`diffult.stage` = 'generator'")
    assert run.data.metrics == {"seconds": 60.0, "loss": 0.5}


# --- trials -----------------------------------------------------------------------------------


def test_a_trial_is_a_child_run(uri, tracker):
    tracker.trial(trial())
    (run,) = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    assert run.info.run_name == "diffult threshold=1.5 seed=0" and run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent(uri).info.run_id
    assert run.data.tags["diffult.stage.split"] == "s1" and run.data.tags["diffult.method"] == "diffult"
    assert run.data.params == {"filter.threshold": "1.5", "seed": "0"}
    assert run.data.metrics == {"accuracy": 91.25, "seconds": 12.0}


def test_a_trials_name_tells_of_synthetic_images(uri, tracker):
    params = {"method": "mixup", "synthetic": True, "classifier.synthetic_weight": 0.3, "seed": 0}
    tracker.trial(trial(method="mixup", synthetic=True, params=params))
    (run,) = runs(uri, "tags.`diffult.synthetic` = 'true'")
    assert run.info.run_name == "mixup+synthetic synthetic_weight=0.3 seed=0"
    assert run.data.tags["diffult.method"] == "mixup" and run.data.params["synthetic"] == "True"


def test_a_trial_told_again_changes_nothing(uri, tracker, tmp_path):
    tracker.trial(trial())
    (before,) = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    started(uri, tmp_path).trial(trial())
    (after,) = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    assert after.to_dictionary() == before.to_dictionary()
    assert len(client(uri).get_metric_history(after.info.run_id, "accuracy")) == 1


def test_a_failed_trial_may_be_done_later(uri, tracker):
    tracker.trial(trial(status="failed", error="out of memory", metrics={}))
    (run,) = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    assert run.info.status == "FAILED" and run.data.tags["diffult.error"] == "out of memory"
    tracker.trial(trial())
    (run,) = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    assert run.info.status == "FINISHED" and "diffult.error" not in run.data.tags
    assert run.data.metrics["accuracy"] == 91.25


def test_what_is_missing_is_left_out_and_infinities_are_text(uri, tracker):
    metrics = {"a": None, "b": math.nan, "c": math.inf, "d": np.float32(0.5), "e": np.int64(3)}
    params = {"f": None, "g": math.nan, "filter.threshold": math.inf, "filter.bands": ["ID", "AID"]}
    tracker.trial(trial(metrics=metrics, params=params))
    (run,) = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    assert run.data.metrics == {"d": 0.5, "e": 3.0}
    assert run.data.params == {"c": "inf", "filter.threshold": "inf", "filter.bands": "['ID', 'AID']"}


def test_a_long_error_is_cut(uri, tracker):
    tracker.trial(trial(status="failed", error="é" * 10_000))
    (run,) = runs(uri, "tags.`diffult.trial` = '0123456789abcdef'")
    assert run.data.tags["diffult.error"] == "é" * 8000


# --- the model --------------------------------------------------------------------------------


def test_the_selected_classifier_gives_probabilities(uri, tracker, tmp_path, tracking_uri):
    import mlflow

    network, images = classifier(tmp_path / "c"), some_images(600)
    tracker.model(folder=tmp_path / "c", description="the best of digits")
    loaded = mlflow.pyfunc.load_model(f"runs:/{parent(uri).info.run_id}/classifier")
    found = loaded.predict(images)
    assert found.dtype == np.float32 and found.shape == (600, 3)
    np.testing.assert_allclose(found, expected(network, images), atol=1e-6)
    assert loaded.metadata.metadata == {"class_names": ["a", "b", "c"], "description": "the best of digits"}
    (spec,), (result,) = loaded.metadata.signature.inputs, loaded.metadata.signature.outputs
    assert (spec.type, spec.shape) == (np.dtype("uint8"), (-1, 1, 8, 8))
    assert (result.type, result.shape) == (np.dtype("float32"), (-1, 3))
    assert loaded.input_example.shape == (1, 1, 8, 8) and loaded.input_example.dtype == np.uint8
    with pytest.raises(Exception, match=r"\(2, 1, 9, 9\) does not match expected shape \(-1, 1, 8, 8\)"):
        loaded.predict(np.zeros((2, 1, 9, 9), np.uint8))
    with pytest.raises(Exception, match="float32 does not match expected dtype uint8"):
        loaded.predict(np.zeros((2, 1, 8, 8), np.float32))


def test_the_model_refuses_what_no_signature_has_checked(uri, tracker, tmp_path, tracking_uri):
    import mlflow

    classifier(tmp_path / "c")
    tracker.model(folder=tmp_path / "c", description="")
    model = mlflow.pyfunc.load_model(f"runs:/{parent(uri).info.run_id}/classifier").unwrap_python_model()
    for images in (np.zeros((2, 1, 9, 9), np.uint8), np.zeros((2, 1, 8, 8))):
        with pytest.raises(ValueError, match=r"uint8 arrays \[n, 1, 8, 8\], not "):
            model.predict(None, images)


def test_a_classifier_is_logged_once_and_another_one_anew(uri, tracker, tmp_path):
    for seed in (0, 0, 1):
        classifier(tmp_path / "c", seed)
        tracker.model(folder=tmp_path / "c", description="")
    experiment = client(uri).get_experiment_by_name("digits").experiment_id
    models = client(uri).search_logged_models([experiment])
    assert [str(m.status) for m in models] == ["READY", "READY"]


def test_a_classifier_that_cannot_be_logged_leaves_no_model_that_looks_ready(uri, tracker, tmp_path):
    classifier(tmp_path / "c")
    (tmp_path / "c" / "model.json").write_text("{}")
    with pytest.raises(KeyError):
        tracker.model(folder=tmp_path / "c", description="")
    experiment = client(uri).get_experiment_by_name("digits").experiment_id
    assert [str(m.status) for m in client(uri).search_logged_models([experiment])] == ["FAILED"]


def model_folder(uri):
    experiment = client(uri).get_experiment_by_name("digits").experiment_id
    (found,) = client(uri).search_logged_models([experiment])
    return Path(found.artifact_location.removeprefix("file://"))


def test_the_model_brings_its_code_and_no_pickle(uri, tracker, tmp_path):
    network, images = classifier(tmp_path / "c"), some_images(2)
    tracker.model(folder=tmp_path / "c", description="")
    folder = model_folder(uri)
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pyc", ".pth", ".pt")]
    names = {line.partition("==")[0] for line in (folder / "requirements.txt").read_text().splitlines()}
    assert names == {"mlflow", "numpy", "safetensors", "torch"}
    np.save(tmp_path / "images.npy", images)
    code = (
        "import importlib.util, sys, numpy, mlflow\n"
        "found = importlib.util.find_spec('diffult_ray')\n"
        "assert found is None or found.origin is None, 'installed'\n"
        f"model = mlflow.pyfunc.load_model({str(folder)!r})\n"
        "print(model.predict(numpy.load('images.npy')).tolist())\n"
        "assert 'ray' not in sys.modules\n"
    )
    # Without `site`, the .pth file of an editable installation is not read.
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), expected(network, images), atol=1e-6)


# --- manners ----------------------------------------------------------------------------------

QUIET = """
import sys
from pathlib import Path
from diffult_ray import tracking
here = Path.cwd()
uri = f"sqlite:///{here}/new/sweeps.db"
tracking.check(uri)
assert not {"mlflow", "torch", "ray"} & set(sys.modules), "imported too early"
tracker = tracking.Tracker(uri=uri, experiment="digits", artifacts="artifacts")
tracker.start(sweep="digits", sweep_id="5eed", params={}, sweep_yaml="")
tracker.trial({"trial": "t", "method": "ce", "status": "failed", "stages": {}, "error": "e",
               "params": {}, "metrics": {}})
tracker.model(folder=here / "c", description="")
tracker.finish("FINISHED")
import threading, mlflow
from mlflow.telemetry import get_telemetry_client
assert get_telemetry_client() is None
assert mlflow.active_run() is None and mlflow.get_tracking_uri() != uri
assert threading.enumerate() == [threading.main_thread()]
"""


def test_tracking_is_silent_local_and_leaves_no_global_state(tmp_path):
    classifier(tmp_path / "c")
    marks = ("MLFLOW_", "PYTEST_", "CI", "GITHUB_ACTIONS", "DO_NOT_TRACK", "PYTHONWARNINGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(marks)}
    done = subprocess.run(
        [sys.executable, "-c", QUIET], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifacts", "c", "new"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sweeps.db"]


# --- the logbook ------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    """A plan, a store, the sweep's folder, and a stage that was built."""
    plan, store = make_plan(config.load("digits", [])), Store(tmp_path / "storage")
    folder = store.root / "sweeps" / "digits"
    files.write_bytes(folder / "sweep.yaml", b"name: digits")
    stage = next(s for s in plan.stages if s.name == "generator")
    manifest = {"summary": {"loss": 0.5, "network": "unet"}, "seconds": 3.0}
    artifact = Artifact(store.folder(stage), manifest)
    files.write_json(artifact.folder / "history.json", history(3).to_dict("records"))
    return SimpleNamespace(plan=plan, store=store, folder=folder, stage=stage, artifact=artifact)


def a_record(i=0):
    return {
        "trial": f"t{i}", "method": "diffult", "status": "done", "seed": i, "params": {"a": i}, "cell": "c",
        "stages": {"split": "s"}, "error": None, "accuracy": 90.0 + i, "fid": None,
        "per_class_accuracy": [1.0, 2.0],
    }


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_the_logbook_logs_what_it_is_told(uri, sweep):
    book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
    book.stage(sweep.stage, sweep.artifact)
    for i in range(5):
        book.trial(a_record(i))
    assert book.close("FAILED") is None
    by_name = {run.info.run_name: run for run in runs(uri)}
    assert by_name["digits"].info.status == "FAILED"
    assert by_name["digits"].data.tags["diffult.sweep_id"] == sweep.plan.id
    assert by_name[sweep.stage.label].data.metrics["loss"] == pytest.approx(1 / 3)
    assert by_name["diffult a=4 seed=4"].data.metrics == {"accuracy": 94.0}
    assert len(by_name) == 7


def test_a_concluded_sweep_has_its_files_and_the_selected_classifier(uri, sweep):
    chosen = next(t for t in sweep.plan.trials if t.experiment.method == "diffult")
    classifier(sweep.store.folder(chosen.stage))
    files.write_json(sweep.store.folder(chosen.stage) / "summary.json", {})
    sweep.store.commit(chosen.stage, seconds=1.0)
    nothing = {"params": {}, "status": "failed"}
    records = {t.key: {**nothing, "trial": t.key, "method": t.experiment.method, "cell": t.cell}
               for t in sweep.plan.trials}
    records[chosen.key] |= {"status": "done", "accuracy": 90.0, "validation_accuracy": 90.0, "nll": 0.1}
    data = ReportData(
        name="digits", description="", results=results.table(sweep.plan, records),
        searched=sweep.plan.searched, select="test", class_names=["a"], class_counts=[1], gallery={},
        stages=pd.DataFrame(), facts={},
    )
    for name in ("results.parquet", "statistics.json", "report.html", "figures/x.png"):
        files.write_bytes(sweep.folder / name, b"x")
    book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
    assert book.conclude(data, "FINISHED") is None
    (run,) = runs(uri)
    names = {f.path for f in client(uri).list_artifacts(run.info.run_id)}
    assert run.info.status == "FINISHED"
    assert names == {"sweep.yaml", "results.parquet", "statistics.json", "report.html", "figures"}
    (model,) = client(uri).search_logged_models([run.info.experiment_id])
    assert chosen.title in model.tags["mlflow.note.content"] and str(model.status) == "READY"


def test_an_entry_that_cannot_be_logged_holds_no_other_up(uri, sweep):
    (sweep.artifact.folder / "history.json").write_text("[{")
    book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
    book.stage(sweep.stage, sweep.artifact)
    book.trial(a_record())
    assert "JSONDecodeError" in str(book.close("FINISHED"))
    assert {run.info.run_name for run in runs(uri)} == {"digits", "diffult a=0 seed=0"}


def test_a_store_that_comes_back_gets_everything(tmp_path, sweep):
    (tmp_path / "store").write_text("in the way")
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
    wait_for(lambda: book.error is not None)
    book.stage(sweep.stage, sweep.artifact)
    book.trial(a_record())
    (tmp_path / "store").unlink()
    assert book.close("FINISHED") is None
    assert sorted(run.info.status for run in runs(uri)) == ["FINISHED"] * 3


def test_a_lost_server_is_told_at_the_end_without_its_password(sweep, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
    book.trial(a_record())
    error = book.close("FINISHED")
    assert "refused" in str(error) and "secret" not in str(error) and "\n" not in str(error)


@pytest.mark.slow
def test_an_interrupted_sweep_does_not_wait_for_a_silent_server(sweep):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
        book.trial(a_record())
        start = time.monotonic()
        assert "longer than" in str(book.close("KILLED"))
        assert time.monotonic() - start < 15


# --- servers ----------------------------------------------------------------------------------


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


class Process:
    """A command in a process group of its own, ended as one; its output in a file."""

    def __init__(self, command, health, log):
        self.log = log
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )
        self.health = health

    def __enter__(self):
        try:
            wait_for(self._is_up, seconds=120)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        return answers(self.health)

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def mlflow_server(folder, port):
    command = [
        "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1,
        "--backend-store-uri", f"sqlite:///{folder}/server.db",
        "--artifacts-destination", folder / "served",
    ]
    return Process(command, f"http://127.0.0.1:{port}/health", folder / "server.log")


@pytest.mark.slow
def test_a_server_gets_the_same(tmp_path, sweep, capfd):
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with mlflow_server(tmp_path, port):
        tracking.check(uri)
        for _ in range(2):
            tracker = Tracker(uri=uri, experiment="digits")
            tracker.start(sweep="digits", sweep_id="5eed", params={"a": 1}, sweep_yaml="x: 1")
            build(tracker)
            tracker.trial(trial())
            classifier(tmp_path / "c")
            tracker.files(tmp_path / "c", ["model.json"])
            tracker.model(folder=tmp_path / "c", description="")
            tracker.finish("FINISHED")
        book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
        book.trial(a_record())
        assert book.close("FINISHED") is None
        assert capfd.readouterr() == ("", "")
        assert sorted(run.info.status for run in runs(uri)) == ["FINISHED"] * 5
        experiment = client(uri).get_experiment_by_name("digits")
        assert experiment.artifact_location.startswith("mlflow-artifacts:")
        (model,) = client(uri).search_logged_models([experiment.experiment_id])
        assert str(model.status) == "READY"
        names = {f.path for f in client(uri).list_artifacts(parent(uri).info.run_id)}
        assert names >= {"sweep.yaml", "model.json"}


@pytest.mark.slow
def test_a_server_that_comes_back_gets_everything(tmp_path, sweep, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with mlflow_server(tmp_path, port):
        book = Logbook(uri, sweep.plan, sweep.store, sweep.folder)
        book.trial(a_record(0))
        wait_for(lambda: client(uri).get_experiment_by_name("digits") and len(runs(uri)) == 2)
    book.trial(a_record(1))
    wait_for(lambda: book.error is not None)
    book.trial(a_record(2))
    with mlflow_server(tmp_path, port):
        assert book.close("FINISHED") is None
        assert sorted(run.info.status for run in runs(uri)) == ["FINISHED"] * 4


def post(url, value):
    request = urllib.request.Request(
        url, json.dumps(value).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_the_model_is_served(uri, tracker, tmp_path):
    network, images = classifier(tmp_path / "c"), some_images(2)
    tracker.model(folder=tmp_path / "c", description="")
    port = free_port()
    command = [
        "mlflow", "models", "serve", "-m", model_folder(uri), "--env-manager", "local",
        "--host", "127.0.0.1", "--port", port, "--workers", 1,
    ]
    with Process(command, f"http://127.0.0.1:{port}/ping", tmp_path / "serve.log"):
        url = f"http://127.0.0.1:{port}/invocations"
        status, answer = post(url, {"inputs": images.tolist()})
        assert status == 200
        np.testing.assert_allclose(answer["predictions"], expected(network, images), atol=1e-6)
        status, answer = post(url, {"inputs": [[1, 2, 3]]})
        assert status == 400 and "does not match expected shape (-1, 1, 8, 8)" in answer
        status, answer = post(url, {"inputs": [[[[300] * 8] * 8]]})
        assert status == 400
