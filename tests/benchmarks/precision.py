"""What bf16 and channels-last are worth on this machine: training steps, alternately, as ratios.

    python tests/benchmarks/precision.py [--repeats 7] [--threads 1]

Each row is the time of eager float32 in contiguous NCHW divided by the time of the variant: above 1
the variant is faster. `method/device.py` holds what was decided from it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from measure import summary, tell

from diffult_ray.models import build_classifier, build_unet

VARIANTS = {
    "channels-last": (False, torch.channels_last),
    "bf16": (True, torch.contiguous_format),
    "bf16, channels-last": (True, torch.channels_last),
}
BASE = (False, torch.contiguous_format)


def unet_step(size: int, colours: int, channels: tuple[int, ...], batch: int):
    def make(bf16: bool, layout: torch.memory_format) -> Callable[[], None]:
        model = build_unet(
            image_size=size, image_channels=colours, num_classes=10, channels=channels,
            blocks=1, attention=(), dropout=0.0,
        ).to(memory_format=layout)
        x = torch.randn(batch, colours, size, size).contiguous(memory_format=layout)
        t, y = torch.randint(0, 1000, (batch,)), torch.randint(0, 10, (batch,))
        return _step(model, lambda: model(x, t, y).sample, bf16)

    return make


def classifier_step(name: str, size: int, colours: int, batch: int):
    def make(bf16: bool, layout: torch.memory_format) -> Callable[[], None]:
        model = build_classifier(architecture=name, num_classes=10, channels=colours, image_size=size)
        model = model.to(memory_format=layout)
        x = torch.randn(batch, colours, size, size).contiguous(memory_format=layout)
        return _step(model, lambda: model(x), bf16)

    return make


def _step(model: torch.nn.Module, forward: Callable[[], torch.Tensor], bf16: bool) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = forward()
        optimizer.zero_grad(set_to_none=True)
        out.float().square().mean().backward()
        optimizer.step()

    return step


CASES = {
    "U-Net 16-32, 8x8 grey, batch 32": (unet_step(8, 1, (16, 32), 32), 8),
    "U-Net 64-128-128, 32x32 colour, batch 16": (unet_step(32, 3, (64, 128, 128), 16), 1),
    "CNN, 8x8 grey, batch 64": (classifier_step("cnn", 8, 1, 64), 20),
    "ResNet-32, 32x32 colour, batch 128": (classifier_step("resnet32", 32, 3, 128), 1),
}


def measure(make, inner: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of `inner` steps of each variant over the base's, one ratio a repeat."""
    base, others = make(*BASE), {name: make(*how) for name, how in VARIANTS.items()}
    for step in (base, *others.values()):
        step()
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(repeats):
        reference = _seconds(base, inner)
        for name, step in others.items():
            ratios[name].append(reference / _seconds(step, inner))
    return ratios


def _seconds(step: Callable[[], None], inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for case, (make, inner) in CASES.items():
        for name, ratios in measure(make, inner, arguments.repeats).items():
            tell(
                f"training step, {case}: {name}", base="eager float32, contiguous", ratio=summary(ratios),
                threads=arguments.threads, bf16_instructions=torch.cpu._is_avx512_bf16_supported(),
            )


if __name__ == "__main__":
    main()
