"""What is in a storage folder, whether it is whole, and what nobody needs: `python -m diffult_ray.store`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from diffult_ray import files, footprint
from diffult_ray.errors import BadInput, Refused
from diffult_ray.progress import clock
from diffult_ray.store import Store, missized, open_store, read_manifest

DONE, DAMAGED = 0, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where `verify` finds damage, 2 for a mistake."""
    try:
        arguments = _parser().parse_args(argv)
        found = open_store(arguments.storage or os.environ.get("DIFFULT_STORAGE") or "~/diffult")
        with found.outlined() as outline:
            return arguments.command(Storekeeper(outline), arguments)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return refused.exit_code
    except BrokenPipeError:  # `ls | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return DONE


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(where="command line", rule=message, advice="--help shows the commands")


def _parser() -> Parser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--storage", help="the storage folder (DIFFULT_STORAGE, else ~/diffult)")
    parser = Parser(
        prog="python -m diffult_ray.store", description="Look after the artifacts of a storage folder.",
        epilog="exit: 0 done, 1 something is damaged (verify), 2 bad input",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    each = commands.add_parser("ls", parents=[common], help="what there is, who uses it, size, age, seconds")
    each.set_defaults(command=_ls)
    each = commands.add_parser("show", parents=[common], help="all that is known of an artifact")
    each.add_argument("key", help="its key, or how that begins")
    each.set_defaults(command=_show)
    each = commands.add_parser("verify", parents=[common], help="compare every file with its checksum")
    each.set_defaults(command=_verify)
    each = commands.add_parser("gc", parents=[common], help="remove what no sweep and no build needs")
    each.add_argument("--keep", nargs="+", metavar="SWEEP", help="the sweeps to keep; all unless given")
    each.add_argument("--dry-run", action="store_true", help="say what would be removed")
    each.set_defaults(command=_gc)
    return parser


# --- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A folder of an artifact: whole, unfinished (no manifest) or damaged."""

    folder: Path
    manifest: Mapping[str, Any] | None
    fault: str | None = None

    @property
    def stage(self) -> str:
        return self.folder.parent.name

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def bytes(self) -> int:
        return size_of(self.folder)

    @property
    def age(self) -> float:
        created = self.manifest["created"] if self.manifest else self.folder.stat().st_mtime
        return max(0.0, time.time() - created)

    @property
    def state(self) -> str:
        if self.fault:
            return "damaged"
        return "whole" if self.manifest else "unfinished"


@dataclass(frozen=True)
class Needs:
    """What a sweep, or a running build, needs: keys of artifacts, and work folders."""

    keys: set[str] = field(default_factory=set)
    work: set[str] = field(default_factory=set)


class Storekeeper:
    """The artifacts of a store and those who use them, as they are when they are first asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def entries(self) -> list[Entry]:
        """Every artifact's folder, by stage and key.

        Raises:
            BadInput: if a newer version wrote one, or one cannot be read.
        """
        folders = sorted(p for p in (self.store.root / "artifacts").glob("*/*") if p.is_dir())
        return [_entry(folder) for folder in folders]

    @cached_property
    def sweeps(self) -> dict[str, Path]:
        """Name -> folder of every sweep that was started here."""
        root = self.store.root / "sweeps"
        found = {p.parent for pattern in ("sweep.yaml", "stages.json") for p in root.rglob(pattern)}
        found |= {p.parent for p in root.rglob("trials") if p.is_dir()}
        return {p.relative_to(root).as_posix(): p for p in sorted(found)}

    def recorded(self, name: str) -> set[str]:
        """Keys that a sweep's definition and its trials name."""
        folder = self.sweeps[name]
        keys = set(_read(folder / "stages.json") or {})
        for path in (folder / "trials").glob("*.json"):
            found = _read(path) or {}
            keys |= {*found.get("stages", {}).values(), found.get("trial"), found.get("quality")}
        return keys - {None}

    def needs(self, name: str) -> Needs:
        """What a sweep needs, with what those artifacts were made of.

        Raises:
            BadInput: if its definition does not tell.
        """
        stages = _read(self.sweeps[name] / "stages.json")
        if stages is None:
            stages = self._planned(name)
        work = {f"{s['stage']}-{s['family']}" for s in stages.values()}
        work.add(f"tune-{name.replace('/', '-')}")
        return Needs(self.with_inputs({*stages, *self.recorded(name)}), work)

    def _planned(self, name: str) -> dict[str, dict[str, str]]:
        """Of a sweep that an older version has started, from its definition."""
        from diffult_ray import config, plan

        path = self.sweeps[name] / "sweep.yaml"
        try:
            planned = plan.make_plan(config.load(str(path)))
        except (BadInput, OSError) as error:
            raise BadInput(
                where=str(path), rule=f"does not tell what the sweep needs: {error}",
                advice="run it once more, remove its folder, or name the others with --keep",
            ) from None
        stages = [*planned.stages, *(t.stage for t in planned.trials)]
        return {s.key: {"stage": s.name, "family": s.family} for s in stages}

    def with_inputs(self, keys: Iterable[str]) -> set[str]:
        """Keys, and those of all that they were made of."""
        inputs = {e.key: e.manifest["inputs"].values() for e in self.entries if e.manifest}
        found, left = set(), list(keys)
        while left:
            key = left.pop()
            if key not in found:
                found.add(key)
                left += inputs.get(key, ())
        return found

    @cached_property
    def users(self) -> dict[str, list[str]]:
        """Key -> names of the sweeps that use it."""
        users: dict[str, list[str]] = {}
        for name in self.sweeps:
            for key in self.with_inputs(self.recorded(name)):
                users.setdefault(key, []).append(name)
        return users

    def chosen(self, key: str) -> Entry:
        """The artifact whose key begins so.

        Raises:
            BadInput: if there is none, or more than one.
        """
        found = [e for e in self.entries if e.key.startswith(key)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise BadInput(where="KEY", rule="no artifact has it", value=key, advice="`ls` lists them all")
        names = ", ".join(f"{e.stage} {e.key}" for e in found[:5]) + (", ..." if len(found) > 5 else "")
        raise BadInput(
            where="KEY", rule=f"{len(found)} keys begin so: {names}", value=key, advice="give more of it"
        )


def _entry(folder: Path) -> Entry:
    try:
        manifest = read_manifest(folder)
        return Entry(folder, manifest, missized(folder, manifest) if manifest else None)
    except ValueError as error:
        return Entry(folder, None, f"manifest.json: {error}")
    except OSError as error:  # no damage yet, and nothing to remove
        raise BadInput(
            where=str(folder), rule=f"cannot be read: {error.strerror}", advice="see to the storage first"
        ) from None


def _read(path: Path) -> Any:
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return None


# --- the commands -----------------------------------------------------------------------------------


def _ls(keeper: Storekeeper, arguments: argparse.Namespace) -> int:
    rows = [("STAGE", "KEY", "STATE", "SIZE", "AGE", "SECONDS", "MEMORY", "WHAT", "USED BY")]
    for e in keeper.entries:
        seconds = f"{e.manifest['seconds']:.0f}" if e.manifest else "-"
        users = ", ".join(keeper.users.get(e.key, ())) or "-"
        sizes = size(e.bytes), age(e.age), seconds, memory(e)
        rows.append((e.stage, e.key, e.state, *sizes, what(e), users))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for row in rows:
        print("  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[-1]]))
    total = size(sum(e.bytes for e in keeper.entries))
    print(f"{len(keeper.entries)} artifacts, {total} in {keeper.store.shown(keeper.store.root)}")
    return DONE


def _show(keeper: Storekeeper, arguments: argparse.Namespace) -> int:
    import yaml

    entry = keeper.chosen(arguments.key)
    told: dict[str, Any] = {
        "stage": entry.stage, "key": entry.key, "folder": keeper.store.shown(entry.folder),
        "state": entry.state,
        "size": size(entry.bytes), "age": age(entry.age), "used by sweeps": keeper.users.get(entry.key, []),
        "used by artifacts": [
            f"{e.stage} {e.key}" for e in keeper.entries
            if e.manifest and entry.key in e.manifest["inputs"].values()
        ],
    }
    if entry.fault:
        told["fault"] = entry.fault
    if entry.manifest:
        hidden = {"format", "stage", "key", "created"}
        told |= {k: value for k, value in entry.manifest.items() if k not in hidden}
    print(yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=110), end="")
    return DONE


def _verify(keeper: Storekeeper, arguments: argparse.Namespace) -> int:
    """Every file is read. What is damaged is set aside by the next sweep that would use it."""
    damaged = whole = 0
    for entry in keeper.entries:
        fault = entry.fault or (entry.manifest and _altered(keeper.store, entry))
        whole += bool(entry.manifest) and not fault
        if fault:
            damaged += 1
            print(f"damaged: {entry.stage} {entry.key}: {fault}")
            with suppress(OSError):  # so that every machine compares it again, and finds it
                os.utime(entry.folder / "manifest.json")
    print(f"{whole} artifacts are whole, {damaged} damaged")
    return DAMAGED if damaged else DONE


def _altered(store: Store, entry: Entry) -> str | None:
    try:
        return store.altered(entry.folder, entry.manifest)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _gc(keeper: Storekeeper, arguments: argparse.Namespace) -> int:
    rubbish = list(_rubbish(keeper, _kept(keeper, arguments.keep)))
    verb = "would remove" if arguments.dry_run else "removed"
    freed = 0
    for why, path in rubbish:
        bytes_ = size_of(path)
        if not arguments.dry_run:
            keeper.store.remove(path)
        freed += bytes_
        print(f"{verb} {path.relative_to(keeper.store.root)}: {why}, {size(bytes_)}")
    print(f"{verb} {len(rubbish)}, {size(freed)}")
    return DONE


def _kept(keeper: Storekeeper, keep: Sequence[str] | None) -> Needs:
    """What the sweeps to keep, the running ones and the running builds need.

    Raises:
        BadInput: if there is no such sweep, or what it needs cannot be told.
    """
    for name in keep or ():
        if name not in keeper.sweeps:
            raise BadInput(
                where="--keep", rule="no such sweep in this storage", value=name,
                advice=f"there are {', '.join(keeper.sweeps) or 'none'}",
            )
    live, _, _ = keeper.store.leases_now()
    running = {found["sweep"] for found in live if found.get("sweep") in keeper.sweeps}
    names = dict.fromkeys([*(keeper.sweeps if keep is None else keep), *sorted(running)])
    every = [keeper.needs(name) for name in names]
    keys = set().union(*(n.keys for n in every))
    for found in live:
        keys |= keeper.with_inputs([*found.get("needs", ()), *found.get("builds", ())])
    return Needs(keys, set().union(*(n.work for n in every)))


def _rubbish(keeper: Storekeeper, kept: Needs) -> Iterator[tuple[str, Path]]:
    """(why, path) of what can go: damaged artifacts, those that nobody needs, and orphaned work."""
    root = keeper.store.root
    live, names, gone = keeper.store.leases_now()
    building = {key for found in live for key in found.get("builds", ())}
    for entry in keeper.entries:
        if entry.key in building:
            continue
        if entry.fault:
            yield "damaged", entry.folder
        elif entry.key not in kept.keys:
            yield ("no sweep needs it" if entry.manifest else "unfinished, no sweep needs it"), entry.folder
    for folder in sorted((root / "damaged").glob("*")):
        yield "damaged", folder
    for folder in sorted((root / "work").glob("*")):
        if folder.name not in kept.work | names:
            yield "unfinished work that no sweep needs", folder
    for path in gone:
        yield "of a builder that is gone", path


# --- in words ---------------------------------------------------------------------------------------


def what(entry: Entry) -> str:
    """An artifact in a few words.

    >>> what(Entry(Path("artifacts/generator/ab"), {"config": {"steps": 500, "seed": 1}}))
    '500 steps, seed 1'
    """
    config = entry.manifest["config"] if entry.manifest else {}
    told = [str(config[k]) for k in ("name", "method", "architecture", "network", "sampler", "distance")
            if config.get(k) is not None]
    told += [f"{config[k]} {k.replace('_', ' ')}" for k in ("steps", "epochs", "per_class", "images")
             if config.get(k) is not None]
    told += [f"seed {config['seed']}"] if "seed" in config else []
    return ", ".join(told) or "-"


def size(count: float) -> str:
    """Bytes as they are read.

    >>> size(512), size(2_500_000)
    ('512 B', '2.5 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def memory(entry: Entry) -> str:
    """The largest process that built it, in main memory and on a GPU."""
    peaks = (entry.manifest or {}).get("peaks", {})
    return " + ".join(size(peaks[name] * footprint.MIB) for name in footprint.PEAKS if name in peaks) or "-"


def age(seconds: float) -> str:
    """Days, or what `clock` says of less.

    >>> age(90), age(3 * 86400)
    ('1:30', '3 d')
    """
    return f"{seconds / 86400:.0f} d" if seconds >= 2 * 86400 else clock(seconds)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
