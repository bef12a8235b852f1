"""Where a data set lies, and that nothing outside of it is read."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from diffult_ray.errors import BadInput

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

RETRIES = 30  # seconds for which Google Cloud's client asks a server again that does not answer


def local_folder(root: str) -> Path:
    """`dataset.root` as an absolute folder.

    Raises:
        BadInput: if there is none.
    """
    path = Path(root).expanduser().absolute()
    if not path.is_dir():
        rule = "is a folder" if path.exists() else "no such folder"
        raise BadInput(where="dataset.root", rule=rule, value=str(path), advice="say where the data are")
    return path


def file_system(root: str) -> tuple[FileSystem, str]:
    """The pyarrow file system of a local path or URI, and the path within it.

    Raises:
        BadInput: for a URI that pyarrow does not know or cannot reach.
    """
    from pyarrow import fs

    if "://" not in root:
        return fs.LocalFileSystem(), str(Path(root).expanduser().absolute())
    try:
        return fs.FileSystem.from_uri(_impatient(root))
    except Exception as error:  # pyarrow raises by scheme: ArrowInvalid, OSError, ImportError
        raise BadInput(
            where="dataset.root", rule=f"is a local path or a URI that pyarrow opens: {error}", value=root
        ) from error


def _impatient(uri: str) -> str:
    """Google Cloud's client asks a storage that fails for 15 minutes, unless told otherwise.

    >>> _impatient("gs://bucket/birds"), _impatient("s3://bucket/birds")
    ('gs://bucket/birds?retry_limit_seconds=30', 's3://bucket/birds')
    """
    if not uri.startswith("gs://") or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={RETRIES}"


def outside(root: str, relative: str) -> str | None:
    """Why a relative path leads out of its root, or None if it stays inside.

    >>> outside("/data", "../other/a.png")
    "has '..' in its path"
    """
    path = PurePosixPath(relative)
    if path.is_absolute():
        return "is an absolute path"
    if ".." in path.parts:
        return "has '..' in its path"
    if "\0" in relative:
        return "has a null character in its path"
    real_root = _real_folder(root)
    folder, name = os.path.split(os.path.join(root, relative))
    real = os.path.join(_real_folder(folder), name)
    real = os.path.realpath(real) if os.path.islink(real) else real
    return None if real.startswith(real_root + os.sep) else "is a link that leads out of the root"


@lru_cache(maxsize=65536)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder).rstrip(os.sep)
