"""The FLOPs of a stage, and how many a second are reached: an estimate's basis where nothing alike is stored.

A forward pass is counted on the meta device (docs/MODELS.md); a training step is three of it, and a
sampling step one for each time that it asks the network. A rate measured here is that of the stage's
own network, precision and threads, for about a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray import files
from diffult_ray.data.longtail import profile_counts

if TYPE_CHECKING:
    import torch

    from diffult_ray.store import Store

KNOWN = {"digits": (8, 1, 10, 144), "cifar10": (32, 3, 10, 5000), "cifar100": (32, 3, 100, 500)}
CLASSES = 1000  # of a set that was not read yet: they are few of a network's FLOPs
TRAINED = ("extractor", "reference", "classifier")
DAY = 86400.0  # seconds that a rate is taken to hold
SECONDS, FEWEST = 0.5, 8  # of a measurement, and its steps, at least, but of large networks
LARGEST = 4e10  # FLOPs of a step in it, unless one image has more; on a GPU a hundred times as many


@dataclass(frozen=True)
class Facts:
    """What of a split decides how much work there is; None where a set must be read before it is known."""

    image_size: int
    channels: int
    classes: int
    counts: tuple[int, ...] | None
    balanced: int | None

    def lacking(self, per_class: int | None) -> int | None:
        """Images that fill each class up to a number."""
        return None if self.counts is None else sum(max(0, (per_class or 0) - n) for n in self.counts)


def facts_of(split: Any, store: Store) -> Facts:
    """Of a split as it is stored, or as its configuration says that it will be."""
    try:
        told = store.read_json(split, "split.json")
        counts, classes = tuple(told["class_counts"]), len(told["class_names"])
        return Facts(told["image_size"], told["channels"], classes, counts, told["parts"]["balanced"])
    except (OSError, ValueError, KeyError):
        return _expected(split.config)


def _expected(config: Mapping[str, Any]) -> Facts:
    size, channels, classes, room = KNOWN.get(config["name"], (None, 3, CLASSES, None))
    counts = None
    if room is not None:
        counts = tuple(profile_counts(
            config["profile"], room=[room] * classes, max_per_class=config["max_per_class"],
            imbalance_factor=config["imbalance_factor"],
        ))
    size, channels = config["image_size"] or size, config["channels"] or channels
    return Facts(size, channels, classes, counts, None if room is None else room * classes)


# --- networks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network of given sizes: `unet` or `classifier`, and what it is built with."""

    kind: str
    settings: tuple[tuple[str, Any], ...]

    @classmethod
    def unet(cls, config: Mapping[str, Any], facts: Facts) -> Network:
        kept = {k: config[k] for k in ("channels", "blocks", "attention", "dropout")}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        return cls("unet", (
            *settings.items(), ("image_size", facts.image_size), ("image_channels", facts.channels),
            ("num_classes", facts.classes),
        ))

    @classmethod
    def classifier(cls, config: Mapping[str, Any], facts: Facts) -> Network:
        return cls("classifier", (
            ("architecture", config["architecture"]), ("num_classes", facts.classes),
            ("channels", facts.channels), ("image_size", facts.image_size),
        ))

    def build(self) -> Any:
        from diffult_ray.models import build_classifier, build_unet

        return {"unet": build_unet, "classifier": build_classifier}[self.kind](**dict(self.settings))

    def inputs(self, n: int, device: Any) -> tuple[torch.Tensor, ...]:
        """Of `n` images."""
        import torch

        known = dict(self.settings)
        channels = known["image_channels" if self.kind == "unet" else "channels"]
        images = torch.zeros(n, channels, known["image_size"], known["image_size"], device=device)
        labels = torch.zeros(n, dtype=torch.long, device=device)
        return (images, labels, labels) if self.kind == "unet" else (images,)


@lru_cache(maxsize=256)
def forward(network: Network) -> float:
    """FLOPs of one image's forward pass."""

    def count() -> float:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            model = network.build().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*network.inputs(1, "meta"))
        return float(counter.get_total_flops())

    return _noted(["forward", network.kind, network.settings], count)


def _noted(what: Any, find: Callable[[], float]) -> float:
    """A number that was found on this machine by this user within a day, or is found now.

    Torch and diffusers take seconds to import, and a plan that needs nothing else of them goes without.
    """
    known = [what, platform.node(), os.cpu_count(), version("torch"), version("diffusers")]
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
    path = Path(tempfile.gettempdir()) / f"diffult-rates-{os.getuid()}" / name
    try:
        if time.time() - path.stat().st_mtime < DAY:
            return float(files.read_json(path))
    except (OSError, ValueError, TypeError):
        pass
    found = find()
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        files.write_json(path, found)
    return found


# --- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a stage does again and again: the passes of a network.

    Attributes:
        training: whether it trains, at three forward passes an image, or only asks the network.
        batch: images at a time.
        unit: forward passes of one image in one unit of the stage's work (`Costs`).
        extra: FLOPs of another network in such a unit.
    """

    network: Network
    training: bool
    batch: int
    unit: float
    precision: str = "auto"
    extra: float = 0.0

    @property
    def forward(self) -> float:
        return forward(self.network)

    @property
    def flops(self) -> float:
        """Of a unit of the stage's work."""
        return self.unit * self.forward + self.extra


def work_of(stage: Any, facts: Facts) -> Work | None:
    """The work in a stage, stored or not; None for one that is not a network's, or of unknown size."""
    config, inputs = stage.config, stage.inputs
    if stage.name in TRAINED:
        steps = 1 if config["steps"] else _steps_of_an_epoch(stage, facts)
        network, batch = Network.classifier(config, facts), config["batch_size"]
        return steps and Work(network, True, batch, 3 * batch * steps, config["precision"])
    if stage.name == "generator":
        return _generator(stage, facts)
    if stage.name in ("images", "quality"):
        sampling = config if stage.name == "images" else config["generation"]
        asked = (2 if sampling["guidance"] > 0 else 1) * (2 if sampling["sampler"] == "heun" else 1)
        return Work(Network.unet(inputs["generator"].config, facts), False, 128, asked)
    if stage.name == "scores":
        return Work(Network.classifier(inputs["extractor"].config, facts), False, 512, 1)
    return None


def _generator(stage: Any, facts: Facts) -> Work:
    """CBDM asks the network for two labels an image, but in a batch whose labels are dropped for one; an AID
    loss goes through the extractor as well.
    """
    config, network = stage.config, Network.unet(stage.config, facts)
    batch, asked, extra = config["batch_size"], 1.0, 0.0
    if config["regulariser"] == "cbdm":
        asked = 2.0 if config.get("label_drop_scope") == "sample" else 2.0 - config["label_drop"]
    if config["aid_weight"] > 0:
        extra = 3 * batch * forward(Network.classifier(stage.inputs["extractor"].config, facts))
    return Work(network, True, batch, 3 * batch * asked, config["precision"], extra)


def _steps_of_an_epoch(stage: Any, facts: Facts) -> int | None:
    if stage.name == "reference":
        return facts.balanced and math.ceil(facts.balanced / stage.config["batch_size"])
    if facts.counts is None:
        return None
    scores, images = stage.inputs.get("scores"), sum(facts.counts)
    filled = scores.inputs["images"].config["per_class"] if scores else stage.config.get("per_class")
    return math.ceil((images + facts.lacking(filled)) / stage.config["batch_size"])


# --- a rate, measured ------------------------------------------------------------------------------


def here(work: Work, resources: Mapping[str, float]) -> float | None:
    """FLOPs a second of all workers, if each is as fast as this machine; None where it lacks a GPU."""
    gpu, threads = resources["gpus"] > 0, max(1, int(resources["cpus"]))
    if gpu and not _has_gpu():
        return None
    settings = work.network, work.training, work.batch, work.precision, threads, gpu
    told = [work.network.kind, work.network.settings, *settings[1:]]
    share = min(1.0, resources["gpus"]) if gpu else 1.0
    return _noted(["rate", *told], lambda: _measure(*settings)) * share * resources["workers"]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _measure(
    network: Network, training: bool, batch: int, precision: str, threads: int, gpu: bool
) -> float:
    import torch

    from diffult_ray.allotment import Allotment
    from diffult_ray.method.device import autocast, memory_format, placed, placed_classifier

    before, device = torch.get_num_threads(), torch.device("cuda" if gpu else "cpu")
    size = dict(network.settings)["image_size"]
    passes = forward(network) * (3 if training else 1)
    images = int(min(batch, max(1, LARGEST * (100 if gpu else 1) / passes)))
    try:
        torch.set_num_threads(threads)
        model = network.build()
        given = Allotment(cpus=threads, gpus=int(gpu))
        if network.kind == "unet":
            model, layout = placed(model, given, device, precision=precision, trains=training)
        elif training:
            model, layout, precision = placed_classifier(
                model, given, device, precision=precision, image_size=size
            )
        else:
            layout = memory_format(device, size, network=network.kind)
            model = model.to(device, memory_format=layout)
        model.train(training)
        shown, *others = network.inputs(images, device)
        shown = shown.contiguous(memory_format=layout)
        with torch.set_grad_enabled(training), autocast(device, precision, size):
            seconds = _seconds(_step(model, (shown, *others), training), device)
    finally:
        torch.set_num_threads(before)
    return images * passes / seconds


def _step(model: Any, inputs: Sequence[torch.Tensor], training: bool) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.Adam(model.parameters(), fused=True) if training else None

    def step() -> None:
        found = model(*inputs)
        if optimizer is not None:
            getattr(found, "sample", found).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """The least time of a few steps, after one that does not count: that is what long runs come to.

    The first steps of a process wait for memory that later ones have, and others' work only adds.
    """
    import torch

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    found = [timed()]
    while sum(found) < SECONDS or (len(found) < FEWEST and sum(found) < 4 * SECONDS):
        found.append(timed())
    return min(found)
