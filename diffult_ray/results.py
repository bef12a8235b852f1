"""From artifacts to records and tables: one JSON a trial, one parquet row a trial, the report's data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffult_ray import files, footprint
from diffult_ray.plan import SEEDS, Plan, Trial

if TYPE_CHECKING:
    import pandas as pd

    from diffult_ray.report import ReportData
    from diffult_ray.store import Store

MEASURES = (
    "accuracy", "balanced_accuracy", "accuracy_many", "accuracy_medium", "accuracy_few",
    "validation_accuracy", "nll", "ece", "generated", "kept", "steps", "train_images",
)
COLUMNS_AFTER_SEARCHED = (
    "accuracy", "balanced_accuracy", "accuracy_many", "accuracy_medium", "accuracy_few", "generated",
    "kept", "p_id", "p_aid", "p_ood", "fid", "inception_score", "quality_network", "seconds",
    "validation_accuracy", "nll", "ece", "per_class_accuracy", "cell", "generator", "error",
    "kid", "precision", "recall", "memorised", "per_class_fid", "fid_images",
    "synthetic", "pool", "steps", "train_images", "memorised_expected", "agreement", *footprint.PEAKS,
)
OF_GENERATOR = ("fid", "inception_score", "kid", "precision", "recall", "per_class_fid")
OF_POOL = ("p_id", "p_aid", "p_ood", "memorised", "memorised_expected", "agreement")
GALLERY_IMAGES = 6


def sweep_folder(store: Store, name: str) -> Path:
    return store.root / "sweeps" / name


def record(trial: Trial, store: Store, error: str | None) -> dict[str, Any]:
    """All that is known of a trial that has ended."""
    artifact = store.locate(trial.stage)
    if artifact is None:
        return _base(trial, "failed", error or "ended without a result")
    summary = artifact.summary
    return {
        **_base(trial, "done", None),
        **{k: summary.get(k) for k in MEASURES},
        "per_class_accuracy": summary["per_class_accuracy"],
        "seconds": artifact.seconds,
        **artifact.peaks,
        **_of_pool(trial, store),
    }


def _base(trial: Trial, status: str, error: str | None) -> dict[str, Any]:
    return {
        "trial": trial.key,
        "method": trial.experiment.method,
        "synthetic": trial.experiment.synthetic,
        "status": status,
        "seed": trial.experiment.classifier.seed,
        "params": {k: _plain(v) for k, v in trial.point.items()},
        "cell": trial.cell,
        "stages": {s.name: s.key for s in trial.stage.walk()},
        "quality": trial.quality,
        "error": error,
    }


def _of_pool(trial: Trial, store: Store) -> dict[str, Any]:
    """Band shares and memorisation of the pool; FID, IS and the like of the generator."""
    upstream = {s.name: s for s in trial.upstream}
    if "quality" not in upstream:
        return {}
    scores, quality = store.locate(upstream["scores"]), store.locate(upstream["quality"])
    found: dict[str, Any] = {"generator": upstream["generator"].key, "pool": upstream["scores"].key}
    if scores:
        found |= {k: scores.summary.get(k) for k in OF_POOL}
    if quality:
        found |= {k: quality.summary[k] for k in OF_GENERATOR}
        found["quality_network"] = quality.summary["network"]
        found["fid_images"] = quality.summary["images"]
    return found


def write_record(found: Mapping[str, Any], store: Store, name: str) -> None:
    path = sweep_folder(store, name) / "trials" / f"{found['trial']}.json"
    files.write_json(path, found)
    store.push(path)


def read_record(trial: Trial, store: Store, name: str) -> dict[str, Any] | None:
    try:
        return files.read_json(sweep_folder(store, name) / "trials" / f"{trial.key}.json")
    except (FileNotFoundError, ValueError):
        return None


def table(plan: Plan, records: Mapping[str, Mapping[str, Any] | None]) -> pd.DataFrame:
    """`results.parquet`: one row a trial, in the order of the sweep, with docs' columns.

    A trial without a record was left for the budget: its status is `left`.
    """
    import pandas as pd

    rows = []
    for trial in plan.trials:
        found = records[trial.key] or _base(trial, "left", None)
        values = {k: found["params"].get(k) for k in plan.searched}
        known = {k: found.get(k) for k in ("trial", "method", "status", "seed", *COLUMNS_AFTER_SEARCHED)}
        rows.append({**known, **values})
    columns = ["trial", "method", "status", "seed", *plan.searched, *COLUMNS_AFTER_SEARCHED]
    frame = pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))  # `seed` may be searched itself
    for column in plan.searched:
        if any(isinstance(v, str) for v in frame[column]):
            frame[column] = _numbers_if_all_are(frame[column])
    return frame


def _numbers_if_all_are(column: pd.Series) -> pd.Series:
    """'inf' is how JSON keeps an infinite threshold."""
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    return numbers if (numbers.notna() == column.notna()).all() else column


def write_table(frame: pd.DataFrame, folder: Path) -> None:
    import io

    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    files.write_bytes(folder / "results.parquet", buffer.getvalue())


def report_data(
    plan: Plan, store: Store, frame: pd.DataFrame, built: Mapping[str, float], facts: dict[str, str]
) -> ReportData:
    """What the report shows of a sweep.

    Args:
        built: key -> seconds of the stages built in this run.
    """
    from diffult_ray.expected import matched
    from diffult_ray.report import ReportData, selected

    first = plan.trials[0]
    split = store.read_json(_stage(first, "split"), "split.json")
    data = ReportData(
        name=plan.sweep.name,
        description=plan.sweep.description,
        results=frame,
        searched=[k for k in plan.searched if k not in SEEDS],
        select=first.experiment.select,
        class_names=split["class_names"],
        class_counts=split["class_counts"],
        gallery={},
        stages=_stage_table(plan, store, built, frame),
        facts=facts,
        notes=[*_notes(plan, store), *_left(frame)],
        expected=matched(plan),
        differs=plan.sweep.differs,
    )
    cell = selected(data)
    chosen = next((t for t in plan.trials if t.cell == cell), None)
    if chosen is not None:
        data.gallery.update(gallery(chosen, store))
    return data


def _stage(trial: Trial, name: str) -> Any:
    return next(s for s in trial.stage.walk() if s.name == name)


def _notes(plan: Plan, store: Store) -> list[str]:
    """What a reader of the measures must know, each once."""
    measured = [store.locate(stage) for stage in plan.stages if stage.name == "quality"]
    return list(dict.fromkeys(note for m in measured if m for note in m.summary["notes"]))


def _left(frame: pd.DataFrame) -> list[str]:
    left = int((frame["status"] == "left").sum())
    return [f"{left} of {len(frame)} trials were left for the budget, and are not in here"] if left else []


def _stage_table(
    plan: Plan, store: Store, built: Mapping[str, float], frame: pd.DataFrame
) -> pd.DataFrame:
    import pandas as pd

    failed, rows = set(frame[frame["status"] == "failed"]["trial"]), []
    hit = {s.key for t in plan.trials if t.key in failed for s in t.upstream}
    for stage in plan.stages:
        artifact = store.locate(stage)
        rows.append({
            "stage": stage.name,
            "key": stage.key,
            "status": _status(artifact is not None, stage.key in built, stage.key in hit),
            "seconds": artifact.seconds if artifact else None,
            **{name: artifact.peaks.get(name) if artifact else None for name in footprint.PEAKS},
            "trials": plan.uses[stage.key],
        })
    return pd.DataFrame(rows, columns=["stage", "key", "status", "seconds", *footprint.PEAKS, "trials"])


def _status(stored: bool, built: bool, hit: bool) -> str:
    """Of a stage, of which trials that need it may have failed."""
    if stored:
        return "built" if built else "stored"
    return "failed" if hit else "left"


def gallery(trial: Trial, store: Store) -> dict[int, dict[str, np.ndarray]]:
    """Real images and generated ones by band, a few a class, as [n, H, W] or [n, H, W, 3]."""
    from diffult_ray.data import load_split
    from diffult_ray.stages.pool import decode, read_pool

    scores = next(s for s in trial.upstream if s.name == "scores")
    if store.find(scores) is None or store.find(_stage(trial, "split")) is None:
        return {}
    split = load_split(store.folder(_stage(trial, "split")))
    pool = read_pool(store.folder(scores))
    labels, bands = pool.column("label"), np.array(pool.table["band"].to_pylist(), dtype=object)
    shown = {}
    for c in range(split.num_classes):
        first = np.flatnonzero(split.train.labels == c)[:GALLERY_IMAGES]
        shown[c] = {"real": _pixels(split.pixels("train", first))}
        for band in ("ID", "AID", "OOD"):
            rows = np.flatnonzero((labels == c) & (bands == band))[:GALLERY_IMAGES]
            if len(rows):
                shown[c][band] = _pixels(decode(pool.table["image"].take(rows).to_pylist()))
    return shown


def _pixels(images: np.ndarray) -> np.ndarray:
    return images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value == float("inf"):
        return "inf"
    return list(value) if isinstance(value, tuple) else value
