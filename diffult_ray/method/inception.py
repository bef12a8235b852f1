"""Inception v3 as torch-fidelity has it: where its weights are, and what it makes of images.

The network is that of the original FID (Heusel et al., arXiv 1706.08500), the TensorFlow weights of
2015-12-05 as torch-fidelity has converted them, with TensorFlow's way of resizing to 299x299. The
weights are never part of this project: they come from a file, a URL, or torch's own cache.
"""

from __future__ import annotations

import hashlib
import io
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffult_ray.config import INCEPTION_SIZE
from diffult_ray.errors import BadInput

if TYPE_CHECKING:
    import torch

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
OFFICIAL = "6726825d"  # the first digits of that file's sha256, as torch.hub names and checks it
WHERE = "quality.inception_weights"
DIMENSIONS = 2048
SMALLEST = INCEPTION_SIZE  # pixels a side: what is smaller says little after it is blown up to 299
BATCH = {"cuda": 64, "cpu": 16}  # images a forward pass
_PATIENCE = 30.0  # seconds without an answer after which a download is given up
_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


def identity(weights: str | None) -> str:
    """What tells weights apart, wherever they lie: the official ones' checksum, or a file's own.

    Args:
        weights: a file or a URL; None for torch-fidelity's.

    Raises:
        BadInput: for a file that is not there.
    """
    if weights is None or "://" in weights:
        url = weights or URL
        return _checksum_in(url) or url
    path = _file(weights)
    facts = path.stat()
    found = _sha256(str(path), facts.st_size, facts.st_mtime_ns)
    return OFFICIAL if found.startswith(OFFICIAL) else found


def find(weights: str | None) -> Path:
    """The weights as a file of this machine, downloaded into torch's cache if they are a URL.

    Raises:
        BadInput: for weights that cannot be had, with what to fetch and where to put it.
    """
    if weights is not None and "://" not in weights:
        return _file(weights)
    import torch

    url = weights or URL
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if cached.is_file():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _timeout(_PATIENCE):
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=_checksum_in(url), progress=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(
            where="quality.network",
            rule=f"inception needs {cached.name}, which is neither at {cached} nor to be had: {error}",
            advice=f"fetch it from {url} (torch-fidelity's release) and put it there, or set {WHERE} to the "
            "file, or quality.network: reference",
        ) from None
    return cached


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a file: safetensors, or torch's own format, of which only tensors are loaded.

    Raises:
        BadInput: for a file that holds something else than this network's weights.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        build(state)
    except Exception as error:
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadInput(
            where=WHERE, rule=f"must be the weights of torch-fidelity's InceptionV3: {problem}",
            value=str(path), advice=f"fetch them from {URL}",
        ) from None
    return {name: tensor for name, tensor in state.items()}


def build(state: Mapping[str, torch.Tensor]) -> Any:
    """The network in evaluation mode. torch-fidelity only loads from a file, so it is given one in memory.

    Raises:
        RuntimeError: for tensors of other names or shapes.
    """
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
    )


def outputs(network: Any, images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What FID and the inception score are made of, on the CPU.

    Args:
        images: [n, C, H, W] uint8; one channel is shown as three.

    Returns:
        features [n, 2048] and logits [n, 1008] without their bias, float32.
    """
    import torch

    with torch.no_grad():
        features, logits = network(images.to(device).expand(-1, 3, -1, -1))
    return features.cpu(), logits.cpu()


def _file(weights: str) -> Path:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise BadInput(
            where=WHERE, rule="no such file", value=weights,
            advice=f"fetch it from {URL} (torch-fidelity's release), or set quality.network: reference",
        )
    return path.resolve()


def _checksum_in(url: str) -> str | None:
    """The checksum in a name such as weights-6726825d.pth."""
    found = _NAMED_HASH.search(url)
    return found[1] if found else None


@lru_cache(maxsize=16)
def _sha256(path: str, size: int, modified: int) -> str:
    """Of a file; the other arguments are there so that one that was replaced is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
