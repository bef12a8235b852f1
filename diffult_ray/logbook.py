"""What a sweep tells MLflow, from a thread of the driver, so that logging never holds the work up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.plan import Plan

if TYPE_CHECKING:
    from diffult_ray.pipeline import Stage
    from diffult_ray.report import ReportData
    from diffult_ray.store import Artifact, Store

NOT_METRICS = frozenset({
    "trial", "method", "status", "seed", "params", "cell", "stages", "error", "per_class_accuracy",
    "generator", "quality_network",
})


class Logbook:
    """The sweep as a parent run, its trials as children, one run a stage built; in order, once each."""

    def __init__(self, uri: str, plan: Plan, store: Store, folder: Path) -> None:
        self.plan, self.store, self.folder = plan, store, folder
        self._queue: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self.error: Exception | None = None
        self._tracker: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._queue.put(lambda: self._open(uri))

    def stage(self, stage: Stage, artifact: Artifact) -> None:
        """A stage that was built: its configuration, figures and curves."""
        numbers = {k: v for k, v in artifact.summary.items() if isinstance(v, int | float)}
        self._queue.put(lambda: self._tracker.stage(
            stage=stage.name,
            key=stage.key,
            params=_flat(stage.config),
            metrics={**numbers, "seconds": artifact.seconds},
            history=_history(artifact.folder),
            tags={f"diffult.input.{name}": s.key for name, s in stage.inputs.items()},
        ))

    def trial(self, record: Mapping[str, Any]) -> None:
        """A trial that has ended, done or failed."""
        metrics = {k: v for k, v in record.items() if k not in NOT_METRICS and v is not None}
        told = {k: record[k] for k in ("trial", "method", "status", "stages", "error")}
        params = {**record["params"], "seed": record["seed"]}
        self._queue.put(lambda: self._tracker.trial({**told, "params": params, "metrics": metrics}))

    def conclude(self, data: ReportData, status: str) -> Exception | None:
        """Log the report, the selected classifier and the end; wait until all is there.

        Returns:
            what went wrong, if logging did: results are never lost for it.
        """
        self._queue.put(lambda: self._conclude(data))
        return self.close(status)

    def close(self, status: str) -> Exception | None:
        """End the parent run with a status, after what is queued."""
        self._queue.put(lambda: self._tracker.finish(status))
        self._queue.put(None)
        self._thread.join()
        return self.error

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            if self.error is None:
                try:
                    task()
                except Exception as error:  # told at the end; the sweep goes on
                    self.error = error

    def _open(self, uri: str) -> None:
        from diffult_ray.tracking import Tracker

        artifacts = str(self.store.root / "mlflow-artifacts") if uri.startswith("sqlite") else None
        self._tracker = Tracker(uri=uri, experiment=self.plan.sweep.name, artifacts=artifacts)
        self._tracker.start(
            sweep=self.plan.sweep.name,
            sweep_id=self.plan.id,
            params=_flat(self.plan.sweep.experiment),
            sweep_yaml=(self.folder / "sweep.yaml").read_text(),
        )

    def _conclude(self, data: ReportData) -> None:
        from diffult_ray.report import selected

        names = ["sweep.yaml", "results.parquet", "report.html"]
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


def _history(folder: Path) -> Any:
    import pandas as pd

    path = folder / "history.json"
    return pd.DataFrame(files.read_json(path)) if path.exists() else None
