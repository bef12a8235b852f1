"""Sources, the long-tailed profile, splits and batches. Knows neither Ray nor MLflow."""

from diffult_ray.data.split import Part, Split, load_split, make_split, move, save_split

__all__ = ["Part", "Split", "load_split", "make_split", "move", "save_split"]
