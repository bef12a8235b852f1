"""The class-conditional diffusion model: DDPM loss, CBDM regulariser, EMA, under DDP.

Recipe: the public CBDM code. A run can stop at several numbers of steps on its way, since a
generator of fewer steps is a prefix of one of more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.stages import Order
from diffult_ray.stages.classifier import Recorder
from diffult_ray.stages.training import (
    Run,
    load_optimizer,
    optimizer_tensors,
    prefixed,
    train,
    unprefixed,
)

if TYPE_CHECKING:
    import torch


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
    train(_loop, payload, resources=resources, work=longest.work, name=name)


def _loop(run: Run, payload: Mapping[str, Any]) -> None:
    import torch

    from diffult_ray.data import load_split
    from diffult_ray.data.batches import batch_indices, generator, random_flip, share
    from diffult_ray.data.heads import with_head_share
    from diffult_ray.method.device import autocast, memory_format
    from diffult_ray.method.diffusion import make_noise_scheduler
    from diffult_ray.seeds import stream

    config, seed = payload["config"], payload["config"]["seed"]
    split = load_split(payload["inputs"]["split"])
    layout = memory_format(run.device, split.image_size, network="unet")
    torch.manual_seed(stream(seed, "weights"))
    model = _network(config, split).to(run.device, memory_format=layout)
    ema = _ema(model, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"], fused=True)
    first, history = _restore(run, model, ema, optimizer)
    wrapped = run.distribute(model)
    noising = make_noise_scheduler(config["timesteps"])
    learnt = with_head_share(split.train, split.num_classes, config.get("head_share", 1.0))
    images = torch.from_numpy(learnt.images).to(run.device)
    labels = torch.from_numpy(learnt.labels).to(run.device)
    frequencies = torch.bincount(labels, minlength=split.num_classes).float()
    outs, total, batch = payload["outs"], config["steps"], config["batch_size"]
    mine = share(batch, rank=run.rank, world=run.world)
    recorder = Recorder(history, total, batch)

    model.train()
    for step in range(first, total):
        for group in optimizer.param_groups:
            group["lr"] = config["learning_rate"] * min(1.0, (step + 1) / max(1, config["warmup_steps"]))
        index = batch_indices(seed=seed, step=step, batch_size=batch, n=len(labels)).to(run.device)
        rng = generator(seed, "diffusion", step, device=run.device)
        x = images[index].float() / 127.5 - 1
        x = random_flip(x, rng) if config["flip"] else x
        coin = torch.rand((), generator=generator(seed, "label drop", step))
        dropped = bool(coin < config["label_drop"])
        drawn = Draw.of(x, labels[index], frequencies, config["timesteps"], rng, dropped=dropped)
        drawn = drawn.only(mine)
        noisy = noising.add_noise(x[mine], drawn.noise, drawn.timesteps)
        with autocast(run.device, config["precision"], split.image_size):
            losses = _losses(wrapped, noisy.contiguous(memory_format=layout), drawn, config)
        loss = losses.sum() * run.world / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clip"], foreach=True)
        optimizer.step()
        ema.step(model.parameters())
        at_point = recorder.add(step + 1, loss, run.average)
        if run.is_first and step + 1 in outs:
            _write(Path(outs[step + 1]), step + 1, model, ema, config, split, recorder.rows)
        if at_point:
            run.tell(step + 1, total, loss=recorder.last)
            # After the writing: a run that goes on from here does not pass this step again.
            if step + 1 < total and run.should_save():
                run.save(_tensors(model, ema, optimizer), {"step": step + 1, "history": recorder.rows})
    run.tell(total, total)


class Draw:
    """A batch's random quantities, drawn whole from one stream, of which each rank takes its rows."""

    def __init__(self, labels, others, timesteps, noise, dropped: bool) -> None:
        self.labels, self.others, self.timesteps, self.noise = labels, others, timesteps, noise
        self.dropped = dropped

    @classmethod
    def of(cls, x, labels, frequencies, timesteps: int, rng, *, dropped: bool) -> Draw:
        """Labels y, labels y' from the training frequencies, timesteps and noise.

        A dropped batch has the null class throughout and no regulariser, as in the CBDM code.
        """
        import torch

        n, device = len(x), x.device
        drawn = torch.randint(0, timesteps, (n,), generator=rng, device=device)
        noise = torch.randn(x.shape, generator=rng, device=device)
        others = torch.multinomial(frequencies, n, replacement=True, generator=rng)
        if dropped:
            labels = torch.full_like(labels, len(frequencies))
        return cls(labels, others, drawn, noise, dropped)

    def only(self, rows: slice) -> Draw:
        each = (self.labels, self.others, self.timesteps, self.noise)
        return Draw(*(x[rows] for x in each), self.dropped)


def _losses(model, noisy, drawn: Draw, config) -> torch.Tensor:
    """Loss [n] of each image; the regulariser's two predictions share one forward pass."""
    import torch

    from diffult_ray.method.diffusion import cbdm_regulariser, ddpm_loss

    if config["regulariser"] == "none" or drawn.dropped:
        predicted = model(noisy, drawn.timesteps, drawn.labels).sample.float()
        return ddpm_loss(predicted, drawn.noise)
    both = model(
        noisy.repeat(2, 1, 1, 1), drawn.timesteps.repeat(2), torch.cat([drawn.labels, drawn.others])
    )
    predicted, other = both.sample.float().chunk(2)
    return ddpm_loss(predicted, drawn.noise) + cbdm_regulariser(
        predicted, other, drawn.timesteps, tau=config["tau"], total_timesteps=config["timesteps"]
    )


def _network(config, split):
    from diffult_ray.models import build_unet

    return build_unet(
        image_size=split.image_size,
        image_channels=split.channels,
        num_classes=split.num_classes,
        channels=config["channels"],
        blocks=config["blocks"],
        attention=config["attention"],
        dropout=config["dropout"],
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


def _restore(run: Run, model, ema, optimizer) -> tuple[int, list]:
    kept = run.restore()
    if kept is None:
        return 0, []
    tensors, numbers = kept
    model.load_state_dict(unprefixed("model", tensors))
    shadow = unprefixed("ema", tensors)
    ema.shadow_params = [shadow[str(i)].to(run.device) for i in range(len(shadow))]
    ema.optimization_step = numbers["step"]
    load_optimizer(optimizer, tensors)
    return numbers["step"], numbers["history"]


def _write(out: Path, step: int, model, ema, config, split, rows: list) -> None:
    """The averaged weights as a diffusers model folder, and, last, the summary."""
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.save_pretrained(out / "unet", safe_serialization=True)
    ema.restore(model.parameters())
    files.write_json(out / "generator.json", {
        "timesteps": config["timesteps"],
        "num_classes": split.num_classes,
        "trained_null_class": config["label_drop"] > 0,
    })
    files.write_json(out / "history.json", rows)
    files.write_json(out / "summary.json", {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "loss": rows[-1]["loss"] if rows else None,
        "images_per_second": rows[-1]["images_per_second"] if rows else None,
        "train_seconds": rows[-1]["seconds"] if rows else None,
    })
