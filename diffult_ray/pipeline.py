"""DiffuLT on one screen: which stage needs which, from data set to result (Shao et al., 2024).

    dataset -> split --> extractor --------------------+----------------.
                 |                                      v                |
                 '-> generator --> images --> scores (distance, band) --> classifier (kept = a mask)
                 |        '-----> quality (FID, KID, ...) <-- reference, or inception
                 '-> reference, or inception (the full balanced set, for measuring only)

A generator with an AID loss needs the extractor too, whose features guide it.

A stage is a function of its section of the configuration, its inputs and an output folder. Its key
is a hash of its name, its version, its section and its inputs' keys: what has the same key is the
same artifact, whoever asks for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps
from types import SimpleNamespace
from typing import Any

from diffult_ray.config import Dataset, Experiment, Generator, Section
from diffult_ray.data.sources import identity
from diffult_ray.method.inception import identity as identity_of_weights

# Raised when a stage's code changes what it makes of the same configuration and inputs.
VERSIONS = {
    "split": 3, "extractor": 1, "reference": 1, "inception": 1, "generator": 2,
    "images": 2, "scores": 2, "quality": 4, "classifier": 1,
}

# Changes how fast a stage runs, not what it makes beyond rounding, or where the data lie: in no key.
NOT_IN_KEYS = frozenset({"resources", "root", "download", "loading"})


@dataclass(frozen=True)
class Stage:
    """One artifact to be: what it is made of, and by which section of the configuration."""

    name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    resources: Any = None

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that identify the artifact."""
        return _hash([self.name, VERSIONS[self.name], self.config, self._input_keys])

    @cached_property
    def family(self) -> str:
        """The same for stages of which the shorter is a prefix of the longer, else the key."""
        if self.name != "generator":
            return self.key
        config = {k: v for k, v in self.config.items() if k != "steps"}
        return _hash([self.name, VERSIONS[self.name], config, self._input_keys])

    @property
    def label(self) -> str:
        return f"{self.name} {self.key[:8]}"

    @property
    def _input_keys(self) -> dict[str, str]:
        return {name: stage.key for name, stage in self.inputs.items()}

    def walk(self) -> Iterator[Stage]:
        """This stage and all that it needs, inputs first."""
        for stage in self.inputs.values():
            yield from stage.walk()
        yield self


@dataclass(frozen=True)
class Place:
    """Where a split's images lie and how they are read. It is made in the driver and holds no processor."""

    root: str | None
    download: bool
    loading: str
    workers: int = 0
    cpus: float = 0.0
    gpus: float = 0.0

    @classmethod
    def of(cls, dataset: Dataset) -> Place:
        return cls(dataset.root, dataset.download, dataset.loading)


@dataclass(frozen=True)
class Measuring:
    """The processes that Inception runs in, and where its weights are: a file, a URL, or its release."""

    workers: int
    cpus: float
    gpus: float
    keep_memory: bool
    tuned: bool
    compile: bool
    graphs: bool
    in_tasks: bool
    weights: str | None


def _once(*sections: str) -> Callable[[Callable[[Any], Stage]], Callable[[Any], Stage]]:
    """Experiments that agree in these sections get the same object, whose key is hashed once.

    The function sees no other section, so that none which it reads can be forgotten here.
    """

    def decorate(build: Callable[[Any], Stage]) -> Callable[[Any], Stage]:
        @lru_cache(maxsize=4096)
        def made(*values: Section) -> Stage:
            return build(SimpleNamespace(**dict(zip(sections, values, strict=True))))

        return wraps(build)(lambda e: made(*(getattr(e, name) for name in sections)))

    return decorate


@_once("dataset")
def split(e: Experiment) -> Stage:
    """Keyed by the set's content, wherever it lies."""
    config = {**_reaching(e.dataset), "content": identity(e.dataset)}
    return Stage("split", config, resources=Place.of(e.dataset))


@_once("dataset", "extractor", "resources")
def extractor(e: Experiment) -> Stage:
    """phi_0: plain cross-entropy on the long-tailed set."""
    return Stage("extractor", _reaching(e.extractor), {"split": split(e)}, e.resources.extractor)


@_once("dataset", "quality", "resources")
def reference(e: Experiment) -> Stage:
    """What measures, and nothing learns from it: Inception, or a classifier of the full balanced set."""
    if e.quality.network == "inception":
        weights, share = e.quality.inception_weights, e.resources.quality
        own = (share.keep_memory, share.tuned, share.compile, share.graphs, share.in_tasks)
        where = Measuring(share.workers, share.cpus, share.gpus, *own, weights)
        return Stage("inception", {"weights": identity_of_weights(weights)}, {"split": split(e)}, where)
    config = _reaching(e.quality.reference)
    return Stage("reference", config, {"split": split(e)}, e.resources.reference)


@_once("dataset", "extractor", "generator", "resources")
def generator(e: Experiment) -> Stage:
    """Of the split alone, but for the AID loss, which measures in the extractor's features."""
    config = {k: v for k, v in _section(e.generator).items() if _used(k, e.generator)}
    if e.generator.head_share == 1:
        del config["head_share"]
    inputs = {"split": split(e)}
    if e.generator.aid_weight > 0:
        inputs["extractor"] = extractor(e)
    return Stage("generator", config, inputs, e.resources.generator)


@_once("dataset", "extractor", "generator", "generation", "resources")
def images(e: Experiment) -> Stage:
    """N_t - |c| images for every class c with |c| < N_t."""
    inputs = {"split": split(e), "generator": generator(e)}
    return Stage("images", _section(e.generation), inputs, e.resources.images)


@_once("dataset", "extractor", "generator", "generation", "filter", "resources")
def scores(e: Experiment) -> Stage:
    """Distance in units of d_f, band and nearest real image of every generated image."""
    config = {k: v for k, v in _section(e.filter).items() if k in ("distance", "normalise", "scope")}
    inputs = {"split": split(e), "extractor": extractor(e), "images": images(e)}
    return Stage("scores", config, inputs, e.resources.scores)


@_once("dataset", "extractor", "generator", "generation", "quality", "resources")
def quality(e: Experiment) -> Stage:
    """FID, IS, KID, precision and recall of images drawn uniformly over classes."""
    sampling = {k: v for k, v in _section(e.generation).items() if k != "per_class"}
    measures = ("network", "images", "neighbours", "kid_subsets", "kid_subset_size")
    config = {**{k: getattr(e.quality, k) for k in measures}, "generation": sampling}
    inputs = {"split": split(e), "generator": generator(e), "reference": reference(e)}
    return Stage("quality", config, inputs, e.resources.quality)


# Keys of the classifier's section that not every experiment uses.
OPTIONS: dict[str, Callable[[Experiment], bool]] = {
    "synthetic_weight": lambda e: e.synthetic,
    "normalisation": lambda e: e.synthetic or e.method in ("reweight", "ldam_drw"),  # else all weigh 1
    "max_margin": lambda e: e.method == "ldam_drw",
    "scale": lambda e: e.method == "ldam_drw",
    "drw_start": lambda e: e.method == "ldam_drw",
    "mixup_alpha": lambda e: e.method == "mixup",
}


def _uses(name: str, e: Experiment) -> bool:
    return name not in OPTIONS or OPTIONS[name](e)


def classifier(e: Experiment) -> Stage:
    """The final classifier: on D, and as asked on the kept images and on copies as well."""
    config = {"method": e.method, **{k: v for k, v in _reaching(e.classifier).items() if _uses(k, e)}}
    inputs = {"split": split(e)}
    if e.synthetic:
        inputs["scores"] = scores(e)
        kept = _section(e.filter)
        config["filter"] = {k: kept[k] for k in ("threshold", "bands", "agreement")}
    if e.method == "oversample":
        config["per_class"] = e.generation.per_class
    return Stage("classifier", config, inputs, e.resources.classifier)


def stages(e: Experiment) -> list[Stage]:
    """Every stage of one experiment, inputs before what needs them; the classifier last."""
    wanted = [*([quality(e)] if e.synthetic else []), classifier(e)]
    return list({s.key: s for last in wanted for s in last.walk()}.values())


def applies(key: str, e: Experiment) -> bool:
    """Whether a dotted key reaches the result of an experiment: of its method, with its images."""
    section, _, name = key.partition(".")
    if name in LIMITED and not LIMITED[name](getattr(e, section)):
        return False
    if section == "classifier":
        return _uses(name, e)
    if section in ("seed", "method", "synthetic", "dataset"):
        return True
    if key == "generation.per_class" and e.method == "oversample":
        return True
    return e.synthetic and (section != "generator" or _used(name, e.generator))


def _used(key: str, g: Generator) -> bool:
    """Whether a key of the generator reaches what is trained."""
    if key in ("tau", "label_distribution"):
        return g.regulariser != "none"
    if key == "label_drop_scope":
        return g.label_drop > 0
    return key != "timesteps" or g.objective == "ddpm"


# Keys of a section that another key of it can make meaningless.
LIMITED: dict[str, Callable[[Any], bool]] = {
    "crop_padding": lambda s: s.augmentation != "resized_crop",
    "cutout": lambda s: s.augmentation != "resized_crop",
    "jitter": lambda s: s.augmentation == "resized_crop",
    "crop_area": lambda s: s.augmentation == "resized_crop",
    "imbalance_factor": lambda s: s.profile != "natural",  # which is taken as it comes
}


def _reaching(section: Section) -> dict[str, Any]:
    """A section in which a key that another makes meaningless has its default, whatever was written."""
    idle = [k for k in type(section).model_fields if k in LIMITED and not LIMITED[k](section)]
    return _section(section) | {k: _plain(type(section).model_fields[k].default) for k in idle}


def _section(section: Section) -> dict[str, Any]:
    return {k: _plain(v) for k, v in section if k not in NOT_IN_KEYS}


def _plain(value: Any) -> Any:
    """JSON has no infinity, and 1 and 1.0 are one number."""
    if isinstance(value, Section):
        return _section(value)
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return list(value) if isinstance(value, tuple) else value


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
