"""What can be known of a trial once its split is: mistakes that would show only after hours of training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from diffult_ray.errors import BadInput

if TYPE_CHECKING:
    from diffult_ray.plan import Trial
    from diffult_ray.store import Store


def check(trials: Iterable[Trial], store: Store) -> None:
    """
    Args:
        trials: whose splits are stored.

    Raises:
        BadInput: for bands of a pool that will have no image, classes too small for a d_f, or a
            generator without images.
    """
    for trial in trials:
        upstream = {s.name: s for s in trial.upstream}
        if "scores" not in upstream:
            continue
        counts = store.read_json(upstream["split"], "split.json")["class_counts"]
        _check_generator(trial.experiment.generator.head_share, counts)
        if max(counts) < 2:
            raise BadInput(
                where="experiment.dataset", value=max(counts), advice="take more images a class",
                rule="must have a class of two training images or more: d_f is a distance between two",
            )
        if trial.experiment.filter.bands is not None:
            _check_bands(trial.experiment, counts)


def _check_generator(share: float, counts: list[int]) -> None:
    if share < 1:
        import numpy as np

        from diffult_ray.data.heads import head_subset

        head_subset(np.repeat(np.arange(len(counts)), counts), len(counts), share)


def _check_bands(experiment: Any, counts: list[int]) -> None:
    """A threshold may keep no image, and is then the plain classifier; bands say which they want.

    Whether a pool has an image of them is known when it is scored: that ends the trial, not the sweep.
    """
    if experiment.generation.per_class <= min(counts):
        raise BadInput(
            where="experiment.generation.per_class", value=experiment.generation.per_class,
            rule=f"must be above the {min(counts)} images of the smallest class where filter.bands choose: "
            "no image would be generated", advice="raise it, or set filter.threshold",
        )
