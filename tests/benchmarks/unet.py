"""The paper's U-Net (35.7 M) as this package runs it, against plain PyTorch, in turns, each in its process.

    python tests/benchmarks/unet.py [--repeats 7] [--batch 16] [--threads 2] [--only CASE]
                                    [--gpu [--inner 20] [--compile] [--graphs]] [--public DIR]

Reference: eager float32 in contiguous NCHW as the public CBDM code runs it: one forward pass for DDPM, two
for the regulariser, Adam, gradient clipping, and an average kept by a loop over the parameters. With
`--public DIR`, a copy of that code (github.com/qym7/CBDM-pytorch), its own network and trainer take turns
too, whose batch goes without label and regulariser one time in ten. Ours: what the generator stage and the
sampler do on this device, with `resources.STAGE.compile` and `.graphs` as given. One JSON line a case with
images a second and ratio; on a GPU also which part of the measured bf16 matrix rate the step reaches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from measure import alternately_apart, bf16_matrix_rate, ratios, summary, tell
from torch.utils.flop_counter import FlopCounterMode

from diffult_ray.allotment import Allotment
from diffult_ray.config import Generator
from diffult_ray.method import device
from diffult_ray.method.diffusion import cbdm_regulariser, make_noise_scheduler
from diffult_ray.method.objective import Objective
from diffult_ray.models import build_unet
from diffult_ray.models.dropout import Dropout
from diffult_ray.models.unet import unet_preset

SIZE, COLOURS, CLASSES, TIMESTEPS = 32, 3, 100, 1000
Step = Callable[[], None]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_unet(image_size=SIZE, image_channels=COLOURS, num_classes=CLASSES, **unet_preset(SIZE))


def pictures(batch: int, on: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, (batch, COLOURS, SIZE, SIZE), device=on).float() / 127.5 - 1


def plain_network() -> torch.nn.Module:
    """With torch's own dropout."""
    model = network()
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Dropout):
                setattr(module, name, torch.nn.Dropout(child.p))
    return model


def plain_step(given: Allotment, on: torch.device, batch: int, tau: float) -> Step:
    """A training step of the reference; `tau` above 0 adds the regulariser."""
    model, average = plain_network().to(on), network().to(on)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    noising = make_noise_scheduler(TIMESTEPS)
    images = pictures(batch, on)
    numbers = partial(torch.randint, 0, size=(batch,), device=on)

    def step() -> None:
        times, labels = numbers(high=TIMESTEPS), numbers(high=CLASSES)
        noise = torch.randn_like(images)
        noisy = noising.add_noise(images, noise, times)
        predicted = model(noisy, times, labels).sample
        losses = (predicted - noise).square().mean(dim=(1, 2, 3))
        if tau > 0:
            other = model(noisy, times, numbers(high=CLASSES)).sample
            losses = losses + cbdm_regulariser(predicted, other, times, tau=tau, total_timesteps=TIMESTEPS)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, own in zip(average.parameters(), model.parameters(), strict=True):
                kept.copy_(0.9999 * kept + 0.0001 * own)

    return step


def own_step(given: Allotment, on: torch.device, batch: int, tau: float) -> Step:
    """A training step of the generator stage, its images at hand."""
    regulariser = {"regulariser": "cbdm", "tau": tau} if tau > 0 else {}
    section = Generator(**unet_preset(SIZE), batch_size=batch, label_drop=0.0, **regulariser)
    config = {**section.model_dump(mode="json"), "seed": 0}
    model, layout = device.placed(network(), given, on, precision=config["precision"])
    wrapped, parameters = device.compiled(model, given), list(model.parameters())
    average = EMAModel(model.parameters(), decay=config["ema"], foreach=True)
    optimizer = torch.optim.Adam(parameters, lr=config["learning_rate"], fused=True)
    objective = Objective(config, torch.full((CLASSES,), 10, device=on))
    images = pictures(batch, on)
    rng, coins = torch.Generator(on).manual_seed(0), torch.Generator().manual_seed(1)

    def shown(x: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return wrapped(x.contiguous(memory_format=layout), times, labels).sample.float()

    def step() -> None:
        labels = torch.randint(0, CLASSES, (batch,)).to(on, non_blocking=True)
        drawn = objective.draw(labels, images.shape[1:], rng, coins)
        with device.autocast(on, config["precision"], SIZE):
            losses = objective.losses(shown, images, drawn)
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        device.clip(parameters, config["gradient_clip"])
        optimizer.step()
        device.averaged(average, parameters, given)

    return step


def public_step(folder: str, given: Allotment, on: torch.device, batch: int, tau: float) -> Step:
    """A training step of the public code's network, trainer and average."""
    model, average = public_network(folder).to(on), public_network(folder).to(on)
    from diffusion import GaussianDiffusionTrainer  # its folder is on the path by now

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    trainer = GaussianDiffusionTrainer(
        model, 1e-4, 0.02, TIMESTEPS, None, CLASSES, False, tau > 0, tau, torch.full((CLASSES,), 0.01), True
    ).to(on)
    images, labels = pictures(batch, on), torch.randint(0, CLASSES, (batch,), device=on)

    def step() -> None:
        optimizer.zero_grad()
        ddpm, regulariser = trainer(images, labels)
        ddpm, regulariser = ddpm.mean(), regulariser.mean()
        loss = ddpm + regulariser if tau > 0 and regulariser > 0 else ddpm
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        kept, own = average.state_dict(), model.state_dict()
        for name in own:
            kept[name].data.copy_(kept[name].data * 0.9999 + own[name].data * 0.0001)

    return step


def public_network(folder: str) -> torch.nn.Module:
    sys.path.insert(0, folder)
    from model.model import UNet

    torch.manual_seed(0)
    return UNet(
        T=TIMESTEPS, ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=2, dropout=0.1, cond=True,
        augm=False, num_class=CLASSES,
    )


def plain_evaluation(given: Allotment, on: torch.device, batch: int) -> Step:
    """One evaluation of the network in sampling."""
    return _evaluation(network().eval().to(on), on, batch, torch.contiguous_format, "float32")


def own_evaluation(given: Allotment, on: torch.device, batch: int) -> Step:
    model, layout = device.placed(network().eval(), given, on, precision="auto", trains=False)
    return _evaluation(device.compiled(model, given), on, batch, layout, "auto")


def public_evaluation(folder: str, given: Allotment, on: torch.device, batch: int) -> Step:
    model = public_network(folder).eval().to(on)
    return _evaluation(model, on, batch, torch.contiguous_format, "float32")


def _evaluation(
    model: Any, on: torch.device, batch: int, layout: torch.memory_format, precision: str
) -> Step:
    images = torch.randn(batch, COLOURS, SIZE, SIZE, device=on).contiguous(memory_format=layout)
    times = torch.randint(0, TIMESTEPS, (batch,), device=on)
    labels = torch.randint(0, CLASSES, (batch,), device=on)

    @torch.no_grad()
    def call() -> None:
        with device.autocast(on, precision, SIZE):
            found = model(images, times, labels)
        getattr(found, "sample", found).float()

    return call


CASES = {
    "U-Net 35.7 M, DDPM training step": (plain_step, own_step, public_step, 0.0),
    "U-Net 35.7 M, CBDM training step": (plain_step, own_step, public_step, 1.0),
    "U-Net 35.7 M, evaluation": (plain_evaluation, own_evaluation, public_evaluation),
}


def made(make: Callable[..., Step], given: Allotment, inner: int, *arguments: float) -> Step:
    """A variant in its process: `inner` steps, the last one waited for."""
    on = device.prepare(given)
    step = make(given, on, *arguments)

    def call() -> None:
        for _ in range(inner):
            step()
        if on.type == "cuda":
            torch.cuda.synchronize()

    return call


def work(batch: int, tau: float | None) -> int:
    """FLOPs of a step, two a multiplication: a training step is three forward passes of all its rows."""
    rows = 2 if tau else 1
    with torch.device("meta"):
        arguments = (torch.empty(1, COLOURS, SIZE, SIZE), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        network().to("meta")(*arguments)
    return counted.get_total_flops() * batch * rows * (1 if tau is None else 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--inner", type=int, default=1, help="steps a turn")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--public", metavar="DIR", help="a copy of the public CBDM code")
    given = parser.parse_args()
    plain = Allotment(cpus=given.threads, gpus=int(given.gpu), keep_memory=False)
    ours = Allotment(
        cpus=given.threads, gpus=int(given.gpu), compile=given.compile, graphs=given.graphs
    )
    rate = bf16_matrix_rate() if given.gpu else None
    for name, (by_plain, by_ours, by_public, *rest) in CASES.items():
        if given.only not in name:
            continue
        arguments = (given.inner, given.batch, *rest)
        makers = {"plain": partial(made, by_plain, plain, *arguments)}
        if given.public:
            makers["public"] = partial(made, partial(by_public, given.public), plain, *arguments)
        makers["ours"] = partial(made, by_ours, ours, *arguments)
        seconds, peaks = alternately_apart(makers, given.repeats)
        seconds = {k: [s / given.inner for s in v] for k, v in seconds.items()}
        facts: dict[str, Any] = {}
        if given.public:
            against = ratios({k: seconds[k] for k in ("public", "ours")}, "public")
            facts["ratio_to_the_public_code"] = against["ours"]
        if rate:
            flops = work(given.batch, rest[0] if rest else None)
            facts["bf16_tflops_of_a_matrix_product"] = round(rate / 1e12, 1)
            facts["utilisation"] = summary([flops / s / rate for s in seconds["ours"]])
        tell(
            name, packages=("torch", "diffusers"), batch=given.batch, threads=given.threads,
            compile=given.compile, graphs=given.graphs,
            images_per_second={k: summary([given.batch / s for s in v], 2) for k, v in seconds.items()},
            peak_mib=peaks, ratio=ratios(seconds, "plain")["ours"], **facts,
        )


if __name__ == "__main__":
    main()
