"""A stored generator as a function from rows (id, label, seed) to images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffult_ray import files
from diffult_ray.allotment import ALONE, Allotment

if TYPE_CHECKING:
    import torch


class Sampler:
    """Loads the averaged U-Net once; then each call samples batches.

    Rows are padded to whole batches, so that no image depends on its company.
    """

    def __init__(
        self, folder: str | Path, generation: Mapping[str, Any], on: torch.device, given: Allotment = ALONE
    ) -> None:
        from diffusers import UNet2DModel

        from diffult_ray.method import device
        from diffult_ray.method.sampling import make_scheduler

        self.device = on
        self.facts = files.read_json(Path(folder) / "generator.json")
        self.guidance = generation["guidance"]
        unet = Path(folder) / "unet"
        model = UNet2DModel.from_pretrained(unet, local_files_only=True, low_cpu_mem_usage=False)
        model, self.layout = device.placed(model, given, self.device, precision="auto", trains=False)
        self.model = model.eval()
        self.batch = device.images_at_once(model, self.device, given, guided=self.guidance > 0)
        self._run = device.compiled(self.model, given)
        self.scheduler = make_scheduler(
            generation["sampler"], objective=self.facts["objective"],
            timesteps=self.facts["timesteps"], steps=generation["steps"],
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        c = self.model.config
        return (c.out_channels, c.sample_size, c.sample_size)

    def __call__(self, labels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Images [n, C, H, W] uint8."""
        parts = [
            self._batch(labels[i : i + self.batch], seeds[i : i + self.batch])
            for i in range(0, len(labels), self.batch)
        ]
        return np.concatenate(parts) if parts else np.empty((0, *self.shape), np.uint8)

    def _batch(self, labels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        import torch

        from diffult_ray.method.sampling import initial_noise, sample, to_uint8

        n = len(labels)
        filled = np.resize(seeds, self.batch)
        noise = initial_noise(filled, self.shape).to(self.device, memory_format=self.layout)
        images = sample(
            self._network,
            self.scheduler,
            noise,
            torch.from_numpy(np.resize(labels, self.batch)).to(self.device),
            guidance=self.guidance,
            null_label=self.facts["num_classes"],
            seeds=filled,
        )
        return to_uint8(images[:n]).cpu().numpy()

    def _network(self, images, times, labels):
        import torch

        from diffult_ray.method.conditions import with_planes
        from diffult_ray.method.device import autocast

        planes = self.model.config.in_channels - self.shape[0]
        if planes:  # of augmentation, of which a sampled image has none
            images = with_planes(images, torch.zeros(len(images), planes, device=images.device))
            images = images.contiguous(memory_format=self.layout)
        with autocast(self.device, "auto", self.shape[-1]):
            return self._run(images, times, labels).sample.float()


class Samplers:
    """The samplers of several orders in one process, of which the last one used is in memory."""

    def __init__(self, targets: Sequence[Mapping[str, Any]], *, given: Allotment) -> None:
        from diffult_ray.method import device

        self.device, self._given = device.prepare(given), given
        self._targets = targets
        self._loaded: tuple[int, Sampler] | None = None

    def __getitem__(self, target: int) -> Sampler:
        if self._loaded is None or self._loaded[0] != target:
            order = self._targets[target]
            folder = order["site"].fetch(order["generator"])
            self._loaded = (target, Sampler(folder, order["generation"], self.device, self._given))
        return self._loaded[1]
