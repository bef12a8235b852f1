"""The selected classifier as MLflow serves it: this file is the model's code, so nothing is pickled.

    mlflow models serve -m runs:/RUN/classifier --env-manager local --port 5001
    curl localhost:5001/invocations -H 'Content-Type: application/json' -d '{"inputs": [[[[0, ...]]]]}'
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np


class ServedClassifier(mlflow.pyfunc.PythonModel):
    """Raw images [n, C, H, W] uint8 -> class probabilities [n, classes] float32."""

    def load_context(self, context) -> None:
        import torch

        from diffult_ray import files
        from diffult_ray.stages.classifier import load_classifier

        folder = Path(context.artifacts["facts"]).parent
        self.facts = files.read_json(folder / "model.json")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.normalise = load_classifier(folder, self.device)

    def predict(self, context, model_input: np.ndarray, params=None) -> np.ndarray:
        """Probabilities of the classes, in the order of `class_names` in `model.json`.

        Raises:
            ValueError: if the images are not uint8 or not of the shape that was trained on.
        """
        import torch

        from diffult_ray.stages.classifier import outputs

        images = torch.from_numpy(self._checked(model_input))
        logits = outputs(self.model, self.normalise, images, self.device)[1]
        return logits.softmax(1).numpy().astype(np.float32)

    def _checked(self, images) -> np.ndarray:
        shape = (self.facts["channels"], self.facts["image_size"], self.facts["image_size"])
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"images are uint8 arrays [n, {', '.join(map(str, shape))}], "
                f"not {images.dtype} {list(images.shape)}"
            )
        return np.ascontiguousarray(images).copy()  # torch warns of arrays that it may not write


mlflow.models.set_model(ServedClassifier())
