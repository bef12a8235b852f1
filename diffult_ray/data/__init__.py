"""Sources, the long-tailed profile and batches. Knows neither Ray nor MLflow."""

from diffult_ray.data.split import Split, load_split, make_split, save_split

__all__ = ["Split", "load_split", "make_split", "save_split"]
