"""Ray Tune over the classifiers of a plan, whose inputs are stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.search import BasicVariantGenerator

from diffult_ray.budget import Purse
from diffult_ray.build import build_one, first_line
from diffult_ray.cluster import Capacity
from diffult_ray.pace import Pace
from diffult_ray.placement import Watch, grown
from diffult_ray.plan import Trial
from diffult_ray.progress import QUIET, Narrator, clock, due
from diffult_ray.stages.training import FINAL

if TYPE_CHECKING:
    from diffult_ray.store import Store

OnEnd = Callable[[Trial, str | None], None]

# A trial whose workers a TorchTrainer starts asks for no CPU: the workers have a placement group of
# their own, and any share here would leave too little for the last of them.
DRIVER_MEMORY = 256 * 2**20
STEPS_A_LOOK = 50  # of Tune's, which take up to 0.1 s each
LOOKED_AT = 16  # trials of which it is read how far they are: in a remote storage that takes time
NAMED = 4  # of which each is told how far it is
RETRIES = 1  # of a trial whose process died; it goes on from its checkpoint


def run(
    trials: Sequence[Trial],
    store: Store,
    capacity: Capacity,
    narrator: Narrator,
    on_end: OnEnd,
    purse: Purse,
    *,
    name: str,
    concurrency: int | None = None,
) -> None:
    """Train each trial's classifier, as far as the budget goes.

    Args:
        trials: distinct, of which none is stored.
        on_end: called in the driver with a trial and None, or its error, when it has ended.
        purse: of what it cannot pay for, it is told.
        concurrency: trials at a time; by default what fits.
    """
    if not trials:
        return
    table = {t.key: t for t in trials}
    each = trials[0].stage.resources
    queue = Queue(table, purse, narrator)
    bound = Bound(queue, each, capacity, concurrency)
    folder = store.tune(name)
    store.site.remove(folder)
    place, system = store.site.storage(folder)

    def ended(trial: Trial, error: str | None) -> None:
        purse.settle([trial.stage])
        on_end(trial, error)

    watcher = Watcher(table, store, narrator, ended, at_once=lambda: queue.max_concurrent)
    trainable = tune.with_parameters(_trial, stages={k: t.stage for k, t in table.items()}, store=store)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _request(each)),
        param_space={"trial": tune.grid_search([{"key": t.key, "title": t.title} for t in trials])},
        tune_config=tune.TuneConfig(
            search_alg=queue,
            reuse_actors=each.workers == 1,
            trial_name_creator=_name,
            trial_dirname_creator=_key,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=place,
            storage_filesystem=system,
            verbose=0,
            callbacks=[watcher, bound],
            stop=bound.stopper,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    )
    tuner.fit()
    watcher.left -= {t.key for t in queue.left}
    watcher.settle(bound.refusal or "ended without a result")
    purse.leave([t.stage for t in queue.left])
    store.site.remove(folder)


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
    stage = stages[config["trial"]["key"]]
    found = store.locate(stage)
    try:
        artifact = found if found is not None else build_one(stage, store)
    except tuple(FINAL.values()) as error:  # again it would end alike
        tune.report({"error": first_line(error)})
    else:
        tune.report({"accuracy": artifact.summary["accuracy"]})


def _percent(shares: Sequence[float]) -> str:
    """
    >>> _percent([0.1, 0.125]), _percent([0.1, 0.2, 0.2, 0.3, 0.4])
    (' (10%, 12%)', ' (10% to 40%)')
    """
    told = [f"{int(100 * share)}%" for share in shares]
    if len(told) > NAMED:
        told = [f"{told[0]} to {told[-1]}"]
    return f" ({', '.join(told)})" if told else ""


# Tune pickles these two into the state of every trial, which it writes again and again: one that refers to
# all trials would take memory by the square of their number. So a trial's configuration holds its title.


def _name(trial: Any) -> str:
    """What Ray's dashboard calls it."""
    return trial.config["trial"]["title"].replace(" ", ",").replace("/", "_")[:80]


def _key(trial: Any) -> str:
    return trial.config["trial"]["key"]


class Queue(BasicVariantGenerator):
    """Hands trials to Tune in their order, each when the budget lets it start."""

    def __init__(self, table: Mapping[str, Trial], purse: Purse, narrator: Narrator) -> None:
        super().__init__()
        self.table, self.purse, self.narrator = table, purse, narrator
        self.left: list[Trial] = []
        self._next: Any = None

    def next_trial(self) -> Any:
        """The next trial; None until one that runs has ended, perhaps sooner than was estimated."""
        while True:
            self._next = self._next or super().next_trial()
            if self._next is None:
                return None
            trial = self.table[_key(self._next)]
            if self.purse.take([trial.stage]):
                found, self._next = self._next, None
                return found
            reason = self.purse.lacks([trial.stage])
            if reason is None:
                return None
            self._leave(trial, reason)

    def _leave(self, trial: Trial, reason: str) -> None:
        if not self.left:
            self.narrator.say(f"trial {trial.title}: left, {reason}")
        self.left.append(trial)
        self.on_trial_complete(self._next.trial_id)
        self._next = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as of the Watcher

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Nothing is ever restored from it."""


class Bound(tune.Callback):
    """Lives in the driver, lets as many trials run as the cluster holds, and ends what has no place.

    Tune counts what a trial itself asks for, so that with one worker a trial too many waits; of those
    that a nested trainer starts it knows nothing, and Train places them all together or none.
    """

    def __init__(
        self, search: Queue, each: Any, capacity: Capacity, most: int | None
    ) -> None:
        self.search, self.each, self.capacity, self.most = search, each, capacity, most
        self.watch, self.refusal = Watch(each), None
        self._follow()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as of the watcher

    def on_step_begin(self, iteration, trials, **info) -> None:
        if iteration % STEPS_A_LOOK == 0:
            self._follow()
        self.refusal = self.refusal or self.watch.refusal()

    def _follow(self) -> None:
        fits = _fits(self.each, grown(self.capacity))
        self.search.max_concurrent = min(fits, self.most or fits)

    @property
    def stopper(self) -> tune.Stopper:
        return Hopeless(self)


class Hopeless(tune.Stopper):
    """Ends all trials once none has a place."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.bound.refusal is not None


class Watcher(tune.Callback):
    """Lives in the driver and tells of every trial that ends, and now and then how far the others are.

    Args:
        at_once: how many trials run at a time.
    """

    def __init__(
        self, table: dict[str, Trial], store: Store, narrator: Narrator, on_end: OnEnd,
        at_once: Callable[[], int],
    ) -> None:
        self.table, self.store, self.narrator, self.on_end = table, store, narrator, on_end
        self.left = set(table)
        self._began = self._told = time.monotonic()
        self.pace = Pace(len(table), at_once, self._began)

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into the experiment's state, from which nothing is ever restored.
        return {}

    def on_step_begin(self, iteration, trials, **info) -> None:
        now = time.monotonic()
        if due(now - self._began, self._told - self._began, QUIET):
            self._told = now
            self._tell([_key(t) for t in trials if t.status == "RUNNING"])

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        self._end(_key(trial), trial.last_result.get("error"))

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        if trial.status == "ERROR":
            error = trial.get_pickled_error() or trial.get_error()
            self._end(_key(trial), first_line(error) if error else "its process died")

    def settle(self, error: str) -> None:
        """Whatever Tune has not told of has failed."""
        for key in sorted(self.left):
            self._end(key, error)

    def _end(self, key: str, error: str | None) -> None:
        if key not in self.left:
            return
        self.left.remove(key)
        self._told = now = time.monotonic()
        artifact = self.store.locate(self.table[key].stage)
        if artifact is None and error is None:
            error = "ended without a metric"
        self.on_end(self.table[key], error)
        seconds = None if error else artifact.summary.get("train_seconds") or artifact.seconds
        left = self.pace.end(key, now, seconds=seconds)
        result = f"FAILED, {error}" if error else f"accuracy {artifact.summary['accuracy']:.1f}%"
        which = f"trial {self.pace.ended}/{len(self.table)} {self.table[key].title}"
        self.narrator.trial(f"{which}: {result}", left, failed=bool(error))

    def _tell(self, running: Sequence[str]) -> None:
        shares = {key: self._share(key) for key in running[:LOOKED_AT]}
        parts = [f"trials: {self.pace.ended} of {len(self.table)} ended"]
        parts.append(f"{len(running) or 'none'} at work{_percent(sorted(shares.values()))}")
        if (seconds := self.pace.look(shares, len(running), time.monotonic())) is not None:
            parts.append(f"about {clock(seconds)} left")
        self.narrator.say(", ".join(parts))

    def _share(self, key: str) -> float:
        """Of a trial's steps, those that are done."""
        told = self.store.progress(self.table[key].stage)
        return told["done"] / told["total"] if told else 0.0
