"""Extractor, reference and final classifier: one training loop on different images.

Recipe: LDAM-DRW's public code. The last step's accuracy is the result, never the best one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.stages import Order
from diffult_ray.stages.training import (
    Run,
    load_optimizer,
    optimizer_tensors,
    prefixed,
    run_here,
    train,
    unprefixed,
)

if TYPE_CHECKING:
    import torch

    from diffult_ray.data import Split

CURVE_POINTS = 100
POINT_STEPS = 50  # at most, since checkpoints are made at the curve's points


@dataclass(frozen=True)
class TrainingSet:
    """Images [n, C, H, W] uint8, labels [n], weights [n], and how many were generated and kept."""

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    generated: int = 0
    kept: int = 0


def build_extractor(orders: Sequence[Order], resources: Any) -> None:
    """phi_0: the plain classifier of the long-tailed set, and its features of the training images."""
    _train("extractor", orders, resources, part="train")


def build_reference(orders: Sequence[Order], resources: Any) -> None:
    """The classifier of the full balanced set, and its features of that set."""
    _train("reference", orders, resources, part="balanced")


def build(orders: Sequence[Order], resources: Any) -> None:
    """The final classifier: in this process with one worker, under a TorchTrainer with more."""
    if resources.workers > 1:
        _train("classifier", orders, resources, part=None)
    else:
        (order,) = orders
        run_here(_loop, _payload(order, part=None), resources=resources, work=order.work)


def _train(name: str, orders: Sequence[Order], resources: Any, *, part: str | None) -> None:
    (order,) = orders
    payload = _payload(order, part=part)
    train(_loop, payload, resources=resources, work=order.work, name=f"{name}-{order.out.name}")


def _payload(order: Order, *, part: str | None) -> dict[str, Any]:
    inputs = {k: str(v) for k, v in order.inputs.items()}
    return {"config": dict(order.config), "inputs": inputs, "out": str(order.out), "part": part}


# --- what is trained on -------------------------------------------------------------------------


def training_set(
    config: Mapping[str, Any], inputs: Mapping[str, str], split: Split, part: str | None
) -> TrainingSet:
    """What is trained on: the real images, then the kept synthetic ones, then copies of real ones."""
    import torch

    chosen = getattr(split, part or "train")
    images, labels = torch.from_numpy(chosen.images), torch.from_numpy(chosen.labels)
    data = TrainingSet(images, labels, torch.ones(len(labels)))
    if "scores" in inputs:
        data = _with_synthetic(data, config, inputs["scores"])
    if config.get("method") == "oversample":
        data = _with_copies(data, config, real=len(labels), num_classes=split.num_classes)
    return data


def _with_synthetic(real: TrainingSet, config: Mapping[str, Any], folder: str) -> TrainingSet:
    """And the kept synthetic images at weight omega, in the order of their ids."""
    import torch

    from diffult_ray.method.bands import keep
    from diffult_ray.stages.pool import read_pool

    pool = read_pool(folder)
    rule = config["filter"]
    threshold = None if rule["threshold"] is None else float(rule["threshold"])
    mask = keep(pool.distance, pool.band, threshold=threshold, bands=rule["bands"])
    omega = torch.full((int(mask.sum()),), config["synthetic_weight"])
    return TrainingSet(
        images=torch.cat([real.images, pool.images[mask]]),
        labels=torch.cat([real.labels, pool.labels[mask]]),
        weights=torch.cat([real.weights, omega]),
        generated=len(mask),
        kept=int(mask.sum()),
    )


def _with_copies(data: TrainingSet, config: Mapping[str, Any], *, real: int, num_classes: int) -> TrainingSet:
    """And as many copies of real images as each class lacks of N_t beside its synthetic ones."""
    import torch

    from diffult_ray.method.classification import oversample_indices

    beside = torch.bincount(data.labels[real:], minlength=num_classes).tolist()
    extra = oversample_indices(data.labels[:real], config["per_class"], config["seed"], beside=beside)
    every = torch.cat([torch.arange(len(data.labels)), extra])
    return replace(data, images=data.images[every], labels=data.labels[every], weights=data.weights[every])


# --- the training loop --------------------------------------------------------------------------


def learning_rate(step: int, total: int, config: Mapping[str, Any]) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then cosine, or x0.01 at 80% and 90%."""
    base, warm = config["learning_rate"], max(1, round(config["warmup"] * total))
    rise = min(1.0, (step + 1) / warm)
    if config["schedule"] == "cosine":
        return base * rise * 0.5 * (1 + math.cos(math.pi * step / total))
    return base * rise * 0.01 ** ((step >= 0.8 * total) + (step >= 0.9 * total))


def total_steps(config: Mapping[str, Any], n: int) -> int:
    if config["steps"] is not None:
        return config["steps"]
    return (config["epochs"] or 200) * math.ceil(n / config["batch_size"])


def _loop(run: Run, payload: Mapping[str, Any]) -> None:
    import torch

    from diffult_ray.data import load_split
    from diffult_ray.data.batches import batch_indices, generator, random_crop, random_flip, share
    from diffult_ray.method.classification import mixup
    from diffult_ray.method.device import autocast, memory_format
    from diffult_ray.method.objectives import make_objective
    from diffult_ray.models import build_classifier
    from diffult_ray.seeds import stream

    config, seed = payload["config"], payload["config"]["seed"]
    split = load_split(payload["inputs"]["split"])
    data = training_set(config, payload["inputs"], split, payload["part"])
    layout = memory_format(run.device, split.image_size, network="classifier")
    torch.manual_seed(stream(seed, "weights"))
    network = {
        "architecture": config["architecture"],
        "num_classes": split.num_classes,
        "channels": split.channels,
        "image_size": split.image_size,
        "scale": config.get("scale"),
    }
    model = build_classifier(**network).to(run.device, memory_format=layout)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config["learning_rate"],
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
        fused=True,
    )
    first, history = _restore(run, model, optimizer)
    wrapped = run.distribute(model)
    normalise = Normaliser.of(split, run.device)
    images, labels, weights = (x.to(run.device) for x in (data.images, data.labels, data.weights))
    total, batch = total_steps(config, len(labels)), config["batch_size"]
    mine = share(batch, rank=run.rank, world=run.world)
    objective = make_objective(config, labels, weights, num_classes=split.num_classes, steps=total)
    recorder = Recorder(history, total, batch)

    model.train()
    for step in range(first, total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, config)
        index = batch_indices(seed=seed, step=step, batch_size=batch, n=len(labels)).to(run.device)
        rng = generator(seed, "augment", step, device=run.device)
        x = random_crop(images[index], config["crop_padding"], rng)
        x = random_flip(x, rng) if config["flip"] else x
        mixing = objective.mixing(seed, step, batch)
        own = normalise(x[mine])
        if mixing is not None:
            own = mixup(own, normalise(x[mixing.partner[mine].to(run.device)]), mixing.share)
        with autocast(run.device, config["precision"], split.image_size):
            logits = wrapped(own.contiguous(memory_format=layout))
        # Divided by the whole batch's weight or number, so that ranks share one weighted mean.
        loss = run.world * objective.loss(
            logits, labels[index], weights[index], step=step, rows=mine, mixing=mixing
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if recorder.add(step + 1, loss, run.average):
            run.tell(step + 1, total, loss=recorder.last)
            if step + 1 < total and run.should_save():
                state = {**prefixed("model", model.state_dict()), **optimizer_tensors(optimizer)}
                run.save(state, {"step": step + 1, "history": recorder.rows})
    if run.is_first:
        _finish(run, payload, model, network, split, data, normalise, recorder)
    run.tell(total, total)


def _restore(run: Run, model, optimizer) -> tuple[int, list]:
    kept = run.restore()
    if kept is None:
        return 0, []
    tensors, numbers = kept
    model.load_state_dict(unprefixed("model", tensors))
    load_optimizer(optimizer, tensors)
    return numbers["step"], numbers["history"]


class Recorder:
    """The loss curve: a hundred points, or one every 50 steps; no synchronisation between them."""

    def __init__(self, rows: list, total: int, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.every = min(POINT_STEPS, max(1, total // CURVE_POINTS))
        self.total, self._sum, self._count = total, 0.0, 0
        self._before = rows[-1]["seconds"] if rows else 0.0
        self._start = time.monotonic()

    @property
    def last(self) -> float:
        return self.rows[-1]["loss"]

    def add(self, step: int, loss: torch.Tensor, average: Callable[[torch.Tensor], float]) -> bool:
        """Count a step's loss; true when a point was added, on every rank at the same step.

        Args:
            average: over the ranks, so that the curve is the whole batch's.

        Raises:
            FloatingPointError: if the training has diverged.
        """
        self._sum, self._count = self._sum + loss.detach(), self._count + 1
        if step % self.every and step != self.total:
            return False
        seconds = self._before + time.monotonic() - self._start
        rate = self.batch_size * self._count / max(1e-9, seconds - self._last_seconds)
        mean = average(self._sum / self._count)
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is not finite at step {step}: lower learning_rate")
        row = {"step": step, "seconds": round(seconds, 3), "loss": mean}
        self.rows.append({**row, "images_per_second": round(rate, 1)})
        self._sum, self._count = 0.0, 0
        return True

    @property
    def _last_seconds(self) -> float:
        return self.rows[-1]["seconds"] if self.rows else 0.0


class Normaliser:
    """uint8 images -> (x / 255 - mean) / std with the training images' statistics a channel."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        import torch

        self.mean, self.std = mean, std
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._scale = 1 / torch.tensor(std, device=device).view(1, -1, 1, 1)

    @classmethod
    def of(cls, split: Split, device: torch.device) -> Normaliser:
        pixels = split.train.images / 255.0
        mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
        return cls(mean.round(4).tolist(), std.clip(1e-3).round(4).tolist(), device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - self._mean) * self._scale


# --- what is kept of it -------------------------------------------------------------------------


def load_classifier(folder: str | Path, device: torch.device) -> tuple[Any, Normaliser]:
    """A stored classifier in evaluation mode, and its normalisation."""
    from diffult_ray.models import build_classifier

    facts = files.read_json(Path(folder) / "model.json")
    arguments = {k: facts[k] for k in ("architecture", "num_classes", "channels", "image_size")}
    model = build_classifier(**arguments, scale=facts.get("scale"))
    model.load_state_dict(files.read_tensors(Path(folder) / "model.safetensors"))
    return model.to(device).eval(), Normaliser(facts["mean"], facts["std"], device)


def outputs(model, normalise, images: torch.Tensor, device, batch: int = 512):
    """Features [n, d] and logits [n, classes] on the CPU of uint8 images [n, C, H, W]."""
    import torch

    model.eval()
    features, logits = [], []
    with torch.no_grad():
        for part in images.split(batch):
            found = model.features(normalise(part.to(device)))
            features.append(found.float().cpu())
            logits.append(model.head(found).float().cpu())
    if not features:
        return torch.empty(0, model.head.in_features), torch.empty(0, model.head.out_features)
    return torch.cat(features), torch.cat(logits)


def _finish(run, payload, model, network, split, data, normalise, recorder) -> None:
    """Write weights, predictions, features and, last, the summary."""
    import torch

    out = Path(payload["out"])
    facts = {**network, "class_names": split.class_names, "mean": normalise.mean, "std": normalise.std}
    files.write_json(out / "model.json", facts)
    files.write_tensors(out / "model.safetensors", model.state_dict())
    predictions = {}
    for part in ("validation", "test"):
        shown = torch.from_numpy(getattr(split, part).images)
        predictions[part] = outputs(model, normalise, shown, run.device)[1]
    files.write_tensors(out / "predictions.safetensors", predictions)
    if payload["part"]:
        shown = torch.from_numpy(getattr(split, payload["part"]).images)
        features, logits = outputs(model, normalise, shown, run.device)
        files.write_tensors(out / "features.safetensors", {"features": features, "logits": logits})
    files.write_json(out / "history.json", recorder.rows)
    files.write_json(out / "summary.json", {
        **_measures(predictions, split),
        "generated": data.generated,
        "kept": data.kept,
        "train_images": len(data.labels),
        "steps": recorder.total,
        "loss": recorder.last,
        "images_per_second": recorder.rows[-1]["images_per_second"],
        "train_seconds": recorder.rows[-1]["seconds"],
    })


def _measures(predictions: Mapping[str, torch.Tensor], split: Split) -> dict[str, Any]:
    import torch

    from diffult_ray.method.classification import accuracies, calibration

    targets = torch.from_numpy(split.test.labels)
    found = accuracies(predictions["test"].argmax(1), targets, train_counts=split.counts)
    found |= calibration(predictions["test"].softmax(1), targets)
    if len(split.validation):
        chosen = predictions["validation"].argmax(1).numpy() == split.validation.labels
        found["validation_accuracy"] = 100.0 * float(chosen.mean())
    return found
