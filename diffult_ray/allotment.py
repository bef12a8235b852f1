"""What a worker process of a stage was given of its machine, and how it may use it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


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


ALONE = Allotment()
