"""Ray Tune over the classifiers of a plan, whose inputs are stored."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray import tune

from diffult_ray.build import build_one, first_line
from diffult_ray.cluster import Capacity
from diffult_ray.plan import Trial
from diffult_ray.progress import Narrator

if TYPE_CHECKING:
    from diffult_ray.store import Store

OnEnd = Callable[[Trial, str | None], None]

# A trial whose workers a TorchTrainer starts asks for no CPU: the workers have a placement group of
# their own, and any share here would leave too little for the last of them.
DRIVER_MEMORY = 256 * 2**20
RETRIES = 1  # of a trial whose process died; it goes on from its checkpoint


def run(
    trials: Sequence[Trial],
    store: Store,
    capacity: Capacity,
    narrator: Narrator,
    on_end: OnEnd,
    *,
    name: str,
    concurrency: int | None = None,
) -> None:
    """Train each trial's classifier.

    Args:
        trials: distinct, of which none is stored.
        on_end: called in the driver with a trial and None, or its error, when it has ended.
        concurrency: trials at a time; by default what fits.
    """
    if not trials:
        return
    table = {t.key: t for t in trials}
    each = trials[0].stage.resources
    fits = _fits(each, capacity)
    folder = store.root / "work" / f"tune-{name.replace('/', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    watcher = Watcher(table, store, narrator, on_end)
    trainable = tune.with_parameters(_trial, stages={k: t.stage for k, t in table.items()}, store=store)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _request(each)),
        param_space={"trial": tune.grid_search(list(table))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=min(fits, concurrency or fits),
            reuse_actors=each.workers == 1,
            trial_name_creator=lambda t: _file_name(table[t.config["trial"]]),
            trial_dirname_creator=lambda t: t.config["trial"],
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(folder),
            verbose=0,
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    )
    tuner.fit()
    watcher.settle()
    shutil.rmtree(folder, ignore_errors=True)


def _request(each: Any) -> dict[str, float]:
    if each.workers > 1:
        return {"memory": DRIVER_MEMORY}
    return {"CPU": each.cpus, **({"GPU": each.gpus} if each.gpus else {})}


def _fits(each: Any, capacity: Capacity) -> int:
    """How many trials run at once; Tune does not count what a nested trainer holds, so we do."""
    fits = capacity.cpus / (each.workers * each.cpus)
    if each.gpus:
        fits = min(fits, capacity.gpus / (each.workers * each.gpus))
    return max(1, int(fits + 1e-9))


def _trial(config: dict[str, Any], *, stages: dict[str, Any], store: Store) -> None:
    """One Tune trial: its classifier, in this process or under a nested TorchTrainer."""
    stage = stages[config["trial"]]
    found = store.locate(stage)
    artifact = found if found is not None else build_one(stage, store)
    tune.report({"accuracy": artifact.summary["accuracy"]})


def _file_name(trial: Trial) -> str:
    return trial.title.replace(" ", ",").replace("/", "_")[:80]


class Watcher(tune.Callback):
    """Lives in the driver and tells of every trial that ends."""

    def __init__(self, table: dict[str, Trial], store: Store, narrator: Narrator, on_end: OnEnd) -> None:
        self.table, self.store, self.narrator, self.on_end = table, store, narrator, on_end
        self.left, self.start = set(table), time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into the experiment's state, from which nothing is ever restored.
        return {}

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        self._end(trial.config["trial"], None)

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        if trial.status == "ERROR":
            error = trial.get_pickled_error() or trial.get_error()
            self._end(trial.config["trial"], first_line(error) if error else "its process died")

    def settle(self) -> None:
        """Whatever Tune has not told of has failed."""
        for key in sorted(self.left):
            self._end(key, "ended without a result")

    def _end(self, key: str, error: str | None) -> None:
        if key not in self.left:
            return
        self.left.remove(key)
        artifact = self.store.locate(self.table[key].stage)
        if artifact is None and error is None:
            error = "ended without a metric"
        self.on_end(self.table[key], error)
        done = len(self.table) - len(self.left)
        seconds = (time.monotonic() - self.start) * len(self.left) / done
        result = f"FAILED, {error}" if error else f"accuracy {artifact.summary['accuracy']:.1f}%"
        title = self.table[key].title
        self.narrator.trial(f"trial {done}/{len(self.table)} {title}: {result}", seconds, failed=bool(error))
