"""The class-conditional diffusion model: its objective (DDPM or EDM), CBDM, the AID loss, EMA, under DDP.

Recipe: the public CBDM code. A run can stop at several numbers of steps on its way, since a
generator of fewer steps is a prefix of one of more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.snapshot import Snapshot
from diffult_ray.stages import Order, feed
from diffult_ray.stages.classifier import Recorder
from diffult_ray.stages.training import (
    STATE,
    Run,
    laid_out_as,
    load_optimizer,
    optimizer_tensors,
    prefixed,
    train,
    unprefixed,
)

if TYPE_CHECKING:
    import torch

    from diffult_ray.method.objective import Guide, Objective


def build(orders: Sequence[Order], resources: Any) -> None:
    """Train the last order's generator and write, on the way, those of the orders before it.

    Args:
        orders: alike but for `steps`, which ascend.
    """
    longest = orders[-1]
    payload = {
        "config": dict(longest.config),
        "inputs": {k: str(v) for k, v in longest.inputs.items()},
        "outs": {int(o.config["steps"]): str(o.out) for o in orders},
    }
    name = f"generator-{longest.out.name}"
    train(_loop, payload, resources=resources, work=longest.work, name=name, site=longest.site)
    for order in orders:
        order.site.fetch(order.out)


def _loop(run: Run, payload: Mapping[str, Any]) -> None:
    import torch

    from diffult_ray.data import load_split
    from diffult_ray.data.batches import augment, draw, generator, share
    from diffult_ray.method.device import autocast, placed
    from diffult_ray.seeds import stream
    from diffult_ray.stages.update import Update

    config, seed = payload["config"], payload["config"]["seed"]
    split = load_split(payload["inputs"]["split"])
    torch.manual_seed(stream(seed, "weights"))
    model, layout = placed(_network(config, split), run.given, run.device, precision=config["precision"])
    parameters = list(model.parameters())  # once: to walk a small network takes 5% of its step
    ema = _ema(model, config)
    optimizer = torch.optim.Adam(parameters, lr=config["learning_rate"], fused=True)
    first, history = _restore(run, payload["inputs"].get("start"), model, ema, optimizer)
    update = Update(parameters, optimizer, ema, most=config["gradient_clip"], given=run.given)
    wrapped = run.distribute(model, update)
    pictures, classes = _learnt(config, split)
    labels = classes.to(run.device)
    objective = _objective(payload, split, labels)
    chosen = _chooser(config, labels)
    outs, total, batch = payload["outs"], config["steps"], config["batch_size"]
    mine = share(batch, rank=run.rank, world=run.world)
    plan = feed.Plan(chosen, mine, first, total)
    images = feed.make(pictures, plan, device=run.device, readers=run.readers, site=run.site)
    recorder = Recorder(history, total, batch)

    def network(images, times, labels):
        return wrapped(images.contiguous(memory_format=layout), times, labels).sample.float()

    model.train()
    for step in range(first, total):
        for group in optimizer.param_groups:
            group["lr"] = config["learning_rate"] * min(1.0, (step + 1) / max(1, config["warmup_steps"]))
        index = chosen(step).to(run.device, non_blocking=True)
        rng = generator(seed, "diffusion", step, device=run.device)
        mirrored = draw(batch, rng, flip=config["flip"]).only(mine)
        x = augment(images(step), mirrored).float() / 127.5 - 1
        coins = generator(seed, "label drop", step)
        drawn = objective.draw(labels[index], x.shape[1:], rng, coins).only(mine)
        if config["dropout"] > 0:  # drawn from torch's own generators: the same wherever this run began
            torch.manual_seed(stream(seed, "dropout", step, run.rank))
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for rows in run.parts(wrapped, len(x)):
            with autocast(run.device, config["precision"], split.image_size):
                losses = objective.losses(network, x[rows], drawn.only(rows))
            part = losses.sum() * run.world / batch
            part.backward()
            loss = loss + part.detach()
        update.step()
        at_point = recorder.add(step + 1, loss, run.average)
        if run.is_first and step + 1 in outs:
            state = {"step": step + 1, "history": recorder.rows}
            Snapshot().take(_tensors(model, ema, optimizer), state).write(Path(outs[step + 1]) / STATE)
            _write(Path(outs[step + 1]), step + 1, model, ema, config, split, recorder.rows, first)
            run.site.publish_soon(outs[step + 1])
        if step + 1 in outs:
            update.wait()  # the averaged weights were in the parameters' place
        if at_point:
            run.tell(step + 1, total, loss=recorder.last)
            # After the writing: a run that goes on from here does not pass this step again.
            if step + 1 < total and run.should_save():
                run.save(_tensors(model, ema, optimizer), {"step": step + 1, "history": recorder.rows})
    images.close()
    run.tell(total, total)


def _learnt(config: Mapping[str, Any], split) -> tuple[torch.Tensor | feed.References, torch.Tensor]:
    """The training images and their labels, of head classes perhaps a share only."""
    import torch

    from diffult_ray.data.heads import head_subset

    labels = torch.from_numpy(split.train.labels)
    images = feed.pictures(split, "train")
    share = config.get("head_share", 1.0)
    if share == 1:
        return images, labels
    rows = torch.from_numpy(head_subset(split.train.labels, split.num_classes, share))
    return feed.take(images, rows), labels[rows]


def _objective(payload: Mapping[str, Any], split, labels: torch.Tensor) -> Objective:
    """The losses, and for an AID loss the extractor that guides it."""
    import torch

    from diffult_ray.method.objective import Objective

    counts = torch.bincount(labels, minlength=split.num_classes)
    guided = payload["config"]["aid_weight"] > 0
    guide = _guide(payload["inputs"]["extractor"], split, labels.device) if guided else None
    return Objective(payload["config"], counts, guide)


def _guide(extractor: str, split, device: torch.device) -> Guide:
    """The extractor, frozen, and what it makes of the training images.

    Ours: features as they are and d_f of the class, the defaults of `filter`. The filter's own settings
    do not reach the generator, so that a sweep over them has one generator.
    """
    import torch

    from diffult_ray.method.bands import class_statistics
    from diffult_ray.method.objective import Guide
    from diffult_ray.stages.classifier import load_classifier

    model, normalise = load_classifier(extractor, device)
    model.requires_grad_(False)
    real = files.read_tensors(Path(extractor) / "features.safetensors")["features"].to(device)
    labels = torch.from_numpy(split.train.labels).to(device)
    statistics = class_statistics(real, labels, split.num_classes, normalise=False, scope="class")
    return Guide(lambda images: model.features(normalise((images + 1) * 127.5)), statistics)


def _chooser(config: Mapping[str, Any], labels: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Global step -> indices of its batch, on the CPU."""
    from diffult_ray.data.batches import balanced_indices, class_members

    seed, batch = config["seed"], config["batch_size"]
    if config["balanced_batches"]:
        members = class_members(labels.cpu())
        return lambda step: balanced_indices(step=step, members=members, seed=seed, batch_size=batch)
    return feed.Epochs(seed, batch, len(labels))


def _network(config, split):
    from diffult_ray.method.conditions import CONDITIONS
    from diffult_ray.models import build_unet

    return build_unet(
        image_size=split.image_size,
        image_channels=split.channels,
        num_classes=split.num_classes,
        channels=config["channels"],
        blocks=config["blocks"],
        attention=config["attention"],
        dropout=config["dropout"],
        conditions=CONDITIONS if config["augment"] > 0 else 0,
    )


def _ema(model, config):
    """diffusers' EMA, warmed up so that a short run is not an average with its initial weights."""
    from diffusers.training_utils import EMAModel

    return EMAModel(
        model.parameters(), decay=config["ema"], use_ema_warmup=False, foreach=True
    )


def _tensors(model, ema, optimizer) -> dict[str, torch.Tensor]:
    shadow = {str(i): p for i, p in enumerate(ema.shadow_params)}
    return {
        **prefixed("model", model.state_dict()),
        **prefixed("ema", shadow),
        **optimizer_tensors(optimizer),
    }


def _restore(run: Run, start: str | None, model, ema, optimizer) -> tuple[int, list]:
    """Go on from the last checkpoint, or the generator of fewer steps, whichever is farther."""
    states = [run.restore(), files.read_state(Path(start) / STATE) if start else None]
    kept = [state for state in states if state is not None]
    if not kept:
        return 0, []
    tensors, numbers = max(kept, key=lambda state: state[1]["step"])
    model.load_state_dict(unprefixed("model", tensors))
    shadow = unprefixed("ema", tensors)
    own = enumerate(model.parameters())
    ema.shadow_params = [laid_out_as(p, shadow[str(i)]).to(run.device) for i, p in own]
    ema.optimization_step = numbers["step"]
    load_optimizer(optimizer, tensors)
    return numbers["step"], numbers["history"]


def _write(out: Path, step: int, model, ema, config, split, rows: list, first: int) -> None:
    """The averaged weights as a diffusers model folder, and, last, the summary.

    Args:
        first: step that this run began at.
    """
    from diffult_ray.method.diffusion import SIGMA_DATA

    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.save_pretrained(out / "unet", safe_serialization=True)
    ema.restore(model.parameters())
    files.write_json(out / "generator.json", {
        "objective": config["objective"],
        "timesteps": config.get("timesteps"),
        "sigma_data": SIGMA_DATA if config["objective"] == "edm" else None,
        "num_classes": split.num_classes,
    })
    files.write_json(out / "history.json", rows)
    files.write_json(out / "summary.json", {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "trained_now": step - first,
        "loss": rows[-1]["loss"] if rows else None,
        "images_per_second": rows[-1]["images_per_second"] if rows else None,
        "train_seconds": rows[-1]["seconds"] if rows else None,
    })
