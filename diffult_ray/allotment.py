"""What a worker process of a stage was given of its machine, and how it may use it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MOST_AT_ONCE = 128
PIXELS_AT_ONCE = 2**16  # a thread of a CPU


@dataclass(frozen=True)
class Allotment:
    """A worker's part of the resources of a stage; none of it changes a result beyond rounding.

    Attributes:
        cpus: threads, at least one.
        gpus: 0 is the CPU; a fraction bounds the process's memory on the GPU.
        keep_memory: freed memory stays with the process.
        tuned: networks are arranged for the device; see `method.device.tuned`. Workers of one machine's CPUs
            average their gradients in shared memory (`stages.shared_gradients`) and hold a generator's
            state once (`stages.update`).
        compile: networks go through `torch.compile`.
        graphs: what it has compiled runs as CUDA graphs.
        accumulate: parts of a worker's batch that go through the network one after another.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    keep_memory: bool = True
    tuned: bool = True
    compile: bool = False
    graphs: bool = False
    accumulate: int = 1

    @classmethod
    def of(cls, resources: Any) -> Allotment:
        return cls(**{f.name: getattr(resources, f.name) for f in fields(cls) if hasattr(resources, f.name)})

    def images_at_once(self, image_size: int, *, guided: bool) -> int:
        """The most images that a sampler makes at a time, a power of two; its memory may hold fewer.

        On a CPU 64 evaluations of 32x32 a thread are as fast as more, to 3% (docs/RESULTS.md), and what is
        made at a time is what the others wait for at the end, and what is lost with a worker.
        """
        if self.gpus > 0:
            return MOST_AT_ONCE
        fits = PIXELS_AT_ONCE * max(1, int(self.cpus)) // (image_size**2 * (1 + guided))
        return min(MOST_AT_ONCE, 2 ** (max(1, fits).bit_length() - 1))


ALONE = Allotment()
