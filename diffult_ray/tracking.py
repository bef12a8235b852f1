"""MLflow: a sweep is a parent run, each trial and stage built a child, the selected classifier a model.

Every method may be called again with the same arguments: it finds by tag what it logged before, and
completes it. No tracking URI is set for the process; mlflow is imported when it is first needed.
"""

from __future__ import annotations

import getpass
import hashlib
import http.client
import json
import logging
import math
import os
import queue
import shlex
import sqlite3
import ssl
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from diffult_ray import files
from diffult_ray.config import NAMED, variant
from diffult_ray.errors import BadInput, masked

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

SECONDS_TO_ANSWER = 4.5
SQLITE = "sqlite:///"
MODEL = "classifier"
PARAMS_A_BATCH, METRICS_A_BATCH = 100, 1000  # mlflow.utils.validation
LONGEST = {"param": 6000, "tag": 8000, "name": 250}
PLACES = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
_CREATING = threading.Lock()  # migrations keep their state in globals
STATUS = {"done": "FINISHED", "failed": "FAILED"}

# Set where the user has not set them, before mlflow is imported.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised; a log line would only double it
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # would run `uv export` where a uv.lock lies in the current folder
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # 7 take minutes; `Logbook` asks again later
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


# --- before the sweep ---------------------------------------------------------------------------


def check(uri: str) -> None:
    """Refuse a store that cannot be used; nothing is created. An unreachable server takes 5 seconds at most.

    Raises:
        BadInput: naming `tracking.uri`, with any password masked.
    """
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme == "sqlite":
        _check_sqlite(uri)
    else:
        kind = "a folder is refused by MLflow" if scheme in ("", "file") else f"no store for {scheme}://"
        raise _refusal(
            uri,
            "is sqlite:////absolute/path.db or the http(s):// address of an MLflow server",
            f"{kind}; leave it out for a file in the storage folder",
        )


def ui_command(uri: str) -> str:
    """What opens the user interface: a command for a file, the address of a server."""
    if uri.startswith("sqlite:"):
        return f"mlflow ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1"
    return masked(uri)


def _refusal(uri: str, rule: str, advice: str) -> BadInput:
    advice = f"{masked(advice)}; or `tracking.enabled=false`"
    return BadInput(where="tracking.uri", rule=rule, value=masked(uri), advice=advice)


def _check_sqlite(uri: str) -> None:
    path = _database(uri)
    if path is None:
        advice = "write four slashes: sqlite:////absolute/path.db"
        raise _refusal(uri, "an sqlite store is a file with an absolute path", advice)
    try:
        _try_database(path)
    except OSError as error:
        advice = f"{error.strerror or error}; name a file that can be written"
        raise _refusal(uri, "the database can be written", advice) from error


def _database(uri: str) -> Path | None:
    """The file of an sqlite URI, if its path is absolute."""
    path = uri.removeprefix(SQLITE).partition("?")[0]
    absolute = uri.startswith(SQLITE + "/") and not path.endswith("/")
    return Path(path) if absolute else None


def _try_database(path: Path) -> None:
    if path.exists():
        with open(path, "r+b") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                raise OSError("the file is not an SQLite database")
    folder = next(p for p in path.parents if p.exists())
    with tempfile.TemporaryFile(dir=folder):  # SQLite keeps its journal beside the file
        pass


def _check_server(uri: str) -> None:
    try:
        within(SECONDS_TO_ANSWER, lambda: _reach(uri))
    except (OSError, ValueError, http.client.HTTPException) as error:
        advice = f"{getattr(error, 'reason', None) or error}; start it or correct the address"
        raise _refusal(uri, "the MLflow server can be reached", advice) from error
    try:
        status = within(2 * SECONDS_TO_ANSWER, _question(uri))
    except Exception as error:
        raise _refusal(uri, "the server answers as MLflow does", _first_line(error)) from error
    if status in (401, 403):
        advice = f"HTTP {status}; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise _refusal(uri, "the server lets you in", f"{advice}, or MLFLOW_TRACKING_TOKEN")
    if status != 200:
        raise _refusal(uri, "the server answers as MLflow does", f"HTTP {status}; correct the address")


def _reach(uri: str) -> None:
    """Any HTTP answer is one. Certificates are MLflow's to check, by its own settings.

    Raises:
        OSError, ValueError or HTTPException: if none comes.
    """
    parts = urlsplit(uri)
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        urllib.request.urlopen(f"{bare}/health", timeout=SECONDS_TO_ANSWER, context=context).close()
    except urllib.error.HTTPError as answer:
        answer.close()


def _question(uri: str) -> Callable[[], int]:
    """A first request with MLflow's own credentials, asked once: the HTTP status of the answer."""
    _prepare()
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    def ask() -> int:
        answer = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search", "GET",
            params={"max_results": 1}, max_retries=0, timeout=SECONDS_TO_ANSWER, raise_on_status=False,
        )
        return answer.status_code if answer.status_code != 200 or _is_object(answer.text) else 404

    return ask


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call, name resolution included, which has no time limit of its own.

    Raises:
        TimeoutError: if it takes longer; and what the call raises.
    """
    results: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- the store ----------------------------------------------------------------------------------


def _prepare() -> None:
    """Everything that keeps mlflow quiet and off the network; a user's own settings stand."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  sets its loggers up, and would undo what follows

    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line a retry


def _connect(uri: str, artifacts: str | None) -> MlflowClient:
    _prepare()
    from mlflow import MlflowClient

    path = _database(uri)
    if path is not None and not path.exists():
        _create_database(path, artifacts or str(path.parent / "mlflow-artifacts"))
    return MlflowClient(tracking_uri=uri)


def _create_database(path: Path, artifacts: str) -> None:
    """A new database appears whole, so that an interruption leaves none that is half migrated.

    Not synchronised statement by statement: MLflow's migrations take 0.6 s in place of 4 to 7.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import Engine, event

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent.resolve() / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"

    def hurry(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection) and _file_of(connection) == str(draft):
            connection.execute("PRAGMA synchronous = OFF")

    with _CREATING:
        event.listen(Engine, "connect", hurry)
        try:
            SqlAlchemyStore(SQLITE + str(draft), _as_uri(artifacts)).engine.dispose()
            _publish(draft, path)
        finally:
            event.remove(Engine, "connect", hurry)
            draft.unlink(missing_ok=True)


def relocate(path: Path, experiment: str, artifacts: Path) -> None:
    """A database that came from another machine: its files are in this folder here."""
    if not path.exists():
        return
    with sqlite3.connect(path) as database:
        asked = "SELECT artifact_location FROM experiments WHERE name = ?"
        (before,) = database.execute(asked, (experiment,)).fetchone() or (None,)
        after = _as_uri(str(artifacts))
        if before in (None, after):
            return
        for table, column in PLACES.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (before, after))
    database.close()


def _file_of(connection: sqlite3.Connection) -> str:
    return connection.execute("PRAGMA database_list").fetchone()[2]


def _publish(draft: Path, path: Path) -> None:
    """Put the file in its place, unless another sweep was faster."""
    with open(draft, "rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except OSError:  # it is there, or there are no hard links here: MLflow then makes its own
        return


def _as_uri(place: str) -> str:
    return place if "://" in place else Path(place).expanduser().absolute().as_uri()


# --- what is logged -----------------------------------------------------------------------------


class Tracker:
    """Runs of one sweep in one experiment, which is made, or restored, if need be.

    Args:
        uri: an sqlite file or a server, as `check` allows.
        experiment: its name.
        artifacts: where a new experiment keeps its files; None leaves it to the server.

    Raises:
        mlflow.exceptions.MlflowException: from every method, when the store fails.
    """

    def __init__(self, *, uri: str, experiment: str, artifacts: str | None = None) -> None:
        self._client = _connect(uri, artifacts)
        self._experiment = self._find_or_create(experiment, artifacts and _as_uri(artifacts))
        self._parent = ""

    def start(self, *, sweep: str, sweep_id: str, params: Mapping[str, Any], sweep_yaml: str) -> None:
        """Make the parent run, or go on with the one of this sweep's id."""
        run = self._find("diffult.sweep_id", sweep_id)
        if run is None:
            tags = {"diffult.sweep_id": sweep_id, "diffult.sweep": sweep, **_user()}
            run = self._client.create_run(self._experiment, run_name=sweep, tags=_tags(tags))
        elif run.info.status != "RUNNING":
            self._client.update_run(run.info.run_id, status="RUNNING")
        self._parent = run.info.run_id
        self._log(run, _texts(params), {})
        self._client.log_text(self._parent, sweep_yaml, "sweep.yaml")

    def stage(
        self,
        *,
        stage: str,
        key: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, Any],
        history: pd.DataFrame | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """One run for a stage that was built, unless this experiment has it.

        Args:
            history: columns `step`, `seconds` (since the start: the curves' time axis) and the curves.
        """
        if self._finished(list(self._search("diffult.key", key))):
            return
        own = {"diffult.stage": stage, "diffult.key": key, **(tags or {})}
        run = self._create(f"{stage} {key[:8]}", own, metrics.get("seconds"))
        curves = list(_curves(history))
        texts, numbers = _sorted_out(params, metrics)
        drawn = {point.key for point in curves}  # their last point is what the summary says
        self._log(run, texts, {k: v for k, v in numbers.items() if k not in drawn}, curves)
        self._client.set_terminated(run.info.run_id, "FINISHED")

    def trial(self, record: Mapping[str, Any]) -> None:
        """One run for a trial, the same one when it is told again: a failed one may be done later.

        Args:
            record: trial, method, status (done or failed), stages (name -> key), error, params, metrics;
                synthetic, where it is known.
        """
        tags = _trial_tags(record)
        run = self._find("diffult.trial", record["trial"], child=True)
        if run is None:
            run = self._create(_title(record), tags, record["metrics"].get("seconds"))
        texts, numbers = _sorted_out(record["params"], record["metrics"])
        self._log(run, texts, numbers, tags=tags)
        for gone in {"diffult.error"} & set(run.data.tags) - set(tags):
            self._client.delete_tag(run.info.run_id, gone)
        if run.info.status != STATUS[record["status"]]:
            self._client.set_terminated(run.info.run_id, STATUS[record["status"]])

    def files(self, folder: str | Path, names: Sequence[str]) -> None:
        """Files of the sweep as artifacts of the parent run, in the subfolders of their names.

        Raises:
            FileNotFoundError: if one is missing.
        """
        for name in names:
            inside = Path(name).parent.as_posix()
            place = None if inside == "." else inside
            self._client.log_artifact(self._parent, str(Path(folder) / name), place)

    def model(self, *, folder: str | Path, description: str) -> None:
        """The classifier in a folder as a model of the parent run: `runs:/RUN/classifier`, once.

        Raises:
            FileNotFoundError: if `model.json` or `model.safetensors` is missing.
        """
        digest = _digest(Path(folder))
        if self._client.get_run(self._parent).data.tags.get("diffult.model") == digest:
            return
        tags = {"diffult.model": digest, "mlflow.note.content": description}
        made = self._client.create_logged_model(
            self._experiment, name=MODEL, source_run_id=self._parent, tags=_tags(tags)
        )
        try:
            self._upload(made, Path(folder), description)
        except Exception:
            self._client.finalize_logged_model(made.model_id, "FAILED")
            raise
        self._client.set_tag(self._parent, "diffult.model", digest)

    def finish(self, status: str) -> None:
        """End the parent run: 'FINISHED', 'FAILED' or 'KILLED'."""
        self._client.set_terminated(self._parent, status)

    # --- runs ---

    def _find_or_create(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, artifact_location=artifacts)
            except MlflowException:  # another sweep was faster
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _search(self, tag: str, value: str, child: bool = False) -> Sequence[Run]:
        wanted = f"tags.`{tag}` = '{value}'"
        if child:
            wanted += f" and tags.`mlflow.parentRunId` = '{self._parent}'"
        return self._client.search_runs([self._experiment], wanted, order_by=["attributes.start_time ASC"])

    def _find(self, tag: str, value: str, child: bool = False) -> Run | None:
        """The run with a tag; a second one is of a request that was sent again, and goes."""
        first, *others = self._search(tag, value, child) or [None]
        for other in others:
            self._client.delete_run(other.info.run_id)
        return first

    def _finished(self, runs: Sequence[Run]) -> bool:
        """Whether one of the runs of a stage is whole; the others are removed."""
        whole = next((run for run in runs if run.info.status == "FINISHED"), None)
        for run in runs:
            if run is not whole:
                self._client.delete_run(run.info.run_id)
        return whole is not None

    def _create(self, name: str, tags: Mapping[str, str], seconds: float | None) -> Run:
        """A child run that started `seconds` ago."""
        began = _now() - int(1000 * (seconds or 0))
        tags = _tags({**tags, "mlflow.parentRunId": self._parent, **_user()})
        name = name[: LONGEST["name"]]
        return self._client.create_run(self._experiment, start_time=began, tags=tags, run_name=name)

    def _log(
        self,
        run: Run,
        texts: Mapping[str, str],
        numbers: Mapping[str, float],
        curves: Sequence[Metric] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """What the run does not have yet; a param that it has stays, for MLflow lets none be changed."""
        from mlflow.entities import Metric, Param, RunTag

        now, known = _now(), run.data
        params = [Param(k, v) for k, v in texts.items() if k not in known.params]
        points = [Metric(k, v, now, 0) for k, v in numbers.items() if known.metrics.get(k) != v]
        points += curves
        changed = [RunTag(k, v) for k, v in _tags(tags or {}).items() if known.tags.get(k) != v]
        for part in _batches(params, points, changed):
            self._client.log_batch(run.info.run_id, **part)

    def _upload(self, made: Any, folder: Path, description: str) -> None:
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        origin = Model(
            artifact_path=made.artifact_location, run_id=self._parent,
            model_uuid=made.model_id, model_id=made.model_id,
        )
        with tempfile.TemporaryDirectory() as temporary:
            _save_model(Path(temporary) / MODEL, folder, description, origin)
            self._client.log_model_artifacts(made.model_id, str(Path(temporary) / MODEL))
        self._client.log_outputs(self._parent, [LoggedModelOutput(made.model_id, step=0)])
        self._client.finalize_logged_model(made.model_id, "READY")


def _batches(params: list, points: list, tags: list) -> Iterator[dict[str, list]]:
    """As few requests as MLflow's limits allow: one for most runs."""
    if len(params) <= PARAMS_A_BATCH and len(params) + len(points) + len(tags) <= METRICS_A_BATCH:
        if params or points or tags:
            yield {"params": params, "metrics": points, "tags": tags}
        return
    for i in range(0, len(params), PARAMS_A_BATCH):
        yield {"params": params[i : i + PARAMS_A_BATCH]}
    for i in range(0, len(points), METRICS_A_BATCH):
        yield {"metrics": points[i : i + METRICS_A_BATCH]}
    if tags:
        yield {"tags": tags}


def _sorted_out(
    params: Mapping[str, Any], metrics: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, float]]:
    """Texts and finite numbers; an infinity is told as text, which MLflow's stores keep as it is."""
    numbers = {k: float(v) for k, v in metrics.items() if _is_finite(v)}
    return {**_texts({k: v for k, v in metrics.items() if k not in numbers}), **_texts(params)}, numbers


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {k: str(v)[: LONGEST["param"]] for k, v in values.items() if not _is_missing(v)}


def _tags(values: Mapping[str, str]) -> dict[str, str]:
    return {k: str(v)[: LONGEST["tag"]] for k, v in values.items()}


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, Real) and math.isnan(value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _curves(history: pd.DataFrame | None) -> Iterator[Metric]:
    """Every number of every row at its step, and at the time that `seconds` gives."""
    from mlflow.entities import Metric

    rows = [] if history is None else history.to_dict("records")
    end = _now() - int(1000 * rows[-1].get("seconds", 0)) if rows else 0
    for row in rows:
        at = end + int(1000 * row.get("seconds", 0))
        for name, value in row.items():
            if name not in ("step", "seconds") and _is_finite(value):
                yield Metric(name, float(value), at, int(row["step"]))


def _trial_tags(record: Mapping[str, Any]) -> dict[str, str]:
    tags = {"diffult.trial": record["trial"], "diffult.method": record["method"]}
    tags |= {f"diffult.stage.{name}": key for name, key in record["stages"].items()}
    if record.get("synthetic") is not None:
        tags["diffult.synthetic"] = str(record["synthetic"]).lower()
    return tags | ({"diffult.error": record["error"]} if record.get("error") else {})


def _title(record: Mapping[str, Any]) -> str:
    """The method and the last parts of the other params: `diffult threshold=1.0 seed=0`."""
    shown = {k: v for k, v in record["params"].items() if k not in NAMED and not _is_missing(v)}
    values = {k.rpartition(".")[2]: v for k, v in shown.items()}
    name = variant(record["method"], record.get("synthetic"))
    return " ".join([name, *(f"{k}={v}" for k, v in values.items())])


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container's user may have no name
        return {}


def _now() -> int:
    return int(1000 * time.time())


# --- the model ----------------------------------------------------------------------------------


def _save_model(path: Path, folder: Path, description: str, origin: Any) -> None:
    """The two files, the package's code and `serving.py` as an MLflow model."""
    from mlflow import pyfunc

    package, facts = Path(__file__).parent, files.read_json(folder / "model.json")
    signature, example = _signature(facts)
    pyfunc.save_model(
        path=str(path),
        mlflow_model=origin,
        python_model=str(package / "serving.py"),
        code_paths=[str(package)],
        artifacts={"facts": str(folder / "model.json"), "weights": str(folder / "model.safetensors")},
        signature=signature,
        input_example=example,
        pip_requirements=_requirements(),
        metadata={"description": description, "class_names": facts.get("class_names")},
    )


def _signature(facts: Mapping[str, Any]) -> tuple[Any, Any]:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape = (facts["channels"], facts["image_size"], facts["image_size"])
    images = Schema([TensorSpec(np.dtype("uint8"), (-1, *shape))])
    probabilities = Schema([TensorSpec(np.dtype("float32"), (-1, facts["num_classes"]))])
    return ModelSignature(images, probabilities), np.zeros((1, *shape), dtype=np.uint8)


def _requirements() -> list[str]:
    """Installed versions, without the build (`+cpu`), which package indexes do not serve."""
    from importlib.metadata import version

    return [f"{p}=={version(p).partition('+')[0]}" for p in ("mlflow", "numpy", "safetensors", "torch")]


def _digest(folder: Path) -> str:
    parts = (folder / name for name in ("model.json", "model.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in parts)).hexdigest()[:16]
