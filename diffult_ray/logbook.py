"""What a sweep tells MLflow, from a thread of the driver, so that logging never holds the work up."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray.errors import masked
from diffult_ray.plan import Plan

if TYPE_CHECKING:
    from diffult_ray.pipeline import Stage
    from diffult_ray.report import ReportData
    from diffult_ray.store import Artifact, Store

NOT_METRICS = frozenset({
    "trial", "method", "synthetic", "status", "seed", "params", "cell", "stages", "error",
    "per_class_accuracy", "per_class_fid", "generator", "quality", "quality_network",
})
PATIENCE = 30.0  # seconds of failing after which the store, not an entry, is taken to be at fault
PAUSE = 60.0  # seconds before it is asked again
LAST_WAIT = 10.0  # seconds that an interrupted sweep waits for the log

Entry = Callable[[], Any]


class NotLogged(Exception):
    """What went wrong with MLflow, in one line and without passwords."""


class Logbook:
    """The sweep as a parent run, its trials as children, one run a stage built; in order, once each.

    An entry that fails is kept and tried again, at the latest at the end: entries may be repeated.
    """

    def __init__(self, uri: str, plan: Plan, store: Store, folder: Path) -> None:
        self.plan, self.store, self.folder = plan, store, folder
        self.error: NotLogged | None = None
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._owed: list[Entry] = [lambda: self._open(uri)]
        self._again = 0.0  # when a store that failed is asked again
        self._tracker: Any = None
        # A daemon: an interrupted driver must not wait for a server that does not answer.
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def stage(self, stage: Stage, artifact: Artifact) -> None:
        """A stage that was built: its configuration, figures and curves."""
        self._queue.put(lambda: self._tracker.stage(
            stage=stage.name,
            key=stage.key,
            params=_flat(stage.config),
            metrics={**_numbers(artifact.summary), "seconds": artifact.seconds},
            history=_history(self.store, stage),
            tags={f"diffult.input.{name}": s.key for name, s in stage.inputs.items()},
        ))

    def trial(self, record: Mapping[str, Any]) -> None:
        """A trial that has ended, done or failed."""
        record = dict(record)
        self._queue.put(lambda: self._tracker.trial({
            **{k: record[k] for k in ("trial", "method", "status", "stages", "error")},
            "synthetic": record.get("synthetic"),
            "params": {**record["params"], "seed": record["seed"]},
            "metrics": {k: v for k, v in record.items() if k not in NOT_METRICS},
        }))

    def conclude(self, data: ReportData, status: str) -> Exception | None:
        """Log the report, the selected classifier and the end; wait until all is there.

        Returns:
            what went wrong, if anything is not logged: results are never lost for it.
        """
        self._queue.put(lambda: self._conclude(data))
        return self._end(status, None)

    def close(self, status: str) -> Exception | None:
        """End the parent run with a status, after what is queued; a killed sweep waits 10 seconds at most.

        Returns:
            what went wrong, if anything is not logged.
        """
        return self._end(status, LAST_WAIT if status == "KILLED" else None)

    def _end(self, status: str, wait: float | None) -> Exception | None:
        self._queue.put(lambda: self._tracker.finish(status))
        self._queue.put(None)
        self._thread.join(wait)
        if self._thread.is_alive():
            return self.error or NotLogged(f"MLflow took longer than {LAST_WAIT:g} seconds")
        return self.error

    def _work(self) -> None:
        self._settle()
        while (entry := self._queue.get()) is not None:
            self._owed.append(entry)
            if self._queue.empty() and time.monotonic() >= self._again:
                self._settle()
        if self._owed:
            self._settle()

    def _settle(self) -> None:
        """Log what is owed, in order. What fails stays owed; its error is kept until it is logged."""
        entries, left, lost = self._owed, [], 0.0
        errors: list[Exception] = []
        for i, entry in enumerate(entries):
            start = time.monotonic()
            try:
                entry()
            except Exception as error:
                errors.append(error)
                left.append(entry)
                lost += time.monotonic() - start
                if lost > PATIENCE or self._tracker is None:
                    left += entries[i + 1 :]
                    break
        self._owed = left
        self.error = _told(errors[0]) if errors else None
        self._again = time.monotonic() + PAUSE if errors else 0.0

    def _open(self, uri: str) -> None:
        from diffult_ray.tracking import SQLITE, Tracker, relocate

        # A server has its own place for files.
        folder = self.store.tracking_folder(self.plan.sweep.name) / "mlflow-artifacts"
        artifacts = None if uri.startswith("http") else str(folder)
        if folder.parent != self.store.root and uri == f"{SQLITE}{folder.parent}/mlflow.db":
            relocate(folder.parent / "mlflow.db", self.plan.sweep.name, folder)
        tracker = Tracker(uri=uri, experiment=self.plan.sweep.name, artifacts=artifacts)
        tracker.start(
            sweep=self.plan.sweep.name,
            sweep_id=self.plan.id,
            params=_flat(self.plan.sweep.experiment),
            sweep_yaml=(self.folder / "sweep.yaml").read_text(),
        )
        self._tracker = tracker

    def _conclude(self, data: ReportData) -> None:
        from diffult_ray.report import selected

        names = ["sweep.yaml", "results.parquet", "statistics.json", "report.html"]
        names += sorted(f"figures/{p.name}" for p in (self.folder / "figures").glob("*.png"))
        self._tracker.files(self.folder, names)
        cell = selected(data)
        chosen = next((t for t in self.plan.trials if t.cell == cell), None)
        if chosen is not None and self.store.find(chosen.stage):
            description = f"{chosen.title}: the first seed of the selected cell of {self.plan.sweep.name}"
            self._tracker.model(folder=self.store.folder(chosen.stage), description=description)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    return {k: v for k, v in values.items() if isinstance(v, int | float)}


def _told(error: Exception) -> NotLogged:
    told = NotLogged(masked(" ".join(f"{type(error).__name__}: {error}".split())))
    told.__cause__ = error
    return told


def _history(store: Store, stage: Stage) -> Any:
    import pandas as pd

    try:
        return pd.DataFrame(store.read_json(stage, "history.json"))
    except FileNotFoundError:
        return None
