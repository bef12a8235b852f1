"""The sections of an experiment, and the experiment: one cell of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from diffult_ray.config.section import Float, Int, Rule, Section, Seed, Threshold
from diffult_ray.errors import PASSWORD, masked

Method = Literal["diffult", "ce", "oversample", "reweight", "balanced_softmax", "ldam_drw", "mixup"]
METHODS: tuple[str, ...] = get_args(Method)
Band = Literal["ID", "AID", "OOD"]


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
                value = getattr(self, key.partition(".")[0])
                shown = masked(value) if isinstance(value, str) else value
                raise Rule(rule, key, value=shown, advice=advice)
        return self

    def _rules(self) -> Iterator[tuple[bool, str, str, str]]:
        """(is broken, key, rule, advice), the keys that a set needs before those that it does not take."""
        name, embedded, official = self.name, self.name in EMBEDDED, self.name in OFFICIAL
        encoded, elsewhere = not embedded and not official, self.root is not None and "://" in self.root
        pattern = self.group_pattern
        yield not embedded and not self.root, "root", f"is needed for {name}", "say where the data are"
        yield elsewhere and name != "parquet", "root", "is a mounted folder; a URI is for parquet", ""
        yield (elsewhere and PASSWORD.search(self.root) is not None, "root",
               "is kept with every result, so it holds no secret", "set it in the environment of Ray's nodes")
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


SAMPLERS = {  # by objective
    "ddpm": ("ddpm", "ddim", "dpmsolver++", "heun"),
    "edm": ("heun", "dpmsolver++"),
}


class Generation(Section):
    per_class: Int = Field(500, ge=1)  # N_t
    sampler: Literal["ddpm", "ddim", "dpmsolver++", "heun"] = "heun"  # of edm: heun or dpmsolver++
    steps: Int = Field(10, ge=1)  # of the sampler; heun evaluates the network twice in each but the last
    guidance: Float = Field(1.5, ge=0)  # w in eps + w (eps - eps_null)
    seed: Seed = 0

    @model_validator(mode="after")
    def _heun_goes_from_one_noise_level_to_another(self) -> Generation:
        if self.sampler == "heun" and self.steps < 2:
            rule = "must be 2 or more for `sampler: heun`"
            raise Rule(rule, "steps", "sampler", value=self.steps, advice="raise it")
        return self


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
    tuned: bool = True  # networks, and how gradients are averaged, suit the device; the same but for rounding
    compile: bool = False  # networks go through torch.compile: for U-Nets on a GPU, not on CPUs
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


class PoolResources(StageResources):
    """Maps rows in up to `workers` processes of Ray Data."""

    compute: Literal["auto", "actors", "tasks"] = "auto"  # auto: actors with a GPU, tasks without

    @property
    def in_tasks(self) -> bool:
        """Whether the processes are those of other stages' tasks, which have torch loaded."""
        return self.compute == "tasks" or (self.compute == "auto" and not self.gpus)

    @model_validator(mode="after")
    def _leaves_gpus_to_actors(self) -> PoolResources:
        if self.compute == "tasks" and self.gpus:
            raise Rule(
                "a task leaves its network on the GPU, an actor does not", "compute", value=self.compute,
                advice="set it to actors, or drop it",
            )
        return self


class Resources(Section):
    extractor: StageResources = StageResources()
    reference: StageResources = StageResources()
    generator: GeneratorResources = GeneratorResources()
    images: PoolResources = PoolResources()
    scores: PoolResources = PoolResources()
    quality: PoolResources = PoolResources()
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
