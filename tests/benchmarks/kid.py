"""KID over 100 subsets, against the same estimate with the kernel of each subset computed anew.

    python tests/benchmarks/kid.py [--repeats 5] [--threads 1]

At the demo's size, 1,000 generated against 1,500 real images, and at the most that a quality stage takes
of each side; 64 features, subsets of 1,000. The base is what torch-fidelity does, in numpy float64.
"""

from __future__ import annotations

import argparse
import os

SIZES = ((1000, 1500), (10_000, 10_000))
FEATURES, SUBSETS, SIZE, SEED = 64, 100, 1000, 2020


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(given.threads)

    import numpy as np
    from measure import alternately, ratios, summary, tell

    from diffult_ray.method.quality import kid

    def kernel(a, b):
        products = a @ b.T / FEATURES + 1.0
        return products * products * products

    def subset_by_subset(fake, real):
        rng = np.random.RandomState(SEED)
        found = np.empty(SUBSETS)
        for i in range(SUBSETS):
            a = fake[rng.choice(len(fake), SIZE, replace=False)]
            b = real[rng.choice(len(real), SIZE, replace=False)]
            within = sum(k.sum() - np.trace(k) for k in (kernel(a, a), kernel(b, b)))
            found[i] = within / (SIZE * (SIZE - 1)) - 2 * kernel(a, b).mean()
        return found.mean(), found.std()

    for generated, real in SIZES:
        rng = np.random.default_rng(0)
        sides = rng.normal(size=(generated, FEATURES)), 1.1 * rng.normal(size=(real, FEATURES))
        np.testing.assert_allclose(kid(*sides, subsets=SUBSETS, subset_size=SIZE), subset_by_subset(*sides))
        seconds = alternately(
            {"subset by subset": lambda s=sides: subset_by_subset(*s),
             "ours": lambda s=sides: kid(*s, subsets=SUBSETS, subset_size=SIZE)},
            given.repeats,
        )  # fmt: skip
        tell(
            "KID over 100 subsets", packages=("numpy",), generated=generated, real=real,
            threads=given.threads, base="subset by subset",
            seconds={name: summary(taken) for name, taken in seconds.items()},
            ratio=ratios(seconds, "subset by subset")["ours"],
        )


if __name__ == "__main__":
    main()
