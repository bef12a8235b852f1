"""Experiment and Sweep: typed, frozen, validated before Ray starts.

YAML, then `dotted.key=value` overrides, into pydantic models. A mistake ends in one line that names
the file, the dotted key, the rule and the value. Defaults are the paper's or its public code's on
CIFAR-LT where those are known (docs: METHOD.md); a sweep file for another data set states its own.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from diffult_ray.errors import BadInput

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")
Method = Literal["diffult", "ce", "oversample", "reweight"]
METHODS: tuple[str, ...] = ("diffult", "ce", "oversample", "reweight")
Band = Literal["ID", "AID", "OOD"]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not a boolean")
    return value


def _number(value: object) -> object:
    """YAML reads 1e-3 as text and has no plain infinity, so both are read here."""
    if isinstance(value, str):
        return {"none": math.inf, "inf": math.inf, ".inf": math.inf}.get(value.lower(), value)
    return _no_bool(value)


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Threshold = Annotated[float, Field(ge=0, allow_inf_nan=True), BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_no_bool)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Lists(Section):
    """List files under `dataset.root`, `relative/path label` a line; labels count from 0."""

    train: str | None = None
    validation: str | None = None
    test: str | None = None
    names: str | None = None  # one class name a line; without it the labels are the names


class Columns(Section):
    """The columns of parquet files: encoded images (or Hugging Face's struct) and whole labels."""

    image: str = Field("image", min_length=1)
    label: str = Field("label", min_length=1)


EMBEDDED = ("digits",)
OFFICIAL = ("cifar10", "cifar100")
LARGEST_CLASS = {"digits": 500, "cifar10": 5000, "cifar100": 500}  # n_max unless given


class Dataset(Section):
    """Which images, and the long tail that is cut out of them.

    Sets that come balanced (digits, CIFAR) have the exponential profile unless another is given;
    a researcher's own (folder, lists, parquet) are long-tailed by nature and taken as they are.
    """

    name: Literal["digits", "cifar10", "cifar100", "folder", "lists", "parquet"] = "digits"
    root: str | None = None  # a folder; parquet: a folder, a file, or a URI such as s3://bucket/path
    download: bool = False  # cifar10, cifar100: fetch the official archive into `root`
    lists: Lists = Lists()
    columns: Columns = Columns()
    group_pattern: str | None = None  # on the file name; images of one first capture group stay together
    profile: Literal["exp", "step", "pareto", "natural"] = "exp"
    imbalance_factor: Float = Field(100.0, ge=1)  # IF = largest / smallest class; natural has its own
    max_per_class: Int | None = Field(500, ge=1)  # n_max; natural: a cap, null for none
    image_size: Int | None = Field(None, ge=4)  # None: as stored
    channels: Literal[1, 3] | None = None  # None: as the source
    loading: Literal["auto", "memory", "stream"] = "auto"  # auto: memory while the images are small
    on_error: Literal["stop", "skip"] = "stop"  # faulty images: refuse the set, or leave them out
    validation_per_class: Int = Field(0, ge=0)  # where the source has no validation part of its own
    test_per_class: Int | None = Field(None, ge=1)  # held out where the source has no test part
    seed: Seed = 0  # 0 is the field's split

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_set(cls, values: Any) -> Any:
        """A default written out changes no key, so each set's own are filled in here."""
        if not isinstance(values, Mapping):
            return values
        name = values.get("name", "digits")
        ours = name in EMBEDDED + OFFICIAL if isinstance(name, str) else False
        profile = values.get("profile") or ("exp" if ours else "natural")
        largest = values.get("max_per_class")
        if largest is None and profile != "natural":
            largest = LARGEST_CLASS.get(name, 500)
        return {**values, "profile": profile, "max_per_class": largest}

    @model_validator(mode="after")
    def _belongs_together(self) -> Dataset:
        for broken, rule in self._rules():
            if broken:
                raise ValueError(rule)
        return self

    def _rules(self) -> Iterator[tuple[bool, str]]:
        embedded, encoded = self.name in EMBEDDED, self.name not in EMBEDDED + OFFICIAL
        yield not embedded and not self.root, f"`root` is needed for {self.name}: say where the data are"
        yield embedded and bool(self.root), f"{self.name} come with scikit-learn and take no `root`"
        yield self.download and self.name not in OFFICIAL, "`download` is for cifar10 and cifar100"
        yield (encoded and self.image_size is None,
               f"`image_size` is needed for {self.name}, whose images may have any size: set it")
        yield (not encoded and self.loading == "stream",
               f"{self.name} are held in memory; `loading: stream` is for folder, lists and parquet")
        has_list = self.lists.train is not None
        yield self.name == "lists" and not has_list, "`lists.train` is needed: a file under `root`"
        yield self.name != "lists" and self.lists != Lists(), "`lists` is for `name: lists`"
        yield (self.name != "parquet" and self.columns != Columns(), "`columns` is for `name: parquet`")
        yield (self.group_pattern is not None and self.name not in ("folder", "lists"),
               "`group_pattern` reads file names, so it is for folder and lists")
        yield self.name in OFFICIAL and self.test_per_class is not None, (
            f"`test_per_class` is for sets without a test part; {self.name} has its own")
        yield self.group_pattern is not None and _groups(self.group_pattern) < 1, (
            "`group_pattern` is a regular expression with a capture group, e.g. (track[0-9]+)_")
        remote = self.root is not None and "://" in self.root
        yield remote and self.name != "parquet", "`root` is a mounted folder; a URI is for parquet"

    @property
    def summary(self) -> str:
        """The set and its tail in a few words."""
        if self.profile == "natural":
            tail = "as it comes"
        else:
            tail = f"{self.profile} profile, imbalance factor {self.imbalance_factor:g}"
        most = "" if self.max_per_class is None else f", at most {self.max_per_class} a class"
        return f"{self.name}, {tail}{most}"


def _groups(pattern: str) -> int:
    """Capture groups of a regular expression; -1 if it is none."""
    try:
        return re.compile(pattern).groups
    except re.error:
        return -1


class ClassifierTraining(Section):
    """LDAM-DRW's public recipe on CIFAR; `steps` wins over `epochs` where both are set."""

    architecture: Literal["cnn", "resnet32", "resnet10", "resnet18", "resnet50"] = "resnet32"
    epochs: Int | None = Field(None, ge=1)
    steps: Int | None = Field(None, ge=1)
    batch_size: Int = Field(128, ge=1)
    learning_rate: Float = Field(0.1, gt=0)
    momentum: Float = Field(0.9, ge=0, lt=1)
    weight_decay: Float = Field(2e-4, ge=0)
    warmup: Float = Field(0.025, ge=0, lt=1)  # share of the steps: 5 of 200 epochs
    schedule: Literal["step", "cosine"] = "step"  # step: x0.01 at 80% and 90% (epochs 160, 180)
    crop_padding: Int = Field(4, ge=0)
    flip: bool = True
    precision: Literal["auto", "float32", "bf16"] = "auto"
    seed: Seed = 0

    @model_validator(mode="after")
    def _has_a_length(self) -> ClassifierTraining:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        return self


class Classifier(ClassifierTraining):
    synthetic_weight: Float = Field(0.3, ge=0)  # omega: 0.3 on CIFAR-LT, 0.5 on ImageNet-LT


class Generator(Section):
    """The U-Net, its DDPM loss and the CBDM regulariser, as in the public CBDM code."""

    channels: tuple[Int, ...] = (128, 256, 256, 256)
    blocks: Int = Field(2, ge=1)  # residual blocks a level
    attention: tuple[Int, ...] = (16,)  # resolutions with self-attention
    dropout: Float = Field(0.1, ge=0, lt=1)
    steps: Int = Field(300_000, ge=1)
    batch_size: Int = Field(64, ge=1)
    learning_rate: Float = Field(2e-4, gt=0)
    warmup_steps: Int = Field(5000, ge=0)
    gradient_clip: Float = Field(1.0, gt=0)
    ema: Float = Field(0.9999, ge=0, lt=1)
    timesteps: Int = Field(1000, ge=2)  # T
    regulariser: Literal["none", "cbdm"] = "none"
    tau: Float = Field(1.0, ge=0)
    label_drop: Float = Field(0.1, ge=0, lt=1)  # probability of the null class
    flip: bool = True
    precision: Literal["auto", "float32", "bf16"] = "auto"
    seed: Seed = 0

    @model_validator(mode="after")
    def _has_channels(self) -> Generator:
        if not self.channels or any(c < 8 or c % 8 for c in self.channels):
            raise ValueError("`channels` is one or more multiples of 8, one a level")
        return self


class Generation(Section):
    per_class: Int = Field(500, ge=1)  # N_t
    sampler: Literal["ddim", "dpmsolver++"] = "ddim"
    steps: Int = Field(100, ge=1)
    guidance: Float = Field(1.5, ge=0)  # w in eps + w (eps - eps_null)
    seed: Seed = 0

    @model_validator(mode="after")
    def _is_not_too_fine(self) -> Generation:
        if self.steps > 1000:
            raise ValueError("`steps` is at most the 1000 timesteps of the trained generator")
        return self


class Filter(Section):
    threshold: Threshold | None = None  # in units of d_f; inf keeps all; 2 drops OOD, as the paper
    bands: tuple[Band, ...] | None = None
    distance: Literal["centre", "nearest"] = "centre"
    normalise: bool = False
    scope: Literal["class", "global"] = "class"  # of d_f

    @model_validator(mode="before")
    @classmethod
    def _default_is_the_papers(cls, values: Any) -> Any:
        """A default written out changes no key: threshold is 2 unless bands are named."""
        if isinstance(values, Mapping) and values.get("bands") is None:
            return {**values, "threshold": values.get("threshold", 2.0)}
        return values

    @model_validator(mode="after")
    def _one_rule(self) -> Filter:
        if self.bands is not None and self.threshold is not None:
            raise ValueError("`threshold` and `bands` exclude each other")
        if self.bands is None and self.threshold is None:
            raise ValueError("`threshold` is a number of zero or more, or inf to keep all")
        if self.bands is not None and not self.bands:
            raise ValueError("`bands` names one or more of ID, AID, OOD")
        return self


class Quality(Section):
    network: Literal["reference"] = "reference"
    images: Int = Field(50_000, ge=20)  # uniform over classes
    reference: ClassifierTraining = ClassifierTraining()  # trained on the full balanced set


class StageResources(Section):
    workers: Int = Field(1, ge=1)
    cpus: Float = Field(1.0, gt=0)  # a worker
    gpus: Float = Field(0.0, ge=0)  # a worker; a fraction shares a GPU between processes


class Resources(Section):
    extractor: StageResources = StageResources()
    reference: StageResources = StageResources()
    generator: StageResources = StageResources()
    images: StageResources = StageResources()
    scores: StageResources = StageResources()
    quality: StageResources = StageResources()
    classifier: StageResources = StageResources()


class Experiment(Section):
    """One cell of a sweep. `seed` is the default of the four stage seeds, not a stream itself."""

    seed: Seed = 0
    method: Method = "diffult"
    dataset: Dataset = Dataset()
    extractor: ClassifierTraining = ClassifierTraining()
    generator: Generator = Generator()
    generation: Generation = Generation()
    filter: Filter = Filter(threshold=2.0)
    classifier: Classifier = Classifier()
    select: Literal["validation", "test"] = "validation"
    quality: Quality = Quality()
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _seeds(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        seed = values.get("seed", 0)
        named = {}
        for stage in ("extractor", "generator", "generation", "classifier"):
            section = values.get(stage, {})
            if isinstance(section, Mapping):
                named[stage] = {"seed": seed, **section}
        return {**values, **named}

    def at(self, key: str) -> Any:
        """The value of a dotted key."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    @model_validator(mode="after")
    def _selection(self) -> Experiment:
        if self.select == "validation" and self.dataset.validation_per_class == 0:
            raise ValueError(
                "`select: validation` needs `dataset.validation_per_class` above 0; "
                "set it, or `select: test`"
            )
        return self


class Axis(Section):
    """How one dotted key is searched: exactly one of the four."""

    grid: tuple[Any, ...] | None = None
    choice: tuple[Any, ...] | None = None
    uniform: tuple[Float, Float] | None = None
    loguniform: tuple[Float, Float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        kinds = [k for k in ("grid", "choice", "uniform", "loguniform") if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise ValueError("exactly one of grid, choice, uniform, loguniform")
        if kinds[0] in ("grid", "choice"):
            values = getattr(self, kinds[0])
            if not values:
                raise ValueError(f"an empty {kinds[0]}; give at least one value")
            if len({repr(v) for v in values}) < len(values):
                raise ValueError(f"a value twice in {kinds[0]}")
        else:
            low, high = getattr(self, kinds[0])
            if not low < high or (kinds[0] == "loguniform" and low <= 0):
                raise ValueError(f"{kinds[0]} is [low, high] with low < high" +
                                 (" and low > 0" if kinds[0] == "loguniform" else ""))
        return self

    @property
    def kind(self) -> str:
        return next(k for k in ("grid", "choice", "uniform", "loguniform") if getattr(self, k) is not None)


class Tune(Section):
    samples: Int = Field(1, ge=1)  # draws of the uniform, loguniform and choice axes
    concurrency: Int | None = Field(None, ge=1)  # trials at a time; None: what fits the cluster
    seed: Seed = 0


class Tracking(Section):
    enabled: bool = True
    uri: str | None = None  # None: sqlite in the storage folder


class Sweep(Section):
    """A sweep file. `search` is one design, or a list of designs whose trials are joined."""

    name: str
    description: str = ""
    experiment: dict[str, Any] = {}
    search: tuple[dict[str, Any], ...] = ()
    baselines: tuple[Method, ...] = ()
    tune: Tune = Tune()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _one_design_is_a_list_of_one(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("search"), Mapping):
            return {**values, "search": (values["search"],)}
        return values

    @model_validator(mode="after")
    def _names(self) -> Sweep:
        if not NAME.fullmatch(self.name):
            raise ValueError("`name` is letters, digits, '-', '_' and '.', in parts joined by '/'")
        return self


# --- reading: YAML, overrides, shipped sweeps -------------------------------------------------


def shipped() -> dict[str, Path]:
    """Sweep files that come with the project, by name: from a checkout and from a wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here / "shipped_sweeps", here.parent / "sweeps"):
        if folder.is_dir():
            files = sorted(folder.rglob("*.yaml"))
            return {f.relative_to(folder).with_suffix("").as_posix(): f for f in files}
    return {}


def load(sweep: str = "digits", overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a file or shipped name, with overrides, fully checked.

    Raises:
        BadInput: for a mistake of the user's in the file or an override.
    """
    path = _find(sweep)
    values = _read(path)
    sources = {}
    for override in overrides:
        _override(values, override, sources)
    built = _validate(Sweep, values, path.name, sources)
    for method, point in _cells(built):
        _experiment(built, method, point, path.name, sources)
    return built


def _find(sweep: str) -> Path:
    path = Path(sweep)
    if path.is_file():
        return path
    names = shipped()
    if sweep in names:
        return names[sweep]
    looks_like_a_file = path.suffix in (".yaml", ".yml") or os.path.isabs(sweep)
    near = difflib.get_close_matches(sweep, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(names) or 'none'}"
    raise BadInput(
        where="SWEEP",
        rule="no such file" if looks_like_a_file else "neither a file nor a shipped sweep",
        value=sweep,
        advice=hint,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded, resolve=True)
    except Exception as error:  # OmegaConf and yaml raise many kinds; each is a mistake in the file
        detail = " ".join(str(error).split())
        raise BadInput(where=str(path), rule="is not a readable YAML file", advice=detail) from error
    if not isinstance(values, dict) or not values:
        raise BadInput(
            where=str(path),
            rule="a sweep file is a mapping with `name`, `experiment` and `search`",
            value=values,
            advice="start from a copy of a shipped sweep",
        )
    return values


def known_keys(model: type[BaseModel] = Experiment, prefix: str = "") -> list[str]:
    """Every dotted key of an experiment that holds a value, in the order of definition."""
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


SWEEP_KEYS = ("description", "baselines", *(f"tune.{k}" for k in Tune.model_fields),
              *(f"tracking.{k}" for k in Tracking.model_fields))


def _override(values: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise BadInput(where="override", rule="is `dotted.key=value`", value=override)
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except Exception as error:
        raise BadInput(where=f"override {key}", rule="the value is not YAML", value=text) from error
    key = key.removeprefix("experiment.")
    if key in SWEEP_KEYS or key == "name":
        _set(values, key, value)
    elif key in known_keys():
        _set(values.setdefault("experiment", {}), key, value)
        _drop_axis(values, key)
    elif key.startswith("search."):
        _set_axis(values, key.removeprefix("search."), value, override)
    else:
        raise BadInput(where=f"override {key}", rule="no such key", value=override, advice=_nearest(key))
    sources[key] = f"override {override}"


def _nearest(key: str) -> str:
    keys = [*known_keys(), *SWEEP_KEYS, "name"]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not near:
        tails = {k.rpartition(".")[2]: k for k in keys}
        tail = difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.5)
        near = [tails[t] for t in tail]
    return f"did you mean {near[0]!r}?" if near else "see docs/CONFIGURATION.md for the keys"


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for part in path:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[last] = value


def _designs(values: dict[str, Any]) -> list[dict[str, Any]]:
    search = values.get("search") or []
    return [search] if isinstance(search, dict) else [d for d in search if isinstance(d, dict)]


def _drop_axis(values: dict[str, Any], key: str) -> None:
    """An override of a searched key fixes it: its axis goes."""
    for design in _designs(values):
        design.pop(key, None)
        if isinstance(design.get("zip"), dict):
            design["zip"].pop(key, None)


def _set_axis(values: dict[str, Any], rest: str, value: Any, override: str) -> None:
    key, _, kind = rest.rpartition(".")
    holders = [d for d in _designs(values) if key in d]
    if kind not in Axis.model_fields or key not in known_keys() or not holders:
        raise BadInput(
            where=f"override search.{rest}",
            rule="is `search.<searched key>.<grid|choice|uniform|loguniform>=values`",
            value=override,
            advice=_nearest(key),
        )
    for design in holders:
        design[key] = {kind: value}


def _validate(model: type[BaseModel], values: Any, file: str, sources: Mapping[str, str], at: str = ""):
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _one_line(error, model, file, sources, at) from None


def _one_line(
    error: ValidationError, model: type[BaseModel], file: str, sources: Mapping[str, str], at: str
) -> BadInput:
    first = error.errors()[0]
    inner = ".".join(str(part) for part in first["loc"])
    key = ".".join(part for part in (at, inner) if part)
    where = sources.get(inner) or f"{file}: {key or 'the whole file'}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        candidates = known_keys() if model is Experiment else list(Sweep.model_fields)
        near = difflib.get_close_matches(inner, candidates, n=1, cutoff=0.4)
        advice = f"did you mean {near[0]!r}?" if near else "take it out"
        return BadInput(where=where, rule="no such key", advice=advice)
    value = None if first["type"] == "value_error" and isinstance(first["input"], Mapping) else first["input"]
    if first["type"] == "missing":
        return BadInput(where=where, rule="is required", advice="add it")
    return BadInput(where=where, rule=message[0].lower() + message[1:], value=value)


# --- a sweep's cells ----------------------------------------------------------------------------


def _axes(design: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, axis) of one design: one key an axis, or several keys that move together."""
    for key, value in design.items():
        if key == "zip":
            for group in value if isinstance(value, list | tuple) else [value]:
                if not isinstance(group, Mapping) or not group:
                    continue
                yield tuple(group), group
        else:
            yield (key,), value


def _points(sweep: Sweep, file: str = "sweep") -> Iterator[dict[str, Any]]:
    """Every point of every design, in order, as {dotted key: value}."""
    for number, design in enumerate(sweep.search):
        at = "search" if len(sweep.search) == 1 else f"search[{number}]"
        yield from _design_points(design, sweep.tune, file, at)


def _design_points(design: Mapping[str, Any], tune: Tune, file: str, at: str) -> Iterator[dict]:
    seen: set[str] = set()
    grids: list[list[dict[str, Any]]] = []
    drawn: dict[str, Axis] = {}
    for keys, spec in _axes(design):
        for key in keys:
            _check_axis_key(key, seen, file, at)
            seen.add(key)
        if len(keys) == 1 and not (isinstance(spec, Mapping) and keys[0] in spec):
            axis = _validate(Axis, spec, file, {}, f"{at}.{keys[0]}")
            if axis.kind == "grid":
                grids.append([{keys[0]: value} for value in axis.grid])
            else:
                drawn[keys[0]] = axis
        else:
            grids.append(_zipped(spec, file, at))
    for base in _product(grids):
        for sample in _samples(drawn, tune):
            yield {**base, **sample}


def _check_axis_key(key: str, seen: set[str], file: str, at: str) -> None:
    if key not in known_keys():
        raise BadInput(where=f"{file}: {at}.{key}", rule="no such key", advice=_nearest(key))
    if key in seen:
        raise BadInput(
            where=f"{file}: {at}.{key}", rule="one axis a key", advice="take one of the two axes out"
        )


def _zipped(group: Mapping[str, Any], file: str, at: str) -> list[dict[str, Any]]:
    lengths = {len(v) if isinstance(v, list | tuple) else 0 for v in group.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise BadInput(
            where=f"{file}: {at}.zip",
            rule="each key has a list of values, all of one length",
            value={k: len(v) if isinstance(v, list | tuple) else v for k, v in group.items()},
        )
    return [dict(zip(group, values, strict=True)) for values in zip(*group.values(), strict=True)]


def _product(grids: Sequence[Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    if not grids:
        yield {}
        return
    for first in grids[0]:
        for rest in _product(grids[1:]):
            yield {**first, **rest}


def _samples(drawn: Mapping[str, Axis], tune: Tune) -> Iterator[dict[str, Any]]:
    """Draws of the random axes: the n-th is the same however many there are."""
    if not drawn:
        yield {}
        return
    import random

    for number in range(tune.samples):
        yield {k: _draw(a, random.Random(f"{tune.seed}/{k}/{number}")) for k, a in drawn.items()}


def _draw(axis: Axis, rng: Any) -> Any:
    if axis.choice is not None:
        return rng.choice(axis.choice)
    low, high = axis.uniform or axis.loguniform
    if axis.uniform:
        return rng.uniform(low, high)
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _cells(sweep: Sweep) -> Iterator[tuple[Method | None, dict[str, Any]]]:
    for point in _points(sweep):
        for method in (*sweep.baselines, None):
            yield method, point


def _experiment(
    sweep: Sweep, method: Method | None, point: Mapping[str, Any], file: str, sources: Mapping[str, str]
) -> Experiment:
    import copy

    values = copy.deepcopy(sweep.experiment)
    for key, value in point.items():
        _set(values, key, value)
    if method is not None:
        values["method"] = method
    at = "experiment"
    return _validate(Experiment, values, file, {**sources}, at)


def experiments(sweep: Sweep) -> Iterator[Experiment]:
    """The experiment of every cell of a sweep, baselines first.

    A baseline is asked for at each point, and collapses to one trial wherever the searched keys do
    not touch its stages: the caller keeps one a distinct key.
    """
    points = list(_points(sweep))
    for method in (*sweep.baselines, None):
        for point in points:
            yield _experiment(sweep, method, point, sweep.name, {})


def searched(sweep: Sweep) -> list[str]:
    """The dotted keys that vary, in the order of the file."""
    keys: dict[str, None] = {}
    for design in sweep.search:
        for names, _ in _axes(design):
            keys.update(dict.fromkeys(names))
    return list(keys)
