"""Networks: classifiers for small images, and the class-conditional U-Net of diffusers."""

from diffult_ray.models.classifiers import Classifier, build_classifier
from diffult_ray.models.unet import build_unet, null_class, unet_preset

__all__ = ["Classifier", "build_classifier", "build_unet", "null_class", "unet_preset"]
