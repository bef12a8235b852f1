"""The front door.

    python -m diffult_ray.sweep                       # the shipped sweep `digits`
    python -m diffult_ray.sweep my.yaml generator.steps=2000 --plan
    python -m diffult_ray.sweep cifar100_lt/fid_accuracy --overlay smoke
    ray job submit -- python -m diffult_ray.sweep digits --storage /shared/diffult

Running the same command again continues what is unfinished; a finished sweep prints its results.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffult_ray import __version__, config, definition, files, foreseen, interruption, metrics, supervisor
from diffult_ray.budget import OverBudget, Purse
from diffult_ray.costs import Costs
from diffult_ray.errors import BadInput, Refused, masked
from diffult_ray.plan import Plan, make_plan, text
from diffult_ray.progress import Narrator
from diffult_ray.store import Store, open_store

if TYPE_CHECKING:
    from diffult_ray.cluster import Capacity
    from diffult_ray.pipeline import Stage
    from diffult_ray.plan import Trial

DONE, SOME_FAILED, SOME_LEFT = 0, 1, 4
UNDONE = {"failed": SOME_FAILED, "left": SOME_LEFT}  # status of a trial -> exit code, the first that applies
ENDS = {DONE: "FINISHED", SOME_FAILED: "FAILED", SOME_LEFT: "KILLED"}  # of the sweep's run in MLflow

# What a storage answers that is full, or away for a while.
AWAY = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.ELOOP}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep; returns the exit code."""
    interruption.listen()
    try:
        return _main(_parser().parse_intermixed_args(argv))
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code
    except OSError as error:
        if error.errno not in AWAY:
            raise
        print(f"error: the storage failed: {error}; the same command continues", file=sys.stderr)
        return SOME_FAILED
    except KeyboardInterrupt:
        interruption.heard()
        print(supervisor.HINT, file=sys.stderr)
        return supervisor.INTERRUPTED


def run() -> int:
    """The command: `main`, watched from outside."""
    return supervisor.supervise(main, _tidy_leases)


def _tidy_leases() -> None:
    """Those of a driver that did not come to release them: nobody has to wait for them."""
    with suppress(Exception):  # whoever comes next removes them as well
        open_store(_storage(_parser().parse_intermixed_args())).tidy_leases()


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, as the rest of the front door does."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(where="command line", rule=message, advice="--help shows the options")


def _parser() -> Parser:
    parser = Parser(
        prog="diffult-ray",
        description="Run a DiffuLT sweep on Ray, or continue it.",
        epilog="exit: 0 all trials done, 1 some failed, 2 bad input, 3 does not fit, 4 some left for the "
        "budget, 130 interrupted",
    )
    parser.add_argument("sweep", nargs="?", default=None, help="a file or the name of a shipped sweep")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys to override")
    parser.add_argument("--overlay", metavar="NAME|FILE", help="another scale or set, such as smoke")
    parser.add_argument("--plan", action="store_true", help="show what would be built; start nothing")
    parser.add_argument("--storage", help="folder of all results (DIFFULT_STORAGE, else ~/diffult)")
    parser.add_argument("--address", help="Ray cluster to join (RAY_ADDRESS, else one is started here)")
    parser.add_argument("--verbose", action="store_true", help="let Ray's own messages through")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _main(arguments: argparse.Namespace) -> int:
    name, overrides = arguments.sweep, list(arguments.overrides)
    if name is not None and "=" in name and not os.path.exists(name):
        name, overrides = None, [name, *overrides]
    sweep = config.load("digits" if name is None else name, overrides, arguments.overlay)
    plan = make_plan(sweep)
    store = open_store(_storage(arguments))
    if arguments.plan:
        for line in text(plan, store):
            print(line)
        return DONE
    return Session(plan, store, arguments, _command(name, overrides, arguments)).run()


def _storage(arguments: argparse.Namespace) -> str:
    return arguments.storage or os.environ.get("DIFFULT_STORAGE") or "~/diffult"


def _command(name: str | None, overrides: Sequence[str], arguments: argparse.Namespace) -> str:
    """As the report and MLflow show it: a password that was typed is not in it."""
    words = ["python", "-m", "diffult_ray.sweep", *([name] if name else []), *overrides]
    if arguments.overlay:
        words += ["--overlay", arguments.overlay]
    if arguments.storage:
        words += ["--storage", arguments.storage]
    return shlex.join(map(masked, words))


class Session:
    """One run of the front door over a plan."""

    def __init__(self, plan: Plan, store: Store, arguments: argparse.Namespace, command: str) -> None:
        self.plan, self.store, self.arguments, self.command = plan, store, arguments, command
        self.narrator = Narrator()
        self.built: dict[str, float] = {}
        self.purse = Purse(Costs(plan, store), lambda: self.narrator.seconds)
        self.tracker: Any = None

    def run(self) -> int:
        self.store.pull(self.folder)
        records = self._stored_records()
        if self._is_finished(records):
            self._print_results()
            return DONE
        definition.check(self.plan.sweep, self.folder, self.store.shown(self.folder))
        self.store.check()
        for stage in self._needed(records):
            self.store.look(stage)  # what a newer version wrote is refused before anything is written
        self._check_request()
        self._check_weights(records)
        uri = self._tracking_uri()
        with self.store.hold(self._presence(), self.narrator.say):
            # Again: another driver of this sweep may have been waited for.
            self.store.pull(self.folder)
            return self._run(self._stored_records(), uri)

    def _run(self, records: dict[str, dict[str, Any]], uri: str | None) -> int:
        if self._is_finished(records):
            self._print_results()
            return DONE
        definition.check(self.plan.sweep, self.folder, self.store.shown(self.folder))
        self._remove_temporary()
        self._build_splits(records)
        foreseen.check((t for t in self.plan.trials if t.key not in records), self.store)
        self._check_measures(records)
        try:
            self._build(records, uri)
            self._disconnect()
            self._tidy()
            return self._conclude()
        except BaseException as error:
            interruption.heard()
            interrupted = isinstance(error, KeyboardInterrupt)
            if self.tracker:
                self.tracker.close("KILLED" if interrupted else "FAILED")
                with suppress(OSError):
                    self.store.push(self.folder)
            if not (interrupted and supervisor.watched):  # else threads may be within Ray
                self._disconnect()
            raise

    def _presence(self) -> dict[str, dict[str, Any]]:
        """One driver a sweep; for its lease the store keeps what the sweep needs."""
        name = self.plan.sweep.name
        needs = {"sweep": name, "needs": [s.key for s in self.plan.stages]}
        return {f"sweep-{name.replace('/', '-')}": needs}

    def _remove_temporary(self) -> None:
        """What a killed driver was writing: of this sweep, and of the store if nobody else uses it."""
        for folder in (self.folder, self.folder / "trials", self.folder / "figures"):
            files.remove_temporary(folder, ".*.tmp")
        found = list(self.store.root.glob(".*.tmp*"))
        if {each["pid"] for each in self.store.leases_now()[0]} == {os.getpid()}:
            for path in found:
                path.unlink(missing_ok=True)

    def _tidy(self) -> None:
        from diffult_ray import build

        build.tidy([*self.plan.stages, *(t.stage for t in self.plan.trials)], self.store)
        self.store.site.remove(self.store.tune(self.plan.sweep.name))
        self.store.tidy_leases()

    # --- what is there ---

    @property
    def folder(self) -> Path:
        from diffult_ray.results import sweep_folder

        return sweep_folder(self.store, self.plan.sweep.name)

    def _stored_records(self) -> dict[str, dict[str, Any]]:
        """Records of the trials that are done; failed ones, and those measured otherwise, are run again."""
        from diffult_ray.results import read_record

        name, found = self.plan.sweep.name, {}
        for trial in self.plan.trials:
            kept = read_record(trial, self.store, name)
            measured = kept is not None and kept.get("quality") == trial.quality
            if measured and kept["status"] == "done":
                found[trial.key] = kept
        return found

    def _is_finished(self, records: dict[str, Any]) -> bool:
        try:
            finished = files.read_json(self.folder / "finished.json")
        except (FileNotFoundError, ValueError):
            return False
        whole = len(records) == len(self.plan.trials) and finished["id"] == self.plan.id
        return whole and (self.folder / "report.html").exists() and not self._owes_tracking(finished)

    def _owes_tracking(self, finished: dict[str, Any]) -> bool:
        return self.plan.sweep.tracking.enabled and finished["tracking"] != self._shown_uri()

    # --- before anything starts ---

    def _uri(self) -> str | None:
        tracking = self.plan.sweep.tracking
        return (tracking.uri or f"sqlite:///{self._database}") if tracking.enabled else None

    @property
    def _database(self) -> Path:
        return self.store.tracking_folder(self.plan.sweep.name) / "mlflow.db"

    def _shown_uri(self) -> str | None:
        """As it may be written down: without a password, and the same on every machine."""
        uri = self._uri()
        if uri is None or self.plan.sweep.tracking.uri:
            return None if uri is None else masked(uri)
        return f"sqlite:///{self.store.shown(self._database)}"

    def _tracking_uri(self) -> str | None:
        """As asked for; one that this sweep has logged to may be away for now, and costs no result."""
        uri = self._uri()
        if uri is not None:
            from diffult_ray import tracking

            try:
                tracking.check(uri)
            except BadInput as refused:
                if definition.tracked_at(self.folder) != self._shown_uri():
                    raise
                self.narrator.say(f"warning: {refused}; the sweep goes on and logs when it is back")
        return uri

    def _check_request(self) -> None:
        from diffult_ray import cluster, placement

        placement.patience()  # refused now if it is no number
        if not self.arguments.address and not os.environ.get("RAY_ADDRESS"):
            cluster.check_fits(self.plan, cluster.here())

    def _build_splits(self, records: Mapping[str, Any]) -> None:
        """A data set that cannot be had is a mistake in the sweep, told before anything else is written."""
        from diffult_ray import build
        for stage in self._needed(records):
            if stage.name != "split":
                continue
            artifact = self.store.locate(stage)
            if artifact is None:
                artifact = build.build_one(stage, self.store)
                self.built[stage.key] = artifact.seconds
            self._check_validation(stage, artifact)
            root = stage.resources.root
            if root and "://" not in root and artifact.summary["streamed"]:
                self._move(stage, str(Path(root).expanduser().absolute()))

    def _move(self, stage: Stage, root: str) -> None:
        """Say where the data of a split lie now, where its workers will read it."""
        from diffult_ray.data.split import MOVED, move

        artifact = self.store.find(stage)
        if artifact is not None:
            move(artifact.folder, root)
            self.store.push(artifact.folder / MOVED)

    def _check_weights(self, records: Mapping[str, Any]) -> None:
        """Inception's weights are there, or are fetched, before anything is written."""
        from diffult_ray.method import inception

        stages = [s for s in self._needed(records) if s.name == "inception" and not self.store.locate(s)]
        for weights in dict.fromkeys(s.resources.weights for s in stages):
            inception.read(inception.find(weights))

    def _check_measures(self, records: Mapping[str, Any]) -> None:
        """Measures that cannot be had are refused; of those that say little, a line is said now."""
        from diffult_ray.stages import quality

        notes: list[str] = []
        for stage in self._needed(records):
            if stage.name == "quality":
                split = self.store.read_json(stage.inputs["split"], "split.json")
                notes += quality.check(stage.config, stage.inputs["reference"].config, split)
        for note in dict.fromkeys(notes):
            self.narrator.say(f"warning: {note}")

    def _check_validation(self, stage: Stage, artifact: Any) -> None:
        """Whether a set has a validation part of its own is known when it is read."""
        selects = any(
            t.experiment.select == "validation" and stage.key in {s.key for s in t.upstream}
            for t in self.plan.trials
        )
        if selects and not artifact.summary["validation_images"]:
            raise BadInput(
                where="experiment.dataset.validation_per_class",
                rule="must be above 0 with `select: validation`: the set has no validation part", value=0,
                advice="set it, or `select: test`",
            )

    def _needed(self, records: Mapping[str, Any]) -> list[Stage]:
        """The distinct stages before the trials that are not done."""
        missing = (t for t in self.plan.trials if t.key not in records)
        return list({s.key: s for t in missing for s in t.upstream}.values())

    def _write_definition(self) -> None:
        import yaml

        resolved = self.plan.sweep.model_dump(mode="json")
        resolved["tracking"]["uri"] = self._shown_uri() if self.plan.sweep.tracking.uri else None
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        files.write_bytes(self.folder / "sweep.yaml", text.encode())
        stages = [*self.plan.stages, *(t.stage for t in self.plan.trials)]
        needs = {s.key: {"stage": s.name, "family": s.family} for s in stages}
        files.write_json(self.folder / "stages.json", needs)
        for name in ("sweep.yaml", "stages.json"):
            self.store.push(self.folder / name)

    # --- the work ---

    def _build(self, records: dict[str, dict[str, Any]], uri: str | None) -> None:
        from diffult_ray import build

        missing = [t for t in self.plan.trials if t.key not in records]
        stages = self._needed(records)
        stored = [s for s in self.plan.stages if self.store.locate(s)]
        self.narrator.say(
            f"sweep {self.plan.sweep.name}: {len(self.plan.trials)} trials, {len(records)} done; "
            f"{len(stored)} of {len(self.plan.stages)} stages stored"
        )
        with interruption.deferred():  # at any instruction of Ray's it may crash
            # What does not fit is refused before anything of the sweep is written or logged.
            capacity = self._join() if missing else None
            self._write_definition()
            if uri is not None:
                self._start_tracker(uri, stored, records)
            if capacity is None:
                return
            self._count_reused(stored, records)
            failed = build.build_all(
                stages, self.store, capacity, self.narrator, self._stage_built, self.purse
            )
        ready = self._without_hopeless(missing, failed)
        from diffult_ray import trials  # imports Ray Tune, which reads what `connect` has set

        trials.run(
            ready, self.store, capacity, self.narrator, self._trial_ended, self.purse,
            name=self.plan.sweep.name, concurrency=self.plan.sweep.tune.concurrency,
        )

    def _join(self) -> Capacity:
        """Start or join the cluster, and see that it can hold the sweep."""
        from diffult_ray import cluster, preflight

        with interruption.kept():
            capacity = cluster.connect(self.arguments.address, verbose=self.arguments.verbose)
        interruption.listen()  # again: that of Ray's core, set past Python, aborts
        interruption.check()
        self.narrator.say(f"Ray: {capacity.origin} with {capacity.cpus:g} CPUs and {capacity.gpus:g} GPUs")
        cluster.check_fits(self.plan, capacity)
        if capacity.fleet is not None:  # a cluster that others have set up
            preflight.check(self.plan, self.store.address, capacity, self.narrator.say)
        return capacity

    def _without_hopeless(self, missing: Sequence[Trial], failed: Mapping[str, Exception]) -> list[Trial]:
        """The trials whose stages are all stored; the others end here, or are left for the budget."""
        from diffult_ray.build import first_line

        ready = []
        self.purse.leave([s for s in self.plan.stages if isinstance(failed.get(s.key), OverBudget)])
        for trial in missing:
            causes = [failed[s.key] for s in trial.upstream if s.key in failed]
            cause = next((c for c in causes if not isinstance(c, OverBudget)), None)
            if not causes:
                ready.append(trial)
            elif cause is None:
                self.purse.leave([trial.stage])
            else:
                self._trial_ended(trial, f"a stage before it failed: {first_line(cause)}")
        return ready

    def _start_tracker(self, uri: str, stored: Sequence[Stage], records: Mapping[str, Any]) -> None:
        """What is stored is told as well: it may have been built when nothing was tracked."""
        from diffult_ray.logbook import Logbook

        self.tracker = Logbook(uri, self.plan, self.store, self.folder)
        for stage in stored:
            self.tracker.stage(stage, self.store.locate(stage))
        for found in records.values():
            self.tracker.trial(found)

    def _count_reused(self, stored: Sequence[Stage], records: Mapping[str, Any]) -> None:
        reused = Counter(s.name for s in stored if s.key not in self.built) + Counter(classifier=len(records))
        for stage, count in reused.items():
            metrics.count("diffult_artifacts_reused", count, sweep=self.plan.sweep.name, stage=stage)

    def _stage_built(self, stage: Any, artifact: Any) -> None:
        self.built[stage.key] = artifact.seconds
        self.purse.learn(artifact)
        sweep = self.plan.sweep.name
        metrics.count("diffult_stage_seconds", artifact.seconds, sweep=sweep, stage=stage.name)
        if self.tracker:
            self.tracker.stage(stage, artifact)

    def _trial_ended(self, trial: Any, error: str | None) -> None:
        from diffult_ray.results import record, write_record

        found = record(trial, self.store, error)
        write_record(found, self.store, self.plan.sweep.name)
        if self.purse.limits and found["status"] == "done":
            self.purse.learn(self.store.look(trial.stage))
        name, seconds = self.plan.sweep.name, found.get("seconds") or 0.0
        metrics.count("diffult_trials_done", sweep=name, status=found["status"])
        metrics.count("diffult_stage_seconds", seconds, sweep=name, stage="classifier")
        if self.tracker:
            self.tracker.trial(found)

    @staticmethod
    def _disconnect() -> None:
        if "ray" in sys.modules:
            from diffult_ray import cluster

            cluster.disconnect()

    # --- the results ---

    def _conclude(self) -> int:
        from diffult_ray import report, results, statistics

        name = self.plan.sweep.name
        records = {t.key: results.read_record(t, self.store, name) for t in self.plan.trials}
        frame = results.table(self.plan, records)
        results.write_table(frame, self.folder)
        data = results.report_data(self.plan, self.store, frame, self.built, self._facts())
        report.write(data, self.folder)
        statistics.write(data, self.folder)
        code = next((c for status, c in UNDONE.items() if (frame["status"] == status).any()), DONE)
        error = self.tracker.conclude(data, ENDS[code]) if self.tracker else None
        self.store.push(self.folder)
        if code == DONE:
            files.write_json(self.folder / "finished.json", {
                "id": self.plan.id,
                "tracking": None if error else self._shown_uri(),
                "command": self.command,
            })
            self.store.push(self.folder / "finished.json")
        self._print_results(data)
        if error:
            print(f"warning: not all is in MLflow, the same command logs the rest: {error}", file=sys.stderr)
        if self.purse.left:
            print(self.purse.told())
        return code

    def _facts(self) -> dict[str, str]:
        import platform
        from importlib.metadata import version

        versions = ", ".join(f"{p} {version(p)}" for p in ("ray", "torch", "diffusers", "mlflow"))
        return {
            "command": self.command,
            "dataset": self._dataset_line(),
            "hardware": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.platform()}",
            "versions": f"diffult_ray {__version__}, Python {platform.python_version()}, {versions}",
            "seconds": f"{self.narrator.seconds:.0f} in this run, {sum(self.built.values()):.0f} of stages",
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def _dataset_line(self) -> str:
        return self.plan.trials[0].experiment.dataset.summary

    def _print_results(self, data: Any = None) -> None:
        import pandas as pd
        from rich.console import Console

        from diffult_ray import report, results

        if data is None:
            frame = pd.read_parquet(self.folder / "results.parquet")
            data = results.report_data(self.plan, self.store, frame, {}, {})
        report.print_table(data, Console())
        print(f"results: {self.store.shown(self.folder / 'results.parquet')}")
        print(f"report:  {self.store.shown(self.folder / 'report.html')}")
        uri = self._uri()
        if uri is not None:
            from diffult_ray import tracking

            print(f"MLflow:  {tracking.ui_command(uri)}")


if __name__ == "__main__":
    sys.exit(run())
