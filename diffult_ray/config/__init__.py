"""Experiment and Sweep: typed, frozen, validated before Ray starts.

YAML, then `dotted.key=value` overrides, into pydantic models. A mistake ends in one line that names
the file, the dotted key, the rule and the value. Defaults are the paper's or its public code's on
CIFAR-LT where those are known (docs: METHOD.md); a sweep file for another data set states its own.

Each module imports only those before it: section, experiment, keys, refusal, search, sweep, reading.
"""

from diffult_ray.config.experiment import (
    INCEPTION_SIZE,
    METHODS,
    NAMED,
    OFFICIAL,
    SAMPLERS,
    ClassifierTraining,
    Dataset,
    Experiment,
    Filter,
    Generator,
    Resources,
    StageResources,
    variant,
)
from diffult_ray.config.keys import KEYS, NOT_SEARCHED, known_keys
from diffult_ray.config.reading import load
from diffult_ray.config.section import Section
from diffult_ray.config.sweep import (
    Expected,
    Measure,
    Price,
    Sweep,
    Tracking,
    Tune,
    experiments,
    first,
    has_value,
    searched,
)
from diffult_ray.sweepfile import shipped

__all__ = [
    "INCEPTION_SIZE", "KEYS", "METHODS", "NAMED", "NOT_SEARCHED", "OFFICIAL", "SAMPLERS",
    "ClassifierTraining", "Dataset", "Expected", "Experiment", "Filter", "Generator", "Measure", "Price",
    "Resources", "Section", "StageResources", "Sweep", "Tracking", "Tune",
    "experiments", "first", "has_value", "known_keys", "load", "searched", "shipped", "variant",
]  # fmt: skip
