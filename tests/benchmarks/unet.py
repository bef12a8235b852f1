"""The paper's U-Net (35.7 M) as this package runs it, against plain PyTorch, in turns, each in its process.

    python tests/benchmarks/unet.py [--repeats 7] [--batch 16] [--threads 2] [--only CASE]

Reference: eager float32 in contiguous NCHW as the public CBDM code runs it: one forward pass for DDPM, two
for the regulariser, Adam, gradient clipping, and an average kept by a loop over the parameters. Ours: what
the generator stage and the sampler do on this device. One JSON line a case with images a second and ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from diffusers.training_utils import EMAModel
from measure import alternately_apart, ratios, summary, tell

from diffult_ray.allotment import Allotment
from diffult_ray.config import Generator
from diffult_ray.method import device
from diffult_ray.method.diffusion import cbdm_regulariser, make_noise_scheduler
from diffult_ray.method.objective import Objective
from diffult_ray.models import build_unet
from diffult_ray.models.dropout import Dropout
from diffult_ray.models.unet import unet_preset

SIZE, COLOURS, CLASSES, TIMESTEPS = 32, 3, 100, 1000
CPU = torch.device("cpu")
GIVEN = Allotment(cpus=2)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_unet(image_size=SIZE, image_channels=COLOURS, num_classes=CLASSES, **unet_preset(SIZE))


def plain_network() -> torch.nn.Module:
    """With torch's own dropout."""
    model = network()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, torch.nn.Dropout(child.p))
    return model


def plain_step(batch: int, tau: float) -> Callable[[], None]:
    """A training step of the reference; `tau` above 0 adds the regulariser."""
    model, average = plain_network(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    noising = make_noise_scheduler(TIMESTEPS)
    images = torch.randint(0, 256, (batch, COLOURS, SIZE, SIZE)).float() / 127.5 - 1

    def step() -> None:
        times, labels = torch.randint(0, TIMESTEPS, (batch,)), torch.randint(0, CLASSES, (batch,))
        noise = torch.randn_like(images)
        noisy = noising.add_noise(images, noise, times)
        predicted = model(noisy, times, labels).sample
        losses = (predicted - noise).square().mean(dim=(1, 2, 3))
        if tau > 0:
            other = model(noisy, times, torch.randint(0, CLASSES, (batch,))).sample
            losses = losses + cbdm_regulariser(predicted, other, times, tau=tau, total_timesteps=TIMESTEPS)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, own in zip(average.parameters(), model.parameters(), strict=True):
                kept.copy_(0.9999 * kept + 0.0001 * own)

    return step


def own_step(batch: int, tau: float) -> Callable[[], None]:
    """A training step of the generator stage, its images at hand."""
    regulariser = {"regulariser": "cbdm", "tau": tau} if tau > 0 else {}
    section = Generator(**unet_preset(SIZE), batch_size=batch, label_drop=0.0, **regulariser)
    config = {**section.model_dump(mode="json"), "seed": 0}
    layout = device.memory_format(CPU, SIZE, network="unet")
    model = device.tuned(network(), GIVEN).to(memory_format=layout)
    average = EMAModel(model.parameters(), decay=config["ema"], foreach=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"], fused=True)
    objective = Objective(config, torch.full((CLASSES,), 10))
    images = torch.randint(0, 256, (batch, COLOURS, SIZE, SIZE)).float() / 127.5 - 1
    rng, coins = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)

    def shown(x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(x.contiguous(memory_format=layout), times, labels).sample.float()

    def step() -> None:
        drawn = objective.draw(torch.randint(0, CLASSES, (batch,)), images.shape[1:], rng, coins)
        with device.autocast(CPU, config["precision"], SIZE):
            losses = objective.losses(shown, images, drawn)
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clip"], foreach=True)
        optimizer.step()
        average.step(model.parameters())

    return step


def plain_evaluation(batch: int) -> Callable[[], None]:
    """One evaluation of the network in sampling."""
    return _evaluation(network().eval(), batch, torch.contiguous_format, "float32")


def own_evaluation(batch: int) -> Callable[[], None]:
    rounded = device.uses_bf16(CPU, "auto", SIZE)
    layout = device.memory_format(CPU, SIZE, network="unet", trains=False)
    return _evaluation(device.tuned(network().eval(), GIVEN, bf16_only=rounded), batch, layout, "auto")


def _evaluation(model, batch: int, layout: torch.memory_format, precision: str) -> Callable[[], None]:
    model = model.to(memory_format=layout)
    images = torch.randn(batch, COLOURS, SIZE, SIZE).contiguous(memory_format=layout)
    times, labels = torch.randint(0, TIMESTEPS, (batch,)), torch.randint(0, CLASSES, (batch,))

    @torch.no_grad()
    def call() -> None:
        with device.autocast(CPU, precision, SIZE):
            model(images, times, labels).sample.float()

    return call


CASES = {
    "U-Net 35.7 M, DDPM training step": (plain_step, own_step, 0.0),
    "U-Net 35.7 M, CBDM training step": (plain_step, own_step, 1.0),
    "U-Net 35.7 M, evaluation": (plain_evaluation, own_evaluation),
}


def made(make: Callable[..., Callable[[], None]], threads: int, ours: bool, *arguments: float):
    """A variant in its process; ours is prepared as the stages' processes are."""
    device.prepare(Allotment(cpus=threads, keep_memory=ours))
    return make(*arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    given = parser.parse_args()
    for name, (plain, ours, *rest) in CASES.items():
        if given.only in name:
            arguments = (given.batch, *rest)
            seconds, peaks = alternately_apart({
                "plain": partial(made, plain, given.threads, False, *arguments),
                "ours": partial(made, ours, given.threads, True, *arguments),
            }, given.repeats)
            tell(
                name, packages=("torch", "diffusers"), batch=given.batch, threads=given.threads,
                images_per_second={k: summary([given.batch / s for s in v], 2) for k, v in seconds.items()},
                peak_mib=peaks, ratio=ratios(seconds, "plain")["ours"],
            )


if __name__ == "__main__":
    main()
