"""FID, IS, KID, precision and recall of a generator's images, drawn uniformly over classes, never stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffult_ray import files
from diffult_ray.allotment import Allotment
from diffult_ray.errors import BadInput
from diffult_ray.stages import Order, pool
from diffult_ray.stages.dataflow import by_target, from_tables, map_rows, matrix, tell
from diffult_ray.stages.sampler import Samplers

SPLITS = 10  # of the inception score
SAMPLE = 10_000  # images of a side that KID, precision and recall are of, at most


# --- before anything is trained -----------------------------------------------------------------


def check(config: Mapping[str, Any], network: Mapping[str, Any], split: Mapping[str, Any]) -> list[str]:
    """What a quality stage will have to say of its numbers, from what is known before it.

    Args:
        config: the stage's own section.
        network: the section of the network that measures.
        split: `split.json`.

    Raises:
        BadInput: for measures that cannot be had.
    """
    from diffult_ray.method import inception

    real, size = split["parts"]["balanced"], split["image_size"]
    if config["network"] == "inception" and size < inception.SMALLEST:
        raise BadInput(
            where="quality.network", rule=f"inception needs images of {inception.SMALLEST} pixels or more",
            value=f"{size}x{size}", advice="set quality.network: reference",
        )
    if min(config["images"], real) <= config["neighbours"]:
        raise BadInput(
            where="quality.neighbours",
            rule=f"must be below the number of images, {config['images']} generated and {real} real",
            value=config["neighbours"], advice="lower it",
        )
    return notes(config["images"], real, _dimensions(config["network"], network, split))


def notes(images: int, real: int, dimensions: int) -> list[str]:
    """What a reader of the numbers must know, in sentences."""
    from diffult_ray.method.quality import ENOUGH

    if min(images, real) >= ENOUGH * dimensions:
        return []
    return [
        f"FID of {images} generated and {real} real images in {dimensions} dimensions is biased upwards: "
        f"compare it only at the same numbers ({ENOUGH * dimensions} or more of each would do)"
    ]


def _dimensions(name: str, network: Mapping[str, Any], split: Mapping[str, Any]) -> int:
    from diffult_ray.method import inception
    from diffult_ray.models import build_classifier

    if name == "inception":
        return inception.DIMENSIONS
    model = build_classifier(
        architecture=network["architecture"], num_classes=len(split["class_names"]),
        channels=split["channels"], image_size=split["image_size"],
    )
    return model.head.in_features


# --- measuring ----------------------------------------------------------------------------------


class MeasureRows:
    """Samples the rows it is given, and returns their features and logits."""

    def __init__(self, *, targets: list[dict[str, Any]], given: Allotment) -> None:
        from diffult_ray.stages.networks import load_network

        self.samplers = Samplers(targets, given=given)
        loaded: dict[str, Any] = {}
        for target in targets:
            folder = target["reference"]
            if folder not in loaded:
                here = target["site"].fetch(folder)
                loaded[folder] = load_network(target["network"], here, self.samplers.device)
        self.networks = [loaded[target["reference"]] for target in targets]

    def __call__(self, rows: pa.Table) -> pa.Table:
        return pa.concat_tables([self._measure(target, mine) for target, mine in by_target(rows)])

    def _measure(self, target: int, rows: pa.Table) -> pa.Table:
        images = self.samplers[target](rows["label"].to_numpy(), rows["seed"].to_numpy())
        found = self.networks[target](images)
        features, logits = (pa.FixedSizeListArray.from_arrays(x.numpy().ravel(), x.shape[1]) for x in found)
        targets = pa.array([target] * rows.num_rows, type=pa.int64())
        known = {name: rows[name] for name in ("label", "seed", "split", "sampled")}
        return pa.table({"target": targets, **known, "features": features, "logits": logits})


class Real:
    """A network's features of the full balanced set, and what is made of them once for all orders."""

    def __init__(self, reference: Path, split: Path) -> None:
        from diffult_ray.data import load_split

        self.features = files.read_tensors(reference / "features.safetensors")["features"].numpy()
        self.labels = load_split(split).balanced.labels

    @cached_property
    def moments(self) -> Any:
        from diffult_ray.method.quality import moments_of

        return moments_of(self.features)

    @cached_property
    def sample(self) -> np.ndarray:
        """[at most SAMPLE, d], always the same ones."""
        chosen = np.random.default_rng(0).permutation(len(self.features))[:SAMPLE]
        return self.features[np.sort(chosen)]

    def of_class(self, label: int) -> Any:
        """The moments of one class."""
        from diffult_ray.method.quality import moments_of

        return moments_of(self.features[self.labels == label])


class Measures:
    """One order's running sums, and the features of its sample.

    Only the classes that have enough images on both sides have sums of their own, so that those take
    no more memory than the features of all images would.
    """

    def __init__(self, wanted: pa.Table, real: Real) -> None:
        from diffult_ray.method.quality import ENOUGH, InceptionScore, Moments

        self.real = real
        self.moments, self.score = Moments(), InceptionScore(splits=SPLITS)
        labels = wanted["label"].to_numpy()
        self.classes = int(max(labels.max(), real.labels.max())) + 1
        few = np.minimum(*(np.bincount(x, minlength=self.classes) for x in (labels, real.labels)))
        enough = np.flatnonzero(few >= ENOUGH * real.features.shape[1])
        self.by_class = {int(label): Moments() for label in enough}
        self._seeds: list[np.ndarray] = []
        self._sampled: list[np.ndarray] = []

    def update(self, rows: pa.Table) -> None:
        features, logits = (matrix(rows[name]) for name in ("features", "logits"))
        self.moments.update(features)
        self.score.update(logits, rows["split"].to_numpy())
        labels, sampled = rows["label"].to_numpy(), rows["sampled"].to_numpy()
        for label, moments in self.by_class.items():
            moments.update(features[labels == label])
        self._seeds.append(rows["seed"].to_numpy()[sampled])
        self._sampled.append(features[sampled])

    @property
    def sample(self) -> np.ndarray:
        """[at most SAMPLE, d] in the order of the images' seeds, whichever block came first."""
        order = np.argsort(np.concatenate(self._seeds), kind="stable")
        return np.concatenate(self._sampled)[order]

    def per_class_fid(self) -> list[float | None]:
        from diffult_ray.method.quality import frechet_distance

        found: list[float | None] = [None] * self.classes
        for label, moments in self.by_class.items():
            found[label] = _rounded(frechet_distance(moments, self.real.of_class(label)))
        return found


def build(orders: Sequence[Order], resources: Any) -> None:
    """Streamed in float64 against the full balanced training set, 10 splits for IS."""
    wanted = [_wanted(order) for order in orders]
    targets = [_target(order) for order in orders]
    measured = map_rows(
        from_tables(wanted), MeasureRows, {"targets": targets}, resources=resources, order=orders[0]
    )
    places = [(order.inputs["reference"], order.inputs["split"]) for order in orders]
    reals = {place: Real(*place) for place in dict.fromkeys(places)}
    measures = [Measures(rows, reals[place]) for rows, place in zip(wanted, places, strict=True)]
    done, total = 0, sum(rows.num_rows for rows in wanted)
    for batch in measured.iter_batches(batch_format="pyarrow", batch_size=None):
        for target, rows in by_target(batch):
            measures[target].update(rows)
        done += batch.num_rows
        tell(orders[0], done, total)
    for order, each in zip(orders, measures, strict=True):
        _finish(order, each)


def _wanted(order: Order) -> pa.Table:
    from diffult_ray.method.quality import balanced_counts

    classes = len(files.read_json(order.inputs["split"] / "split.json")["class_names"])
    counts = balanced_counts(order.config["images"], classes)
    rows = pool.requests(counts, order.config["generation"]["seed"])
    rank = _ranks(rows["seed"].to_numpy())
    rows = rows.append_column("split", pa.array(rank * SPLITS // len(rank)))
    return rows.append_column("sampled", pa.array(rank < SAMPLE))


def _ranks(seeds: np.ndarray) -> np.ndarray:
    """Each image's place in the random order of the seeds: parts of it are equal, and blind to the class."""
    rank = np.empty(len(seeds), dtype=np.int64)
    rank[np.argsort(seeds)] = np.arange(len(seeds))
    return rank


def _target(order: Order) -> dict[str, Any]:
    return {
        "generator": str(order.inputs["generator"]),
        "generation": dict(order.config["generation"]),
        "reference": str(order.inputs["reference"]),
        "network": order.config["network"],
        "site": order.site,
    }


def _finish(order: Order, measures: Measures) -> None:
    from diffult_ray.method.quality import frechet_distance, kid, precision_recall

    config, real, moments = order.config, measures.real, measures.moments
    score, score_sd = measures.score.result()
    sides = measures.sample, real.sample
    distance, distance_sd = kid(*sides, subsets=config["kid_subsets"], subset_size=config["kid_subset_size"])
    precision, recall = precision_recall(*sides, neighbours=config["neighbours"])
    files.write_json(order.out / "summary.json", {
        "network": config["network"],
        "images": moments.count,
        "real_images": real.moments.count,
        "sampled_images": [len(side) for side in sides],  # that KID, precision and recall are of
        "fid": _rounded(frechet_distance(moments, real.moments)),
        "inception_score": _rounded(score),
        "inception_score_sd": _rounded(score_sd),
        "kid": _rounded(distance),
        "kid_sd": _rounded(distance_sd),
        "precision": _rounded(precision),
        "recall": _rounded(recall),
        "per_class_fid": measures.per_class_fid(),
        "notes": notes(moments.count, real.moments.count, len(moments.mean)),
    })


def _rounded(value: float) -> float:
    """Blocks arrive in any order: the last digits of the sums are not kept."""
    return float(f"{value:.9g}")
