"""Experiment and Sweep: typed, frozen, validated before Ray starts.

YAML, then `dotted.key=value` overrides, into pydantic models. A mistake ends in one line that names
the file, the dotted key, the rule and the value. Defaults are the paper's or its public code's on
CIFAR-LT where those are known (docs: METHOD.md); a sweep file for another data set states its own.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from diffult_ray import sweepfile
from diffult_ray.errors import UNTOLD, BadInput
from diffult_ray.sweepfile import as_list, design_place, drop_axis, raw_designs
from diffult_ray.sweepfile import shipped as shipped

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,99})*")
LIST_ITEM = re.compile(r"\.(\d+)(?=\.|$)")
Method = Literal["diffult", "ce", "oversample", "reweight", "balanced_softmax", "ldam_drw", "mixup"]
METHODS: tuple[str, ...] = get_args(Method)
Band = Literal["ID", "AID", "OOD"]


class Rule(ValueError):
    """A rule that pydantic does not know, for the keys of a section that it is about.

    Args:
        rule: what must hold.
        keys: the keys to point at, in the section that is validated; the first one, unless another was
            searched or overridden.
        value: what was received.
        advice: what to do.
    """

    def __init__(self, rule: str, *keys: str, value: object = UNTOLD, advice: str = "") -> None:
        super().__init__(rule)
        self.keys, self.value, self.advice = keys, value, advice


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise Rule("must be a number, not true or false", value=value)
    return value


def _number(value: object) -> object:
    """YAML has no plain `inf`, and says null for none; a string of digits is a number already."""
    if isinstance(value, str):
        return math.inf if value.lower() in ("none", "inf", ".inf") else value
    return _no_bool(value)


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Threshold = Annotated[float, Field(ge=0, allow_inf_nan=True), BeforeValidator(_number)]
Seed = Annotated[
    int, Field(ge=0, lt=2**32, description="any whole number below 2**32"), BeforeValidator(_no_bool)
]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), ser_json_inf_nan="constants"
    )


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
DIGITS_SIZE, INCEPTION_SIZE = 8, 32  # pixels a side: of the digits, and the least that Inception is for
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
        for broken, key, rule, advice in self._rules():
            if broken:
                raise Rule(rule, key, value=getattr(self, key.partition(".")[0]), advice=advice)
        return self

    def _rules(self) -> Iterator[tuple[bool, str, str, str]]:
        """(is broken, key, rule, advice), the keys that a set needs before those that it does not take."""
        name, embedded, official = self.name, self.name in EMBEDDED, self.name in OFFICIAL
        encoded, elsewhere = not embedded and not official, self.root is not None and "://" in self.root
        pattern = self.group_pattern
        yield not embedded and not self.root, "root", f"is needed for {name}", "say where the data are"
        yield elsewhere and name != "parquet", "root", "is a mounted folder; a URI is for parquet", ""
        yield (encoded and self.image_size is None, "image_size",
               f"is needed for {name}, whose images may have any size", "set it")
        yield name == "lists" and not self.lists.train, "lists.train", "is needed: a file under `root`", ""
        yield name != "lists" and self.lists != Lists(), "lists", "is for `name: lists`", "drop it"
        yield name != "parquet" and self.columns != Columns(), "columns", "is for `name: parquet`", "drop it"
        yield self.download and not official, "download", "is for cifar10 and cifar100", "drop it"
        yield (not encoded and self.loading == "stream", "loading",
               f"streams folder, lists and parquet; {name} are held in memory", "drop it")
        yield (pattern is not None and name not in ("folder", "lists"), "group_pattern",
               "reads file names, so it is for folder and lists", "drop it")
        yield (pattern is not None and _groups(pattern) < 1, "group_pattern",
               "is a regular expression with a capture group", "e.g. (track[0-9]+)_")
        yield (official and self.test_per_class is not None, "test_per_class",
               f"is for sets without a test part; {name} has its own", "drop it")

    @property
    def may_have_validation(self) -> bool:
        """Whether validation images are held out, or the set may have some of its own."""
        own = self.name in ("folder", "parquet") or self.lists.validation is not None
        return own or self.validation_per_class > 0

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
    """LDAM-DRW's public recipe on CIFAR; its length is in `epochs`, 200 unless given, or in `steps`."""

    architecture: Literal["cnn", "resnet32", "resnet10", "resnet18", "resnet50"] = "resnet32"
    epochs: Int | None = Field(None, ge=1)
    steps: Int | None = Field(None, ge=1)
    batch_size: Int = Field(128, ge=1)
    learning_rate: Float = Field(0.1, gt=0)
    momentum: Float = Field(0.9, ge=0, lt=1)
    weight_decay: Float = Field(2e-4, ge=0)
    warmup: Float = Field(0.025, ge=0, lt=1)  # share of the steps: 5 of 200 epochs
    schedule: Literal["step", "cosine"] = "step"  # step: x0.01 at 80% and 90% (epochs 160, 180)
    augmentation: Literal["crop", "resized_crop"] = "crop"  # after padding, as on CIFAR; or RandomResizedCrop
    crop_padding: Int = Field(4, ge=0)  # crop: zeros around the image that a crop may reach into
    flip: bool = True
    cutout: Int = Field(0, ge=0)  # crop: side of the square that is cut out
    jitter: Float = Field(0.0, ge=0, lt=1)  # resized_crop: of brightness, contrast and saturation
    crop_area: Float = Field(0.08, gt=0, le=1)  # resized_crop: the least share of the image's area
    precision: Literal["auto", "float32", "bf16"] = "auto"
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _has_a_length(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("steps") is None and values.get("epochs") is None:
            return {**values, "epochs": 200}
        return values

    @model_validator(mode="after")
    def _has_one_length(self) -> ClassifierTraining:
        if self.steps is not None and self.epochs is not None:
            raise Rule(
                "`steps` and `epochs` exclude each other", "steps", "epochs", advice="set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def _augments_in_one_way(self) -> ClassifierTraining:
        for key, other, off in (("jitter", "crop", 0.0), ("cutout", "resized_crop", 0)):
            if self.augmentation == other and getattr(self, key) != off:
                raise Rule(
                    f"is not for `augmentation: {other}`", key, "augmentation", value=getattr(self, key),
                    advice="drop it, or choose the other augmentation",
                )
        return self


class Classifier(ClassifierTraining):
    """The final classifier; a key that its method does not use changes nothing."""

    synthetic_weight: Float = Field(0.3, ge=0)  # omega: 0.3 on CIFAR-LT, 0.5 on ImageNet-LT
    normalisation: Literal["weight", "count"] = "weight"  # what a batch's weighted loss is divided by
    max_margin: Float = Field(0.5, ge=0)  # ldam_drw: the margin of the smallest class
    scale: Float = Field(30.0, gt=0)  # ldam_drw: of the cosines that are its logits
    drw_start: Float = Field(0.8, ge=0, le=1)  # ldam_drw: share of the steps without weights
    mixup_alpha: Float = Field(1.0, gt=0)  # mixup: of Beta(alpha, alpha)


class Generator(Section):
    """The U-Net, its DDPM loss and the CBDM regulariser, as in the public CBDM code; or EDM's loss."""

    objective: Literal["ddpm", "edm"] = "ddpm"  # edm: Karras et al. (2022), sampled by heun or dpmsolver++
    channels: tuple[Annotated[Int, Field(ge=8, multiple_of=8)], ...] = Field(
        (128, 256, 256, 256), min_length=1, description="one a level, finest first"
    )
    blocks: Int = Field(2, ge=1)  # residual blocks a level
    attention: tuple[Annotated[Int, Field(ge=1)], ...] = (16,)  # resolutions with self-attention
    dropout: Float = Field(0.1, ge=0, lt=1)
    steps: Int = Field(300_000, ge=1)
    batch_size: Int = Field(64, ge=1)
    learning_rate: Float = Field(2e-4, gt=0)
    warmup_steps: Int = Field(5000, ge=0)
    gradient_clip: Float = Field(1.0, gt=0)
    ema: Float = Field(0.9999, ge=0, lt=1)
    timesteps: Int = Field(1000, ge=2)  # T of ddpm
    regulariser: Literal["none", "cbdm"] = "none"
    tau: Float = Field(1.0, ge=0)  # weight of cbdm
    label_distribution: Literal["frequencies", "uniform", "balanced"] = Field(
        "frequencies",
        description="of cbdm's y': as in training, each class alike, or what makes y and y' together even",
    )
    label_drop: Float = Field(0.1, ge=0, lt=1)  # probability of the null class
    label_drop_scope: Literal["batch", "sample"] = "batch"  # whose label it is that is dropped
    aid_weight: Float = Field(0.0, ge=0)  # lambda of the AID loss, in the extractor's features; 0: none
    balanced_batches: bool = False  # each class equally often in the batches, whatever its size
    head_share: Float = Field(1.0, ge=0, le=1)  # p_h: share of the head classes' images that it learns from
    flip: bool = True
    augment: Float = Field(0.0, ge=0, le=1)  # probability of each transformation that the network is told of
    precision: Literal["auto", "float32", "bf16"] = "auto"
    seed: Seed = 0

    @model_validator(mode="after")
    def _belongs_together(self) -> Generator:
        """What is set and would not be used is refused: a sweep over it would be of equal trials."""
        for key, used, other, rule in (
            ("tau", self.regulariser == "cbdm", "regulariser", "`regulariser: cbdm`"),
            ("label_distribution", self.regulariser == "cbdm", "regulariser", "`regulariser: cbdm`"),
            ("label_drop_scope", self.label_drop > 0, "label_drop", "`label_drop` above 0"),
            ("timesteps", self.objective == "ddpm", "objective", "`objective: ddpm`"),
        ):
            value = getattr(self, key)
            if not used and value != type(self).model_fields[key].default:
                raise Rule(f"is for {rule}", key, other, value=value, advice="set that, or drop this key")
        if self.objective == "edm" and self.regulariser != "none":
            raise Rule(
                "is for `objective: ddpm`, as its weight is t / T", "regulariser", "objective",
                value=self.regulariser, advice="set it to none, or take ddpm",
            )
        return self


SAMPLERS = {"ddpm": ("ddpm", "ddim", "dpmsolver++"), "edm": ("heun", "dpmsolver++")}  # by objective


class Generation(Section):
    per_class: Int = Field(500, ge=1)  # N_t
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "heun"] = "ddim"  # heun: edm's; ddpm, ddim: ddpm's
    steps: Int = Field(100, ge=1)  # of the sampler; heun evaluates the network twice in each but the last
    guidance: Float = Field(1.5, ge=0)  # w in eps + w (eps - eps_null)
    seed: Seed = 0


class Filter(Section):
    """Which generated images are kept: up to a distance or by band, and perhaps by their predicted class."""

    threshold: Threshold | None = Field(  # in units of d_f
        None, description="2 drops OOD, as the paper does; inf or null keeps all"
    )
    bands: tuple[Band, ...] | None = Field(None, min_length=1, description="one or more of ID, AID, OOD")
    distance: Literal["centre", "nearest"] = "centre"
    normalise: bool = False
    scope: Literal["class", "global"] = "class"  # of d_f
    agreement: bool = False  # keep only what the extractor takes for its label; on top of the other rule

    @model_validator(mode="before")
    @classmethod
    def _default_is_the_papers(cls, values: Any) -> Any:
        """A default written out changes no key: threshold is 2 unless it or bands are given."""
        if not isinstance(values, Mapping) or values.get("bands") is not None:
            return values
        threshold = values.get("threshold", 2.0)
        return {**values, "threshold": math.inf if threshold is None else threshold}

    @model_validator(mode="after")
    def _one_rule(self) -> Filter:
        if self.bands is not None and self.threshold is not None:
            raise Rule(
                "`threshold` and `bands` exclude each other", "bands", "threshold",
                advice="set one of them to null",
            )
        return self


class Quality(Section):
    """What measures a generator, and on how many images."""

    network: Literal["reference", "inception"] = "reference"
    inception_weights: str | None = Field(
        None, min_length=1, description="a file (.pth, .safetensors) or URL; null: torch-fidelity's release"
    )
    images: Int = Field(50_000, ge=20)  # uniform over classes
    neighbours: Int = Field(3, ge=1)  # k of precision and recall
    kid_subsets: Int = Field(100, ge=1)
    kid_subset_size: Int = Field(1000, ge=2)  # or all images, where those are fewer
    reference: ClassifierTraining = ClassifierTraining()  # trained on the full balanced set

    @model_validator(mode="after")
    def _weights_are_inceptions(self) -> Quality:
        if self.inception_weights is not None and self.network != "inception":
            raise Rule(
                "is for `network: inception`", "inception_weights", value=self.inception_weights,
                advice="drop it, or set quality.network: inception",
            )
        return self


class StageResources(Section):
    workers: Int = Field(1, ge=1)
    cpus: Float = Field(1.0, gt=0)  # a worker
    gpus: Float = Field(0.0, ge=0)  # a worker; a fraction shares a GPU between processes
    readers: Int = Field(1, ge=1)  # a worker: tasks that decode at a time, where the set is streamed
    keep_memory: bool = True  # freed memory stays with a worker: faster on CPUs, and larger
    tuned: bool = True  # networks are arranged for the device at hand, the same but for rounding
    compile: bool = False  # networks go through torch.compile; does not pay on CPUs
    graphs: bool = False  # and what it makes runs as CUDA graphs: for small networks, on a GPU

    @model_validator(mode="after")
    def _has_what_graphs_need(self) -> StageResources:
        if self.graphs and not (self.compile and self.gpus):
            raise Rule(
                "CUDA graphs are of what was compiled, and of a GPU", "graphs", value=self.graphs,
                advice="set compile: true and gpus, or drop graphs",
            )
        return self

    @property
    def most(self) -> int:
        """Workers where there is room for all that are wished for."""
        return self.workers


class GeneratorResources(StageResources):
    """Trains with `workers` to `max_workers`, as many as there is room for: nodes may come and go."""

    max_workers: Int | None = Field(None, ge=1)  # nodes may come and go; None: `workers`, always
    accumulate: Int = Field(1, ge=1)  # parts of a worker's batch, one after another: less memory

    @property
    def most(self) -> int:
        return self.max_workers or self.workers

    @model_validator(mode="after")
    def _is_a_range(self) -> GeneratorResources:
        if self.most < self.workers:
            raise Rule(
                f"must be at least workers, {self.workers}", "max_workers", value=self.max_workers,
                advice="raise it, or drop it to always train with `workers`",
            )
        return self


class Resources(Section):
    extractor: StageResources = StageResources()
    reference: StageResources = StageResources()
    generator: GeneratorResources = GeneratorResources()
    images: StageResources = StageResources()
    scores: StageResources = StageResources()
    quality: StageResources = StageResources()
    classifier: StageResources = StageResources()


NAMED = ("method", "synthetic")  # the keys of an experiment that `variant` tells


def variant(method: str, synthetic: bool | None) -> str:
    """How a method reads: with synthetic images by its own name if it always has them.

    >>> variant("diffult", True), variant("reweight", False), variant("reweight", True)
    ('diffult', 'reweight', 'reweight+synthetic')
    """
    return f"{method}+synthetic" if synthetic and not has_synthetic(method) else method


def has_synthetic(method: object) -> bool:
    """Whether a method trains on synthetic images unless it is told."""
    return method == "diffult"


def seeded(values: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's values with `seed` in each stage that names no seed of its own."""
    named = {}
    for stage in ("extractor", "generator", "generation", "classifier"):
        section = values.get(stage, {})
        if isinstance(section, Mapping):
            named[stage] = {"seed": values.get("seed", 0), **section}
    return {**values, **named}


class Experiment(Section):
    """One cell of a sweep. `seed` is the default of the four stage seeds, not a stream itself."""

    seed: Seed = 0
    method: Method = "diffult"
    synthetic: bool = Field(
        True, description="whether the kept synthetic images are trained on; false for the baselines"
    )
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
        return seeded(values) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _images_of_the_method(cls, values: Any) -> Any:
        """A default written out changes no key."""
        if not isinstance(values, Mapping) or values.get("synthetic") is not None:
            return values
        return {**values, "synthetic": has_synthetic(values.get("method", "diffult"))}

    @model_validator(mode="after")
    def _is_called_by_its_name(self) -> Experiment:
        """Cross-entropy on D is `ce`, and on D with synthetic images `diffult`: one name each."""
        if self.method == "ce" and self.synthetic:
            rule, advice = "ce has no synthetic images", "with them it is `method: diffult`"
        elif self.method == "diffult" and not self.synthetic:
            rule, advice = "diffult has synthetic images", "without them it is `method: ce`"
        else:
            return self
        raise Rule(rule, "synthetic", "method", value=self.synthetic, advice=advice)

    @model_validator(mode="after")
    def _can_select(self) -> Experiment:
        if self.select == "validation" and not self.dataset.may_have_validation:
            raise Rule(
                "`select: validation` needs `dataset.validation_per_class` above 0",
                "dataset.validation_per_class", "select", value=0, advice="set it, or `select: test`",
            )
        return self

    @model_validator(mode="after")
    def _can_augment(self) -> Experiment:
        """A crop at the image's own resolution: in memory there are only the resized ones."""
        for name in ("extractor", "classifier", "quality.reference"):
            if self.at(name).augmentation == "resized_crop" and self.dataset.loading != "stream":
                raise Rule(
                    "`augmentation: resized_crop` needs `dataset.loading: stream`", f"{name}.augmentation",
                    "dataset.loading", value="resized_crop", advice="set it, or `augmentation: crop`",
                )
        return self

    @model_validator(mode="after")
    def _can_sample(self) -> Experiment:
        generator, generation = self.generator, self.generation
        if generator.objective == "ddpm" and generation.steps > generator.timesteps:
            raise Rule(
                f"must be at most generator.timesteps, {generator.timesteps}",
                "generation.steps", "generator.timesteps", value=generation.steps, advice="lower it",
            )
        if generation.sampler not in SAMPLERS[generator.objective]:
            raise Rule(
                f"does not sample a generator of `objective: {generator.objective}`",
                "generation.sampler", "generator.objective", value=generation.sampler,
                advice=f"take {' or '.join(SAMPLERS[generator.objective])}",
            )
        if generation.guidance > 0 and generator.label_drop == 0:
            raise Rule(
                "needs a null class, and `generator.label_drop: 0` trains none",
                "generation.guidance", "generator.label_drop", value=generation.guidance,
                advice="set it to 0, or raise generator.label_drop",
            )
        return self

    @model_validator(mode="after")
    def _can_share(self) -> Experiment:
        most, batch = self.resources.generator.max_workers, self.generator.batch_size
        if most is not None and most > batch:
            raise Rule(
                f"must be at most generator.batch_size, {batch}, of which each worker takes a share",
                "resources.generator.max_workers", "generator.batch_size", value=most, advice="lower it",
            )
        return self

    @model_validator(mode="after")
    def _can_measure(self) -> Experiment:
        size = self.dataset.image_size or (DIGITS_SIZE if self.dataset.name == "digits" else None)
        if self.quality.network == "inception" and size is not None and size < INCEPTION_SIZE:
            raise Rule(
                f"inception needs images of {INCEPTION_SIZE} pixels or more, not of {size}x{size}",
                "quality.network", "dataset.image_size", value="inception",
                advice="set quality.network: reference",
            )
        return self

    def at(self, key: str) -> Any:
        """The value of a dotted key."""
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value


KINDS = ("grid", "choice", "uniform", "loguniform")


class Axis(Section):
    """How one dotted key is searched: exactly one of the four."""

    grid: tuple[Any, ...] | None = Field(None, description="write a list of values")
    choice: tuple[Any, ...] | None = Field(None, description="write a list of values")
    uniform: tuple[Float, Float] | None = Field(None, description="write [low, high]")
    loguniform: tuple[Float, Float] | None = Field(None, description="write [low, high]")

    @model_validator(mode="after")
    def _one_kind(self) -> Axis:
        kinds = [k for k in KINDS if getattr(self, k) is not None]
        if len(kinds) != 1:
            raise Rule(
                "must have exactly one of grid, choice, uniform, loguniform", value=kinds,
                advice="as in {grid: [1, 2]}",
            )
        return self

    @model_validator(mode="after")
    def _has_values(self) -> Axis:
        values = self.values
        if self.kind in ("grid", "choice"):
            if not values:
                raise Rule("must not be empty", self.kind, value=[], advice="give at least one value")
            if len({repr(v) for v in values}) < len(values):
                raise Rule("must not hold a value twice", self.kind, value=list(values), advice="take it out")
        elif not values[0] < values[1]:
            raise Rule("must be [low, high] with low below high", self.kind, value=list(values))
        elif self.kind == "loguniform" and values[0] <= 0:
            raise Rule("must start above 0", self.kind, value=list(values), advice="or take uniform")
        return self

    @property
    def kind(self) -> str:
        return next(k for k in KINDS if getattr(self, k) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        return getattr(self, self.kind)

    def draw(self, rng: random.Random) -> Any:
        if self.choice is not None:
            return rng.choice(self.choice)
        low, high = self.values
        if self.uniform is not None:
            return rng.uniform(low, high)
        return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)


class Budget(Section):
    """What one command may spend. It then starts nothing more, and what runs is let to end."""

    hours: Float | None = Field(None, gt=0)  # of wall time
    gpu_hours: Float | None = Field(None, gt=0)  # of the GPUs that its stages and trials hold
    cost: Float | None = Field(None, gt=0)  # of these and their CPUs, by `price`

    @property
    def limits(self) -> dict[str, float]:
        return {k: v for k, v in self if v is not None}


class Tune(Section):
    samples: Int = Field(1, ge=1)  # draws of the uniform, loguniform and choice axes
    concurrency: Int | None = Field(None, ge=1)  # trials at a time; None: what fits the cluster
    seed: Seed = 0
    budget: Budget = Budget()


class Tracking(Section):
    enabled: bool = True
    uri: str | None = None  # None: sqlite in the storage folder


class Price(Section):
    """What an hour costs, for the estimate of `--plan`, in whatever money."""

    gpu_hour: Float | None = Field(None, ge=0)  # of one GPU, with the processors beside it if they are free
    cpu_hour: Float | None = Field(None, ge=0)  # of one CPU


@dataclass(frozen=True)
class Source:
    """Where the user wrote a key: in the file, its base or overlay, on an axis, or in an override."""

    file: str = "sweep"
    overrides: Mapping[str, str] = field(default_factory=dict)  # key -> the override's text
    axes: Mapping[str, str] = field(default_factory=dict)  # key of the experiment -> key of its axis
    origins: Mapping[str, str] = field(default_factory=dict)  # key -> the base or overlay it is from

    def place(self, keys: Sequence[str]) -> str:
        """The first of the keys that was overridden or searched; else the first, in the file."""
        for key in keys:
            for known in _with_parents(key):
                if known in self.overrides:
                    return f"override {self.overrides[known]}"
                if known in self.axes:
                    return self.place([self.axes[known]])
        file = next((self.origins[k] for k in _with_parents(keys[0]) if k in self.origins), self.file)
        return f"{file}: {_as_written(keys[0]) or 'the whole file'}"


def _with_parents(key: str) -> list[str]:
    """The key, and the keys of the sections that it is in, nearest first."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _as_written(key: str) -> str:
    """Items of a list have their number in brackets."""
    return LIST_ITEM.sub(r"[\1]", key)


Measure = Literal[
    "accuracy", "balanced_accuracy", "accuracy_many", "accuracy_medium", "accuracy_few", "generated", "kept",
    "p_id", "p_aid", "p_ood", "fid", "inception_score",
]


class Expected(Section):
    """A number to set beside the sweep's own: what was measured of which cell, and who says so.

    Without `where` it belongs to no cell that can be run here, such as a method that is only cited.
    """

    where: dict[str, Any] | None = Field(
        None, description="dotted keys and their values, as in where: {generator.tau: 1}"
    )
    label: str | None = Field(None, description="the name of the row; needed without `where`")
    measure: Measure = "accuracy"
    value: Float = Field(description="as the measure is shown: accuracies and shares in percent")
    # reported: by the paper; secondary: readers of it; code: public code; ours: measured here
    standing: Literal["reported", "secondary", "code", "ours"]
    source: str = Field(min_length=1, description="say where the number is from, and on which set")

    @model_validator(mode="after")
    def _is_of_something(self) -> Expected:
        if not self.where and not self.label:
            raise Rule("is needed without `label`", "where", value=self.where, advice="name the cell's keys")
        for key in self.where or {}:
            if key not in KEYS:
                raise Rule("names no such key", "where", value=key, advice=_nearest(key, KEYS))
        return self


class Sweep(Section):
    """A sweep file. `search` is one design, or a list of designs whose trials are joined."""

    name: str = Field(description="write text; a number in quotes")
    description: str = Field("", description="write text; a number in quotes")
    experiment: dict[str, Any] = Field({}, description="as in experiment: {seed: 0}")
    search: tuple[dict[str, Any], ...] = Field((), description="write a mapping of dotted keys to axes")
    baselines: tuple[Method, ...] = Field((), description="write a list of methods, as in [ce, oversample]")
    tune: Tune = Tune()
    tracking: Tracking = Tracking()
    price: Price = Price()
    expected: tuple[Expected, ...] = Field((), description="write a list of rows, as in the shipped sweeps")
    differs: tuple[str, ...] = Field((), description="why results do not compare with `expected`, in words")
    _source: Source = PrivateAttr(default_factory=Source)

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:
        for key, kind in (("search", Mapping), ("differs", str)):
            if isinstance(values, Mapping) and isinstance(values.get(key), kind):
                values = {**values, key: (values[key],)}
        return values

    @model_validator(mode="after")
    def _has_a_name(self) -> Sweep:
        if not NAME.fullmatch(self.name):
            raise Rule(
                "must be letters, digits, '-', '_' and '.', in parts joined by '/'", "name",
                value=self.name, advice="as in digits/weights",
            )
        return self

    @cached_property
    def cells(self) -> list[Experiment]:
        """The experiment at every point of the search, checked; equal sections are one object."""
        return list(_cells(self))

    @cached_property
    def designs(self) -> list[Design]:
        """`search`, checked; without one, a design of one point."""
        return [
            _design(spec, design_place(number, len(self.search)), self._source)
            for number, spec in enumerate(self.search or ({},))
        ]


# --- reading: the file, its base and overlay, overrides ----------------------------------------


def load(sweep: str = "digits", overrides: Sequence[str] = (), overlay: str | None = None) -> Sweep:
    """The sweep of a file or shipped name, under an overlay and overrides, fully checked.

    Raises:
        BadInput: for a mistake of the user's in a file or an override.
    """
    written = sweepfile.read(sweep, overlay)
    for key, place in written.axes.items():
        if key not in KEYS:
            raise BadInput(where=place, rule="no such key", advice=_nearest(key, KEYS))
    values, told = written.values, {}
    for override in overrides:
        _override(values, override, told)
    _note_overrides(values, told)
    source = Source(str(written.path), told, origins=written.origins)
    built = _validate(Sweep, values, source)
    built._source = source
    _ = built.cells  # each is checked now, before anything starts
    _check_expected(built)
    _check_budget(built)
    return built


def _note_overrides(values: dict[str, Any], told: Mapping[str, str]) -> None:
    """What was expected of the file's settings may not hold of others."""
    inner = {key.removeprefix("experiment."): text for key, text in told.items()
             if key.startswith("experiment.")}
    changed = [text for key, text in inner.items() if not SAME_RESULTS.fullmatch(key)]
    if changed and values.get("expected"):
        values["differs"] = [*as_list(values.get("differs")), f"with the override {', '.join(changed)}"]


def known_keys(model: type[BaseModel] = Experiment, prefix: str = "") -> list[str]:
    """Every dotted key of an experiment that holds a value, in the order of definition."""
    keys = []
    for name, info in model.model_fields.items():
        if _is_section(info):
            keys += known_keys(info.annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Section)


SECTIONS = {name: info.annotation for name, info in Experiment.model_fields.items() if _is_section(info)}
KEYS = tuple(known_keys())
SWEEP_KEYS = ("name", "description", "baselines", *known_keys(Tune, "tune."),
              *(f"tracking.{k}" for k in Tracking.model_fields), *(f"price.{k}" for k in Price.model_fields))

# How fast a stage runs, how results are measured, and which images choose: they make no other trial.
NOT_SEARCHED = re.compile(r"resources\..*|quality\..*|dataset\.(root|download|loading)|select")

# Other images or other luck, of which an expected number holds as well.
SAME_RESULTS = re.compile(
    r"resources\..*|dataset\.(root|download|loading)|quality\.(network|inception_weights)|(.*\.)?seed"
)


def _override(values: dict[str, Any], override: str, told: dict[str, str]) -> None:
    """Set a key in the values of a sweep file, and note in `told` where the key is set."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key or not text:
        raise BadInput(
            where=f"override {override!r}", rule="must be key=value", advice="as in generator.steps=500"
        )
    value = _override_value(override, text)
    inner = key.removeprefix("experiment.")
    if key in SWEEP_KEYS:
        _set(values, key, value)
        told[key] = override
    elif inner in KEYS:
        _set(values, f"experiment.{inner}", value)
        drop_axis(values, inner)
        told[f"experiment.{inner}"] = override
    elif key.startswith("search."):
        told.update(_set_axis(values, key.removeprefix("search."), value, override))
    else:
        raise BadInput(where=f"override {override}", rule="no such key", advice=_nearest(inner))


def _override_value(override: str, text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise BadInput(
            where=f"override {override}", rule=f"the value must be YAML: {problem}", advice="correct it"
        ) from None


def _nearest(key: str, keys: Sequence[str] = (*KEYS, *SWEEP_KEYS)) -> str:
    """Advice on a key that does not exist: of the keys with its last part, or nearly so, the most alike."""
    below = [k.removeprefix(f"{key}.") for k in keys if k.startswith(f"{key}.")]
    if below:
        return f"name one of its keys: {', '.join(below)}"
    tails = {k: k.rpartition(".")[2] for k in keys}
    tail = difflib.get_close_matches(key.rpartition(".")[2], sorted(set(tails.values())), n=1, cutoff=0.7)
    namesakes = [k for k in keys if tails[k] in tail]
    near = difflib.get_close_matches(key, namesakes or keys, n=1, cutoff=0.0 if namesakes else 0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"they begin with {', '.join(dict.fromkeys(k.partition('.')[0] for k in keys))}"


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a nested key. Where something else than a mapping is in the way it stays, to be refused."""
    *path, last = dotted.split(".")
    for part in path:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            return
    values[last] = value


def _set_axis(values: dict[str, Any], rest: str, value: Any, override: str) -> dict[str, str]:
    key, _, kind = rest.rpartition(".")
    holders = [(at, d) for at, d in raw_designs(values) if key in d]
    if kind not in KINDS or key not in KEYS or not holders:
        searched = [k for _, d in raw_designs(values) for k in d if k != "zip"]
        raise BadInput(
            where=f"override {override}",
            rule=f"must be search.KEY.KIND=values, with a searched KEY and KIND one of {', '.join(KINDS)}",
            advice=_nearest(key or rest, searched) if searched else "this sweep searches nothing",
        )
    for _, design in holders:
        design[key] = {kind: value}
    return {f"{at}.{key}": override for at, _ in holders}


# --- refusing -------------------------------------------------------------------------------------


def _validate(model: type[Section], values: Any, source: Source, at: str = "") -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(error.errors()[0], model, source, at) from None


def _refusal(first: Mapping[str, Any], model: type[Section], source: Source, at: str) -> BadInput:
    """A mistake in one line: where it was written, the rule, the value, and what to do."""
    path = [str(part) for part in first["loc"] if part != "[key]"]
    keys = [".".join(filter(None, [at, *path]))]
    value, advice = first["input"], _advice(first, model, path)
    broken = _broken(first)
    if broken is not None:
        keys = [".".join(filter(None, [at, *path, key])) for key in broken.keys] or keys
        value, advice = broken.value, broken.advice or advice
    elif first["type"] in ("extra_forbidden", "missing"):
        value = UNTOLD
    return BadInput(where=source.place(keys), rule=_rule(first), value=value, advice=advice)


def _broken(error: Mapping[str, Any]) -> Rule | None:
    """The rule of ours that was broken, if it was not one of pydantic's."""
    rule = error.get("ctx", {}).get("error")
    return rule if isinstance(rule, Rule) else None


SAID = (("Value error, ", ""), ("Input should be ", "must be "), ("a valid tuple", "a list"),
        ("Tuple should have", "must have"), ("after validation, ", ""), ("Field required", "is missing"),
        ("Extra inputs are not permitted", "no such key"))


def _rule(error: Mapping[str, Any]) -> str:
    """Pydantic's message in the words of a sweep file."""
    if error["type"] == "model_type":
        return "must be a mapping of keys to values"
    message = error["msg"].replace("a valid dictionary", "a mapping")
    for theirs, ours in SAID:
        message = message.replace(theirs, ours)
    return message


def _advice(error: Mapping[str, Any], model: type[Section], path: Sequence[str]) -> str:
    if error["type"] == "extra_forbidden":
        return _advice_on_unknown(model, path)
    info = _info(model, path)
    if error["type"] == "missing" and len(path) == 1:
        return "add it"
    if error["type"] == "int_from_float":
        return "give a whole number; an axis of whole numbers is a grid or a choice"
    if info is None:
        return f"its keys are {', '.join(model.model_fields)}"
    if _is_section(info):
        return f"its keys are {', '.join(info.annotation.model_fields)}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        near = difflib.get_close_matches(error["input"], re.findall(r"'(.*?)'", error["msg"]), n=1)
        if near:
            return f"did you mean {near[0]!r}?"
    if info.description:
        return info.description
    return "leave it out" if info.default is None else f"the default is {json.dumps(info.default)}"


def _advice_on_unknown(model: type[Section], path: Sequence[str]) -> str:
    if model is Experiment and path[-1] in KEYS:
        section, _, key = path[-1].partition(".")
        return f"nest it, as in {section}: {{{key}: ...}}"
    if model is Experiment:
        return _nearest(".".join(path), KEYS) if len(path) > 1 else _nearest(path[0], [*SECTIONS, *KEYS])
    if path[0] in Experiment.model_fields:
        return "put it under `experiment`"
    return _nearest(".".join(path), [*model.model_fields, *(SWEEP_KEYS if model is Sweep else ())])


def _info(model: type[Section], path: Sequence[str]) -> FieldInfo | None:
    """The field that a path leads to, or into."""
    info = None
    for part in path:
        info = model.model_fields.get(part)
        if info is None or not _is_section(info):
            return info
        model = info.annotation
    return info


# --- a sweep's cells ----------------------------------------------------------------------------


@dataclass
class Design:
    """One mapping of `search`: at each point of the product of its grids, draws of its random axes."""

    grids: list[list[dict[str, Any]]] = field(default_factory=list)
    drawn: dict[str, Axis] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)  # searched key -> where its axis is

    def claim(self, key: str, place: str, source: Source) -> None:
        """Take a key for an axis."""
        if key not in KEYS:
            raise BadInput(where=source.place([place]), rule="no such key", advice=_nearest(key, KEYS))
        if NOT_SEARCHED.fullmatch(key):
            raise BadInput(
                where=source.place([place]), rule="makes no other trial, so it cannot be searched",
                advice="set it under `experiment`",
            )
        if key in self.places:
            raise BadInput(
                where=source.place([place]), rule=f"a second axis of one key, beside {self.places[key]}",
                advice="take one of the two out",
            )
        self.places[key] = place

    def add_axis(self, key: str, spec: Any, place: str, source: Source) -> None:
        self.claim(key, place, source)
        axis = _validate(Axis, spec, source, place)
        if axis.kind == "grid":
            self.grids.append([{key: value} for value in axis.values])
        else:
            self.drawn[key] = axis

    def add_zip(self, group: Any, place: str, source: Source) -> None:
        """Keys whose values move together."""
        lists = list(group.values()) if isinstance(group, Mapping) else []
        lengths = {len(v) if isinstance(v, list) else 0 for v in lists}
        if len(lengths) != 1 or 0 in lengths:
            raise BadInput(
                where=source.place([place]), rule="must be a mapping of keys to lists of one length",
                value=group, advice="as in zip: {generator.steps: [10, 20], generator.seed: [0, 1]}",
            )
        for key in group:
            self.claim(key, f"{place}.{key}", source)
        self.grids.append([dict(zip(group, row, strict=True)) for row in zip(*lists, strict=True)])

    def points(self, tune: Tune) -> Iterator[dict[str, Any]]:
        """Every point as {dotted key: value}; the n-th draw is the same however many there are."""
        draws = [
            {k: a.draw(random.Random(f"{tune.seed}/{k}/{n}")) for k, a in self.drawn.items()}
            for n in range(tune.samples if self.drawn else 1)
        ]
        for parts in itertools.product(*self.grids, draws):
            yield {key: value for part in parts for key, value in part.items()}

    def edges(self) -> Iterator[dict[str, Any]]:
        """Points that are no trials, but have to be allowed: the values and bounds of random axes."""
        for key, axis in self.drawn.items():
            for value in axis.values:
                others = {k: a.values[0] for k, a in self.drawn.items()}
                yield {**{k: v for grid in self.grids for k, v in grid[0].items()}, **others, key: value}


def _design(spec: Mapping[str, Any], at: str, source: Source) -> Design:
    design = Design()
    for key, value in spec.items():
        place = f"{at}.{key}"
        if key != "zip":
            design.add_axis(key, value, place, source)
        elif isinstance(value, list) and value:
            for number, group in enumerate(value):
                design.add_zip(group, f"{place}[{number}]", source)
        else:
            design.add_zip(value, place, source)
    return design


def _check_unsearched(sweep: Sweep) -> None:
    """Refuse a value that is wrong by itself, though the search should set another at every point."""
    try:
        Experiment.model_validate(sweep.experiment)
    except ValidationError as error:
        for each in error.errors():
            broken = _broken(each)
            if broken is None or not broken.keys:
                raise _refusal(each, Experiment, sweep._source, "experiment") from None


def _cells(sweep: Sweep) -> Iterator[Experiment]:
    _check_unsearched(sweep)
    made: dict[Any, Section] = {}
    for design in sweep.designs:
        axes = {f"experiment.{key}": place for key, place in design.places.items()}
        source = replace(sweep._source, axes=axes)
        for point in design.edges():
            _experiment(sweep, point, source, made)
        for point in design.points(sweep.tune):
            yield _experiment(sweep, point, source, made)


def _experiment(sweep: Sweep, point: Mapping[str, Any], source: Source, made: dict) -> Experiment:
    values: dict[str, Any] = sweep.experiment
    for key, value in point.items():
        values = _with(values, key, value)
    try:
        return _assembled(values, made)
    except ValidationError:  # told by the whole, where the keys are whole and in order
        return _validate(Experiment, values, source, "experiment")


def _with(values: Mapping[str, Any], dotted: str, value: Any) -> Any:
    """Nested mappings with one key set, as copies along its path."""
    if not isinstance(values, Mapping):
        return values
    head, _, rest = dotted.partition(".")
    inner = _with(values.get(head) or {}, rest, value) if rest else value
    return {**values, head: inner}


def _assembled(values: Mapping[str, Any], made: dict[Any, Section]) -> Experiment:
    """An experiment of sections from `made`: pydantic takes what is validated as it is."""
    values = seeded(values)
    sections = {}
    for name, kind in SECTIONS.items():
        raw = values.get(name, {})
        key = kind, repr(raw)
        if key not in made:
            made[key] = kind.model_validate(raw)
        sections[name] = made[key]
    return Experiment.model_validate({**values, **sections})


def _check_expected(sweep: Sweep) -> None:
    """Refuse a row with a value that no cell could have; what differs from the file may have none left."""
    for number, row in enumerate(() if sweep.differs else sweep.expected):
        first = None
        for refused in (_refused(cell, row.where or {}) for cell in sweep.cells):
            if refused is None:
                break
            first = first or refused
        else:
            path = [str(part) for part in first["loc"]]
            raise BadInput(
                where=sweep._source.place([f"expected.{number}.where"]),
                rule=f"no cell could have this {'.'.join(path)}: {_rule(first)}", value=first["input"],
                advice=_advice(first, Experiment, path),
            )


def _refused(cell: Experiment, where: Mapping[str, Any]) -> Any:
    """What pydantic says of a cell with dotted keys set, None if they are allowed there."""
    values = cell.model_dump()
    if "method" in where:
        del values["synthetic"]  # by method, unless it is named too
    for key, value in where.items():
        values = _with(values, key, value)
    try:
        Experiment.model_validate(values)
    except ValidationError as error:
        return error.errors()[0]
    return None


def _check_budget(sweep: Sweep) -> None:
    """Refuse a limit of cost where what is to be paid has no price."""
    cost, price = sweep.tune.budget.cost, sweep.price
    sections = {id(cell.resources): cell.resources for cell in sweep.cells}.values()
    on_gpus = any(getattr(each, stage).gpus > 0 for each in sections for stage in Resources.model_fields)
    needed = "gpu_hour" if on_gpus else "cpu_hour"
    if cost is not None and getattr(price, needed) is None:
        raise BadInput(
            where=sweep._source.place(["tune.budget.cost"]),
            rule=f"needs a price, price.{needed}", value=cost,
            advice="set it, or limit tune.budget.hours or gpu_hours",
        )


def has_value(e: Experiment, key: str, value: Any) -> bool:
    """Whether a dotted key has a value, as the configuration reads it: 1 is 1.0, null no threshold."""
    name, _, inner = key.partition(".")
    if not inner:
        return getattr(e, name) == value
    section = getattr(e, name)
    try:
        return type(section).model_validate(_with(section.model_dump(), inner, value)) == section
    except ValidationError:
        return False


def experiments(sweep: Sweep) -> Iterator[Experiment]:
    """The experiment of every cell of a sweep, baselines first.

    A baseline is on D alone. It is asked for at each point, and collapses to one trial wherever the
    searched keys do not touch its stages: the caller keeps one a distinct key.
    """
    for method in sweep.baselines:
        for cell in sweep.cells:
            yield cell.model_copy(update={"method": method, "synthetic": has_synthetic(method)})
    yield from sweep.cells


def first(sweep: Sweep) -> Experiment:
    """The experiment of the first cell, without those of the others. Raises BadInput if it is none."""
    return next(_cells(sweep))


def searched(sweep: Sweep) -> list[str]:
    """The dotted keys that vary, in the order of the file."""
    return list(dict.fromkeys(key for design in sweep.designs for key in design.places))
