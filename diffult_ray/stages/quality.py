"""FID and IS of a generator's images, drawn uniformly over classes and never stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from diffult_ray import files
from diffult_ray.stages import pool
from diffult_ray.stages.dataflow import from_rows, map_with_actors
from diffult_ray.stages.sampler import Sampler


class MeasureRows:
    """A table of rows to their reference features and logits, sampled on the way."""

    def __init__(
        self, *, generator: str, generation: dict, reference: str, cpus: float, gpus: float
    ) -> None:
        from diffult_ray.stages.classifier import load_classifier

        self.sampler = Sampler(generator, generation, cpus=cpus, gpus=gpus)
        self.model, self.normalise = load_classifier(reference, self.sampler.device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        import torch

        from diffult_ray.stages.classifier import outputs

        images = self.sampler(rows["label"].to_numpy(), rows["seed"].to_numpy())
        found = outputs(self.model, self.normalise, torch.from_numpy(images), self.sampler.device)
        features, logits = (pa.FixedSizeListArray.from_arrays(x.numpy().ravel(), x.shape[1]) for x in found)
        return pa.table({"seed": rows["seed"], "features": features, "logits": logits})


def build(config, inputs, out, *, resources, work) -> None:
    """Streamed in float64 against the full balanced training set."""
    from diffult_ray.data import load_split
    from diffult_ray.method.quality import InceptionScore, Moments, balanced_counts, frechet_distance

    classes = load_split(inputs["split"]).num_classes
    rows = pool.requests(balanced_counts(config["images"], classes), config["generation"]["seed"])
    place = {int(seed): i for i, seed in enumerate(rows["seed"].to_numpy())}
    data = from_rows(rows)
    arguments = {
        "generator": str(inputs["generator"]),
        "generation": dict(config["generation"]),
        "reference": str(inputs["reference"]),
    }
    measured = map_with_actors(data, MeasureRows, arguments, resources=resources)
    moments, score = Moments(), InceptionScore(splits=10)
    for batch in measured.iter_batches(batch_format="pyarrow", batch_size=None):
        features, logits = (_matrix(batch[name]) for name in ("features", "logits"))
        ids = np.array([place[int(seed)] for seed in batch["seed"].to_numpy()])
        moments.update(features)
        score.update(logits, ids)
    real = Moments()
    real.update(files.read_tensors(Path(inputs["reference"]) / "features.safetensors")["features"])
    mean, deviation = score.result()
    files.write_json(Path(out) / "summary.json", {
        "network": config["network"],
        "images": moments.count,
        "real_images": real.count,
        # Blocks arrive in any order: the last digits of the sums are not kept.
        "fid": float(f"{frechet_distance(moments, real):.9g}"),
        "inception_score": float(f"{mean:.9g}"),
        "inception_score_sd": float(f"{deviation:.9g}"),
    })


def _matrix(column: pa.ChunkedArray):
    import torch

    array = column.combine_chunks()
    return torch.from_numpy(np.array(array.flatten()).reshape(len(array), -1))
