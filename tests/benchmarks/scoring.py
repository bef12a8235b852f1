"""Distances of CIFAR100-LT's 39,153 generated images to its 10,847 real ones, against a bare matrix product.

    python tests/benchmarks/scoring.py [--repeats 5] [--threads 2]

64 features, as ResNet-32's. `closeness` is what the stage `scores` does with all classes together: the
nearest real image of each and its exact distance, in blocks of bounded memory. The bare product is
torch.matmul of the two matrices in the same blocks and type (float64), of which nothing is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from measure import alternately, ratios, summary, tell

from diffult_ray.method import bands

GENERATED, REAL, FEATURES = 39_153, 10_847, 64


def product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], None]:
    a, b = a.double(), b.double()
    rows = bands._BLOCK_NUMBERS // len(b)
    block = torch.empty(rows, len(b), dtype=torch.float64)

    def call() -> None:
        for part in a.split(rows):
            torch.matmul(part, b.T, out=block[: len(part)])

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    generated, real = torch.randn(GENERATED, FEATURES), torch.randn(REAL, FEATURES)
    spacing = torch.ones(REAL, dtype=torch.float64)
    seconds = alternately(
        {"product": product(generated, real), "ours": lambda: bands.closeness(generated, real, spacing)},
        given.repeats,
    )
    tell(
        "distances to all real images", threads=given.threads, base="a bare float64 product",
        seconds={name: summary(taken) for name, taken in seconds.items()},
        ratio=ratios(seconds, "product")["ours"],
    )


if __name__ == "__main__":
    main()
