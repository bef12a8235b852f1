"""Every field of an experiment either changes a key or does not, and this table says which.

A field that is not in the table fails the test: whoever adds one decides here what it does to keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import BaseModel

from diffult_ray import pipeline
from diffult_ray.config import ClassifierTraining, Experiment

STAGES = ("extractor", "reference", "generator", "images", "scores", "quality", "classifier")
TRAINED = {"split", *STAGES}
POOL = {"images", "scores", "classifier"}
MADE = {"generator", "quality", *POOL}


@dataclass(frozen=True)
class Moves:
    """Another value of a field, and the stages whose keys it changes.

    Args:
        value: differs from the one in the context.
        stages: the names of the stages whose keys change; none: the field is in no key.
        where: the context, dotted keys and values, in which the field means something.
        idle: a context in which it means nothing, and changes no key.
    """

    value: Any
    stages: frozenset[str] | set[str] = frozenset()
    where: dict[str, Any] = field(default_factory=dict)
    idle: dict[str, Any] | None = None


def compiled(stage: str) -> dict[str, Any]:
    return {f"resources.{stage}.compile": True, f"resources.{stage}.gpus": 1}


BASE = {
    "select": "test", "generator.steps": 5, "generator.regulariser": "cbdm",
    "dataset.profile": "exp", "dataset.max_per_class": 20, "dataset.imbalance_factor": 5.0,
}
PARQUET = {"dataset.name": "parquet", "dataset.root": "/data", "dataset.image_size": 32}
LISTS = {**PARQUET, "dataset.name": "lists", "dataset.lists.train": "train.txt"}
STREAMED = {**LISTS, "dataset.loading": "stream"}
PLAIN = {"generator.regulariser": "none"}
RESIZED = "resized_crop"


def training(section: str, stages: set[str]) -> dict[str, Moves]:
    """The fields that extractor, reference and classifier share."""
    resized, crop = ({**STREAMED, f"{section}.augmentation": a} for a in (RESIZED, "crop"))

    fields = {
        "architecture": Moves("cnn", stages),
        "epochs": Moves(7, stages),
        "steps": Moves(7, stages, {f"{section}.epochs": None, f"{section}.steps": 5}),
        "batch_size": Moves(7, stages),
        "learning_rate": Moves(0.7, stages),
        "momentum": Moves(0.7, stages),
        "weight_decay": Moves(0.7, stages),
        "warmup": Moves(0.7, stages),
        "schedule": Moves("cosine", stages),
        "augmentation": Moves(RESIZED, stages, STREAMED),
        "crop_padding": Moves(7, stages, idle=resized),
        "flip": Moves(False, stages),
        "cutout": Moves(7, stages),  # elsewhere refused
        "jitter": Moves(0.7, stages, resized),  # elsewhere refused
        "crop_area": Moves(0.7, stages, resized, idle=crop),
        "precision": Moves("bf16", stages),
        "seed": Moves(7, stages),
    }
    return {f"{section}.{name}": moves for name, moves in fields.items()}


CLASSIFIER = {"classifier"}
ALONE = {"method": "ce", "synthetic": False}
OF_METHODS = {
    "classifier.synthetic_weight": Moves(0.7, CLASSIFIER, idle=ALONE),
    "classifier.normalisation": Moves("count", CLASSIFIER, idle=ALONE),
    "classifier.max_margin": Moves(0.7, CLASSIFIER, {"method": "ldam_drw"}, idle={}),
    "classifier.scale": Moves(7.0, CLASSIFIER, {"method": "ldam_drw"}, idle={}),
    "classifier.drw_start": Moves(0.7, CLASSIFIER, {"method": "ldam_drw"}, idle={}),
    "classifier.mixup_alpha": Moves(0.7, CLASSIFIER, {"method": "mixup"}, idle={}),
}

DATASET = {
    "name": Moves("cifar100", TRAINED, {"dataset.root": "/data"}),
    "root": Moves("/data"),
    "download": Moves(True, where={"dataset.name": "cifar100", "dataset.root": "/data"}),
    "lists.train": Moves("other.txt", TRAINED, LISTS),
    "lists.validation": Moves("other.txt", TRAINED, LISTS),
    "lists.test": Moves("other.txt", TRAINED, LISTS),
    "lists.names": Moves("other.txt", TRAINED, LISTS),
    "columns.image": Moves("other", TRAINED, PARQUET),
    "columns.label": Moves("other", TRAINED, PARQUET),
    "group_pattern": Moves("(.*)_", TRAINED, LISTS),
    "profile": Moves("step", TRAINED),
    "imbalance_factor": Moves(7.0, TRAINED, idle={"dataset.profile": "natural"}),
    "max_per_class": Moves(17, TRAINED),
    "image_size": Moves(16, TRAINED),
    "channels": Moves(3, TRAINED),
    "loading": Moves("stream", where={**LISTS, "dataset.loading": "memory"}),
    "on_error": Moves("skip", TRAINED),
    "validation_per_class": Moves(3, TRAINED),
    "test_per_class": Moves(3, TRAINED),
    "seed": Moves(7, TRAINED),
}

DDPM = {"generator.objective": "ddpm", **PLAIN}
EDM = {"generator.objective": "edm", "generation.sampler": "dpmsolver++", **PLAIN}
GENERATOR = {
    "objective": Moves("edm", MADE, {**DDPM, "generation.sampler": "dpmsolver++"}),
    "channels": Moves((8, 8), MADE),
    "blocks": Moves(7, MADE),
    "attention": Moves((7,), MADE),
    "dropout": Moves(0.7, MADE),
    "steps": Moves(7, MADE),
    "batch_size": Moves(7, MADE),
    "learning_rate": Moves(0.7, MADE),
    "warmup_steps": Moves(7, MADE),
    "gradient_clip": Moves(0.7, MADE),
    "ema": Moves(0.7, MADE),
    "timesteps": Moves(700, MADE),  # elsewhere refused
    "regulariser": Moves("none", MADE),
    "tau": Moves(0.7, MADE),  # elsewhere refused, as the next two
    "label_distribution": Moves("uniform", MADE),
    "label_drop": Moves(0.7, MADE),
    "label_drop_scope": Moves("sample", MADE),
    "aid_weight": Moves(0.7, MADE),
    "balanced_batches": Moves(True, MADE),
    "head_share": Moves(0.7, MADE),
    "flip": Moves(False, MADE),
    "augment": Moves(0.7, MADE),
    "precision": Moves("bf16", MADE),
    "seed": Moves(7, MADE),
}

WEIGHTS = {
    "quality.network": "inception", "dataset.image_size": 32, "quality.inception_weights": "one.pth",
}
QUALITY = {
    "network": Moves("inception", {"quality"}, {"dataset.image_size": 32}),
    "inception_weights": Moves("other.pth", where=WEIGHTS),  # of one content; of two: test_inception.py
    "images": Moves(700, {"quality"}),
    "neighbours": Moves(7, {"quality"}),
    "kid_subsets": Moves(7, {"quality"}),
    "kid_subset_size": Moves(70, {"quality"}),
}

TABLE: dict[str, Moves] = {
    "seed": Moves(7, {"extractor", "scores", "classifier", *MADE}),
    "method": Moves("mixup", CLASSIFIER, {"synthetic": True}),
    "synthetic": Moves(False, CLASSIFIER, {"method": "mixup", "synthetic": True}),
    "select": Moves("validation", where={"dataset.validation_per_class": 3}),
    **{f"dataset.{k}": v for k, v in DATASET.items()},
    **training("extractor", {"extractor", "scores", "classifier"}),
    **{f"generator.{k}": v for k, v in GENERATOR.items()},
    "generation.per_class": Moves(7, POOL, idle=ALONE),
    "generation.sampler": Moves("ddpm", {*POOL, "quality"}),
    "generation.steps": Moves(7, {*POOL, "quality"}),
    "generation.guidance": Moves(0.7, {*POOL, "quality"}),
    "generation.seed": Moves(7, {*POOL, "quality"}),
    "filter.threshold": Moves(0.7, CLASSIFIER, idle=ALONE),
    "filter.bands": Moves(("ID",), CLASSIFIER, {"filter.threshold": None, "filter.bands": ("AID",)}),
    "filter.distance": Moves("nearest", {"scores", "classifier"}),
    "filter.normalise": Moves(True, {"scores", "classifier"}),
    "filter.scope": Moves("global", {"scores", "classifier"}),
    "filter.agreement": Moves(True, CLASSIFIER, idle=ALONE),
    **training("classifier", CLASSIFIER),
    **OF_METHODS,
    **{f"quality.{k}": v for k, v in QUALITY.items()},
    **training("quality.reference", {"reference", "quality"}),
    **{f"resources.{s}.{k}": Moves(7) for s in STAGES for k in ("workers", "cpus", "gpus", "readers")},
    **{f"resources.{s}.{k}": Moves(False) for s in STAGES for k in ("keep_memory", "tuned")},
    **{f"resources.{s}.compile": Moves(True) for s in STAGES},
    **{f"resources.{s}.graphs": Moves(True, where=compiled(s)) for s in STAGES},
    **{f"resources.{s}.compute": Moves("actors") for s in ("images", "scores", "quality")},
    "resources.generator.accumulate": Moves(7),
    "resources.generator.max_workers": Moves(7),
}


def leaves(model: type[BaseModel] = Experiment, prefix: str = "") -> list[str]:
    """Every dotted field of a model that is no section itself."""
    found = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += leaves(kind, f"{prefix}{name}.") if inner else [prefix + name]
    return found


def with_values(values: dict[str, Any]) -> Experiment:
    """An experiment of dotted keys."""
    nested: dict[str, Any] = {}
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        section = nested
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return Experiment.model_validate(nested)


def keys(values: dict[str, Any]) -> dict[str, str]:
    return {s.name: s.key for s in pipeline.stages(with_values(values))}


@pytest.fixture(autouse=True)
def of_one_content(monkeypatch):
    """Sets and weights that are not there have a content all the same; the table is of fields."""
    of_set, of_weights = pipeline.identity, pipeline.identity_of_weights
    monkeypatch.setattr(pipeline, "identity", lambda d: of_set(d) if d.name == "digits" else d.name)
    monkeypatch.setattr(pipeline, "identity_of_weights", lambda w: of_weights(w) if w is None else "content")


def test_the_table_has_every_field_and_no_other():
    assert sorted(leaves()) == sorted(TABLE), "say in TABLE whether a new field changes keys"


@pytest.mark.parametrize("name", leaves())
def test_a_field_changes_the_keys_that_the_table_says(name):
    moves = TABLE[name]
    context = {**BASE, **moves.where}
    before, after = keys(context), keys({**context, name: moves.value})
    there = set(before) & set(after)
    assert {s for s in there if before[s] != after[s]} == set(moves.stages) & there
    assert moves.stages <= {*before, *after}


@pytest.mark.parametrize("name", [n for n, m in TABLE.items() if m.idle is not None])
def test_a_field_that_means_nothing_there_changes_no_key(name):
    context = {**BASE, **TABLE[name].idle}
    assert keys(context) == keys({**context, name: TABLE[name].value})


def test_every_training_field_is_in_the_table_for_its_three_networks():
    for section in ("extractor", "classifier", "quality.reference"):
        assert {f"{section}.{k}" for k in ClassifierTraining.model_fields} <= set(TABLE)
