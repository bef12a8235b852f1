"""Scoring: distance in units of d_f, band and nearest real image of every generated image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diffult_ray import files
from diffult_ray.stages import pool
from diffult_ray.stages.dataflow import IO_CPUS, map_with_actors
from diffult_ray.stages.images import write_table


class ScoreRows:
    """A table of images to the same table with the score columns."""

    def __init__(
        self, *, extractor: str, split: str, config: dict, cpus: float, gpus: float
    ) -> None:
        import torch

        from diffult_ray.data import load_split
        from diffult_ray.method import device
        from diffult_ray.method.bands import class_statistics
        from diffult_ray.stages.classifier import load_classifier

        torch.set_num_threads(max(1, int(cpus)))
        self.device, self.config = device.pick(gpus), config
        self.model, self.normalise = load_classifier(extractor, self.device)
        real = load_split(split)
        features = files.read_tensors(Path(extractor) / "features.safetensors")["features"]
        self.real_labels = torch.from_numpy(real.train.labels).to(self.device)
        self.real_features = features.to(self.device)
        self.statistics = class_statistics(
            self.real_features,
            self.real_labels,
            real.num_classes,
            normalise=config["normalise"],
            scope=config["scope"],
        )

    def __call__(self, rows: pa.Table) -> pa.Table:
        import torch

        from diffult_ray.method.bands import BANDS, band, distances, nearest_real
        from diffult_ray.stages.classifier import outputs

        images = torch.from_numpy(pool.decode(rows["image"].to_pylist()))
        labels = torch.from_numpy(rows["label"].to_numpy().copy()).to(self.device)
        features, logits = outputs(self.model, self.normalise, images, self.device)
        features = features.to(self.device)
        real = {"real_features": self.real_features, "real_labels": self.real_labels}
        distance = distances(features, labels, self.statistics, to=self.config["distance"], **real)
        nearest, nearest_distance = nearest_real(features, labels, **real)
        columns = {
            "distance": distance.double().cpu().numpy(),
            "band": [BANDS[code] for code in band(distance).tolist()],
            "nearest": nearest.cpu().numpy(),
            "nearest_distance": nearest_distance.float().cpu().numpy(),
            "predicted": logits.argmax(1).numpy(),
        }
        for name, kind in pool.SCORE_FIELDS:
            rows = rows.append_column(name, pa.array(columns[name], type=kind))
        return rows


def build(config, inputs, out, *, resources, work) -> None:
    """The pool with its scores, in `out/pool`."""
    import ray.data

    source = Path(inputs["images"]) / "pool"
    arguments = {
        "extractor": str(inputs["extractor"]), "split": str(inputs["split"]), "config": dict(config),
    }
    parts = Path(work) / "parts"
    if pq.read_table(source, columns=["id"]).num_rows:
        data = ray.data.read_parquet(str(source), num_cpus=IO_CPUS)
        scored = map_with_actors(data, ScoreRows, arguments, resources=resources)
        scored.write_parquet(str(parts), ray_remote_args={"num_cpus": IO_CPUS}, mode="overwrite")
        table = pq.read_table(parts)
    else:
        table = pool.IMAGE_SCHEMA.empty_table()
        for name, kind in pool.SCORE_FIELDS:
            table = table.append_column(name, pa.array([], type=kind))
    table = table.sort_by([("label", "ascending"), ("id", "ascending")])
    write_table(table, Path(out) / "pool")
    shares = Counter(table["band"].to_pylist())
    n = max(1, table.num_rows)
    files.write_json(Path(out) / "summary.json", {
        "images": table.num_rows,
        "p_id": shares["ID"] / n,
        "p_aid": shares["AID"] / n,
        "p_ood": shares["OOD"] / n,
    })
