"""Extractor, reference and final classifier: one training loop on different images.

Recipe: LDAM-DRW's public code. The last step's accuracy is the result, never the best one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.stages import Order, feed
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
    from diffult_ray.data.references import References
    from diffult_ray.stages.pool import Pool

CURVE_POINTS = 100
POINT_STEPS = 50  # at most, since checkpoints are made at the curve's points
PACKED_POOL = "pool.arrow"
OUTPUT_BATCH = 512  # images a forward pass that only measures


@dataclass(frozen=True)
class TrainingSet:
    """Images [n, C, H, W] uint8 or references to them, labels [n], weights [n], and how many were
    generated and kept."""

    images: torch.Tensor | References
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
        payload = _payload(order, part=None)
        run_here(_loop, payload, resources=resources, work=order.work, site=order.site)


def _train(name: str, orders: Sequence[Order], resources: Any, *, part: str | None) -> None:
    (order,) = orders
    payload = _payload(order, part=part)
    name = f"{name}-{order.out.name}"
    train(_loop, payload, resources=resources, work=order.work, name=name, site=order.site)
    order.site.fetch(order.out)


def _payload(order: Order, *, part: str | None) -> dict[str, Any]:
    inputs = {k: str(v) for k, v in order.inputs.items()}
    if "scores" in inputs and files.read_json(order.inputs["split"] / "split.json")["streamed"]:
        _pack_pool(order)
    return {
        "config": dict(order.config), "inputs": inputs, "out": str(order.out), "part": part,
        "packed_pool": str(order.work / PACKED_POOL),
    }


def _pack_pool(order: Order) -> None:
    """The generated images as a file that is read at random, as the real ones are streamed."""
    from diffult_ray.data.references import pack
    from diffult_ray.stages.pool import read_pool

    batches = read_pool(order.inputs["scores"]).table.select(["image"]).to_batches(max_chunksize=1000)
    contents = ([image["bytes"] for image in batch.column(0).to_pylist()] for batch in batches)
    pack(order.work / PACKED_POOL, contents)
    order.site.publish(order.work / PACKED_POOL)


# --- what is trained on -------------------------------------------------------------------------


def training_set(payload: Mapping[str, Any], split: Split) -> TrainingSet:
    """What is trained on: the real images, then the kept synthetic ones, then copies of real ones."""
    import torch

    config, part = payload["config"], payload["part"] or "train"
    labels = torch.from_numpy(getattr(split, part).labels)
    data = TrainingSet(feed.pictures(split, part), labels, torch.ones(len(labels)))
    if "scores" in payload["inputs"]:
        data = _with_synthetic(data, payload)
    if config.get("method") == "oversample":
        data = _with_copies(data, config, real=len(labels), num_classes=split.num_classes)
    return data


def _with_synthetic(real: TrainingSet, payload: Mapping[str, Any]) -> TrainingSet:
    """And the kept synthetic images at weight omega, in the order of their ids.

    Raises:
        ValueError: bands that hold none of the images. A threshold may keep none: it is then the CE row.
    """
    import torch

    from diffult_ray.stages.pool import read_pool

    config = payload["config"]
    pool = read_pool(payload["inputs"]["scores"])
    mask = kept(config["filter"], pool)
    omega = torch.full((int(mask.sum()),), config["synthetic_weight"])
    return TrainingSet(
        images=feed.join(real.images, _of_pool(pool, mask, real.images, payload["packed_pool"])),
        labels=torch.cat([real.labels, pool.labels[mask]]),
        weights=torch.cat([real.weights, omega]),
        generated=len(mask),
        kept=int(mask.sum()),
    )


def _of_pool(pool, mask: torch.Tensor, beside: torch.Tensor | References, packed_pool: str):
    """The pool's images under a mask, in the way of those that they train beside."""
    if isinstance(beside, feed.References):
        channels, size, _ = beside.shape
        every = feed.packed(Path(packed_pool), len(pool), channels=channels, image_size=size)
        return every.take(mask.nonzero()[:, 0].numpy())
    return pool.images[mask]


def kept(rule: Mapping[str, Any], pool: Pool) -> torch.Tensor:
    """[n] bool, the images of a scored pool that the filter keeps. Raises ValueError as above."""
    from diffult_ray.method.bands import keep

    threshold = None if rule["threshold"] is None else float(rule["threshold"])
    agrees = pool.agrees if rule["agreement"] else None
    mask = keep(pool.distance, pool.band, threshold=threshold, bands=rule["bands"], agrees=agrees)
    if rule["bands"] is not None and not mask.any():
        agreeing = " with filter.agreement" if rule["agreement"] else ""
        raise ValueError(
            f"filter.bands [{', '.join(rule['bands'])}]{agreeing} keeps none of the {len(mask)} images: "
            "name another band, or set filter.threshold"
        )
    return mask


def _with_copies(data: TrainingSet, config: Mapping[str, Any], *, real: int, num_classes: int) -> TrainingSet:
    """And as many copies of real images as each class lacks of N_t beside its synthetic ones."""
    import torch

    from diffult_ray.method.classification import oversample_indices

    beside = torch.bincount(data.labels[real:], minlength=num_classes).tolist()
    extra = oversample_indices(data.labels[:real], config["per_class"], config["seed"], beside=beside)
    every = torch.cat([torch.arange(len(data.labels)), extra])
    return replace(
        data, images=feed.take(data.images, every), labels=data.labels[every], weights=data.weights[every]
    )


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


def augmentation(config: Mapping[str, Any], split: Split) -> feed.Augmentation | None:
    """What is done to a training image at its own resolution; None for what is done to batches."""
    if config["augmentation"] == "crop":
        return None
    return feed.Augmentation(
        image_size=split.image_size,
        channels=split.channels,
        scale=(config["crop_area"], 1.0),
        flip=config["flip"],
        jitter=config["jitter"],
    )


def _batch_draws(config: Mapping[str, Any], split: Split, step: int, device: torch.device) -> Any:
    """Crop, flip and cutout of the whole batch of a step."""
    from diffult_ray.data.batches import Draw, draw, generator

    if config["augmentation"] != "crop":
        return Draw()
    return draw(
        config["batch_size"], generator(config["seed"], "augment", step, device=device),
        padding=config["crop_padding"], flip=config["flip"],
        cutout=config["cutout"], image_size=split.image_size,
    )


def _plan(run: Run, config, split: Split, objective, *, n: int, first: int, total: int) -> feed.Plan:
    """A rank's rows of each batch, and, of a method that mixes, their partners after them."""
    from diffult_ray.data.batches import share

    seed, batch = config["seed"], config["batch_size"]
    mine = share(batch, rank=run.rank, world=run.world)

    def partners(step: int) -> torch.Tensor:
        mixing = objective.mixing(seed, step, batch)
        return mixing.partner[mine]

    mixes = objective.mixing(seed, 0, batch) is not None
    return feed.Plan(
        feed.Epochs(seed, batch, n), mine, first, total, partners=partners if mixes else None,
        augmentation=augmentation(config, split), seed=seed,
    )


def _mixed(images: torch.Tensor, mixing: Any) -> torch.Tensor:
    """A rank's own images, mixed with the partners that come after them; all of them without mixing."""
    if mixing is None:
        return images
    from diffult_ray.method.classification import mixup

    own, partners = images.chunk(2)
    return mixup(own, partners, mixing.share)


def _network(config: Mapping[str, Any], split: Split) -> dict[str, Any]:
    return {
        "architecture": config["architecture"],
        "num_classes": split.num_classes,
        "channels": split.channels,
        "image_size": split.image_size,
        "scale": config.get("scale"),
    }


def _optimizer(model, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    import torch

    return torch.optim.SGD(
        model.parameters(),
        lr=config["learning_rate"],
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
        fused=True,
    )


def _loop(run: Run, payload: Mapping[str, Any]) -> None:
    import torch

    from diffult_ray.data import load_split
    from diffult_ray.data.batches import augment
    from diffult_ray.method.device import autocast, placed_classifier
    from diffult_ray.method.objectives import make_objective
    from diffult_ray.models import build_classifier
    from diffult_ray.seeds import stream

    config, seed = payload["config"], payload["config"]["seed"]
    split = load_split(payload["inputs"]["split"])
    data = training_set(payload, split)
    torch.manual_seed(stream(seed, "weights"))
    network = _network(config, split)
    model, layout, precision = placed_classifier(
        build_classifier(**network), run.given, run.device, precision=config["precision"],
        image_size=split.image_size,
    )
    optimizer = _optimizer(model, config)
    first, history = _restore(run, model, optimizer)
    wrapped = run.distribute(model)
    normalise = Normaliser.of(split, run.device)
    labels, weights = data.labels.to(run.device), data.weights.to(run.device)
    total, batch = total_steps(config, len(labels)), config["batch_size"]
    objective = make_objective(config, labels, weights, num_classes=split.num_classes, steps=total)
    plan = _plan(run, config, split, objective, n=len(labels), first=first, total=total)
    images = feed.make(data.images, plan, device=run.device, readers=run.readers, site=run.site)
    recorder = Recorder(history, total, batch)

    model.train()
    for step in range(first, total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, config)
        index = plan.indices(step).to(run.device, non_blocking=True)
        drawn = _batch_draws(config, split, step, run.device).only(plan.rows(step))
        x = augment(images(step), drawn, padding=config["crop_padding"], cutout=config["cutout"])
        mixing = objective.mixing(seed, step, batch)
        x = _mixed(normalise(x), mixing).contiguous(memory_format=layout)
        with autocast(run.device, precision, split.image_size):
            logits = wrapped(x)
        # Divided by the whole batch's weight or number, so that ranks share one weighted mean.
        loss = run.world * objective.loss(
            logits, labels[index], weights[index], step=step, rows=plan.mine, mixing=mixing
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if recorder.add(step + 1, loss, run.average):
            run.tell(step + 1, total, loss=recorder.last)
            if step + 1 < total and run.should_save():
                state = {**prefixed("model", model.state_dict()), **optimizer_tensors(optimizer)}
                run.save(state, {"step": step + 1, "history": recorder.rows})
    images.close()
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
        self._mean, self._std = torch.tensor(mean, device=device), torch.tensor(std, device=device)

    @classmethod
    def of(cls, split: Split, device: torch.device) -> Normaliser:
        return cls(split.facts["mean"], split.facts["std"], device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        from diffult_ray.data.batches import normalise

        return normalise(images, self._mean, self._std)


# --- what is kept of it -------------------------------------------------------------------------


def load_classifier(folder: str | Path, device: torch.device) -> tuple[Any, Normaliser]:
    """A stored classifier in evaluation mode, and its normalisation."""
    from diffult_ray.models import build_classifier

    facts = files.read_json(Path(folder) / "model.json")
    arguments = {k: facts[k] for k in ("architecture", "num_classes", "channels", "image_size")}
    model = build_classifier(**arguments, scale=facts.get("scale"))
    model.load_state_dict(files.read_tensors(Path(folder) / "model.safetensors"))
    return model.to(device).eval(), Normaliser(facts["mean"], facts["std"], device)


def outputs(model, normalise, images: torch.Tensor, device, batch: int = OUTPUT_BATCH):
    """Features [n, d] and logits [n, classes] on the CPU of uint8 images [n, C, H, W]."""
    return _outputs(model, normalise, images.split(batch), device)


def part_outputs(model, normalise, split: Split, part: str, run: Run, *, margin: float):
    """The same of a split's part, in memory or streamed.

    Args:
        margin: short side over the centre crop, where the part is streamed.
    """
    every = feed.InOrder(OUTPUT_BATCH, len(getattr(split, part)))
    plan = feed.Plan(every, slice(None), 0, every.steps, margin=margin)
    pictures = feed.pictures(split, part)
    images = feed.make(pictures, plan, device=run.device, readers=run.readers, site=run.site)
    return _outputs(model, normalise, map(images, range(every.steps)), run.device)


def _outputs(model, normalise, batches: Iterable[torch.Tensor], device):
    import torch

    model.eval()
    features, logits = [], []
    with torch.no_grad():
        for part in batches:
            found = model.features(normalise(part.to(device)))
            features.append(found.float().cpu())
            logits.append(model.head(found).float().cpu())
    if not features:
        return torch.empty(0, model.head.in_features), torch.empty(0, model.head.out_features)
    return torch.cat(features), torch.cat(logits)


def _finish(run, payload, model, network, split, data, normalise, recorder) -> None:
    """Write weights, predictions, features and, last, the summary."""
    out = Path(payload["out"])
    facts = {**network, "class_names": split.class_names, "mean": normalise.mean, "std": normalise.std}
    files.write_json(out / "model.json", facts)
    files.write_tensors(out / "model.safetensors", model.state_dict())
    margin = feed.EVALUATION_MARGIN if payload["config"]["augmentation"] == "resized_crop" else 1.0

    def found(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        return part_outputs(model, normalise, split, part, run, margin=margin)

    predictions = {part: found(part)[1] for part in ("validation", "test")}
    files.write_tensors(out / "predictions.safetensors", predictions)
    if payload["part"]:
        features, logits = found(payload["part"])
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
    run.site.publish_soon(out)


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
