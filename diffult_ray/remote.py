"""A storage on S3 or Google Cloud: objects below a prefix, by name, with some seconds of patience.

    s3://bucket/prefix                                       credentials as the AWS command line finds them
    s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http    another server; also by AWS_ENDPOINT_URL
    gs://bucket/prefix                                       application default credentials
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from diffult_ray.errors import BadInput, masked, said
from diffult_ray.tracking import within

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

PATIENCE = 30.0  # seconds for which a failing storage is asked again
ANSWER = 10.0  # seconds for the first answer of a storage
RETRIES = 2.0  # seconds of Google's own, of which the last pause may be as long again; then our patience
CONNECTING, REQUEST = 3.0, 20.0  # seconds of one request
AT_ONCE = 8  # files that are transferred side by side
PIECE = 8 * 2**20  # bytes
OPTIONS = {"s3": {"endpoint_override", "scheme", "region"}, "gs": {"endpoint_override", "scheme"}}
MISSING = re.compile(r"NO_SUCH_KEY|^No such directory")  # which Arrow tells without an errno
PERMANENT = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|INVALID_CLIENT_TOKEN|EXPIRED"
    r"|status 40[0-4]\b|PERMISSION_DENIED|UNAUTHENTICATED|permission|Forbidden"
    r"|Permanent error", re.IGNORECASE,
)
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}

Result = TypeVar("Result")


def is_uri(root: object) -> bool:
    return "://" in str(root)


def refusal(uri: str, cause: str) -> BadInput:
    return BadInput(
        where="--storage", rule="must be a folder, or an s3:// or gs:// URI, that can be written",
        value=masked(uri), advice=f"{masked(cause)}; give another with --storage or DIFFULT_STORAGE",
    )


@dataclass(frozen=True)
class Stat:
    """What a listing tells of an object."""

    bytes: int
    time: int  # of its last change, in nanoseconds; S3 knows seconds


@dataclass(frozen=True)
class Address:
    """A storage URI in its parts."""

    scheme: str
    bucket: str
    prefix: str
    options: tuple[tuple[str, str], ...] = ()
    key: str | None = None
    secret: str | None = None

    @classmethod
    def of(cls, uri: str) -> Address:
        """Of a URI as it was typed, and of the environment's endpoint.

        Raises:
            BadInput: unless it is one of S3 or Google Cloud, with known options.
        """
        try:
            parts = urlsplit(uri)
            named = dict(parse_qsl(parts.query, keep_blank_values=True))
            host, key, secret = parts.netloc.rpartition("@")[2], parts.username, parts.password
        except ValueError as error:
            raise refusal(uri, str(error)) from None
        if parts.scheme not in OPTIONS:
            raise refusal(uri, f"no storage of {parts.scheme}:// is known")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", host) or parts.fragment:
            raise refusal(uri, f"write {parts.scheme}://bucket/prefix; in a secret, write / as %2F")
        if parts.scheme == "gs" and key not in (None, "anonymous"):
            raise refusal(uri, "gs:// knows no user but anonymous; credentials come from the environment")
        for name in sorted(set(named) - OPTIONS[parts.scheme]):
            raise refusal(uri, f"no option is called {name}; {_listed(OPTIONS[parts.scheme])} are")
        prefix = "/".join(part for part in unquote(parts.path).split("/") if part)
        if ".." in prefix.split("/"):
            raise refusal(uri, "a prefix has no .. in it")
        found = {**_of_environment(parts.scheme), **named} if "endpoint_override" not in named else named
        return cls(parts.scheme, host, prefix, tuple(sorted(found.items())), *map(_unquoted, (key, secret)))

    @property
    def uri(self) -> str:
        """Complete: another machine opens the same storage with it. It may hold a secret."""
        parts = [quote(part, safe="") for part in (self.key, self.secret) if part is not None]
        return self._with(f"{':'.join(parts)}@" if parts else "")

    @property
    def shown(self) -> str:
        """As it may be written down."""
        return self._with("")

    def _with(self, user: str) -> str:
        query = f"?{urlencode(self.options)}" if self.options else ""
        return f"{self.scheme}://{user}{self.path}{query}"

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _unquoted(text: str | None) -> str | None:
    return None if text is None else unquote(text)


def _of_environment(scheme: str) -> dict[str, str]:
    """The endpoint that the AWS command line would take."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme != "s3" or not url:
        return {}
    parts = urlsplit(url)
    return {"endpoint_override": parts.netloc, "scheme": parts.scheme or "https"}


class Remote:
    """Objects below the prefix of a URI. Pickled, it is that URI; shown, it has no secret.

    Raises:
        BadInput: for a URI that is none.
        FileNotFoundError: from every method, where there is no such object.
        OSError: from every method, if the storage refuses, or still fails after `PATIENCE` seconds.
    """

    def __init__(self, uri: str) -> None:
        self.address = Address.of(uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Remote, (self.address.uri,))

    def __repr__(self) -> str:
        return f"Remote({self.address.shown!r})"

    @cached_property
    def system(self) -> FileSystem:
        """Which libraries that read and write Arrow file systems can use too, with `path`."""
        return _google(self.address) if self.address.scheme == "gs" else _amazon(self.address)

    def path(self, name: str = "") -> str:
        """An object's path in `system`."""
        return f"{self.address.path}/{name}" if name else self.address.path

    # --- one object ---

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            with self.system.open_input_stream(self.path(name)) as file:
                return file.read()

        return patiently(read)

    def write(self, name: str, content: bytes) -> None:
        def write() -> None:
            with self.system.open_output_stream(self.path(name)) as file:
                file.write(content)

        patiently(write)

    def get(self, name: str, path: Path) -> None:
        """Copy an object to a new file; whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")

        def get() -> None:
            with self.system.open_input_stream(self.path(name)) as source, open(draft, "wb") as target:
                shutil.copyfileobj(source, target, PIECE)

        try:
            patiently(get)
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def put(self, path: Path, name: str) -> None:
        """Copy a file to an object, which is there when all of it is."""

        def put() -> None:
            with open(path, "rb") as source, self.system.open_output_stream(self.path(name)) as target:
                _copy(source, target)

        patiently(put)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            patiently(lambda: self.system.delete_file(self.path(name)))

    def copy(self, name: str, other: str) -> None:
        patiently(lambda: self.system.copy_file(self.path(name), self.path(other)))

    # --- many ---

    def list(self, name: str = "") -> dict[str, Stat]:
        """Objects below a name, by their names below it. Empty where there is nothing."""
        from pyarrow.fs import FileSelector, FileType

        base = self.path(name)
        wanted = FileSelector(base, recursive=True, allow_not_found=True)
        found = patiently(lambda: self.system.get_file_info(wanted))
        return {
            info.path[len(base) + 1 :]: Stat(info.size, info.mtime_ns or 0)
            for info in found if info.type == FileType.File
        }

    def delete_below(self, name: str) -> None:
        with suppress(FileNotFoundError):
            patiently(lambda: self.system.delete_dir(self.path(name)))

    # --- before the first use ---

    def check(self) -> None:
        """Whether the storage answers, and lets us in; within some seconds.

        Raises:
            BadInput: if it does not.
        """
        if self.address.key is None and not _any_credentials(self.address.scheme):
            raise refusal(self.address.uri, f"no credentials: set {CREDENTIALS[self.address.scheme]}")
        from pyarrow.fs import FileType

        def look() -> Any:
            return self.system.get_file_info(self.address.bucket).type == FileType.NotFound

        if self._answer(look):
            raise refusal(self.address.uri, f"there is no bucket {self.address.bucket}; make it first")
        self._answer(lambda: self.system.get_file_info(self.path("store.json")))

    def try_writing(self, name: str) -> None:
        """Write and remove an object.

        Raises:
            BadInput: if that is refused.
        """

        def attempt() -> None:
            with self.system.open_output_stream(self.path(name)) as file:
                file.write(b"-")
            self.system.delete_file(self.path(name))

        self._answer(attempt)

    def _answer(self, call: Callable[[], Any]) -> Any:
        from pyarrow import ArrowException

        try:
            return within(ANSWER, call)
        except (OSError, ArrowException) as error:
            raise refusal(self.address.uri, cause(error)) from error


def cause(error: BaseException) -> str:
    """What a storage has said, in short."""
    text = str(error)
    if re.search(r"NO_SUCH_BUCKET", text):
        return "there is no such bucket"
    if re.search(r"ACCESS_DENIED|status 403|PERMISSION_DENIED|Forbidden", text):
        return f"access is denied: {said(error)}"
    return said(error)


def patiently(call: Callable[[], Result]) -> Result:
    """The result of a call that is tried again while the storage fails, but not where it refuses.

    Raises:
        FileNotFoundError: where there is no such object.
        OSError: for all else, also where Arrow has no kind for it.
    """
    from pyarrow import ArrowException

    end, pause = time.monotonic() + PATIENCE, 0.25
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            if MISSING.search(str(error)):
                raise FileNotFoundError(str(error)) from error
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if PERMANENT.search(str(error)) or time.monotonic() + pause > end:
                raise OSError(str(error)) from error
        time.sleep(pause)
        pause = min(4.0, 2 * pause)


def side_by_side(call: Callable[..., Result], arguments: Iterable[tuple[Any, ...]]) -> list[Result]:
    """Results of calls of transfers, several at a time."""
    arguments = list(arguments)
    if len(arguments) < 2:
        return [call(*each) for each in arguments]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda each: call(*each), arguments))


def _copy(source: IO[bytes], target: Any) -> None:
    """In pieces; a small file in one request."""
    for piece in _pieces(source):
        target.write(piece)


def _pieces(source: IO[bytes]) -> Iterator[bytes]:
    while piece := source.read(PIECE):
        yield piece


# --- the two kinds --------------------------------------------------------------------------------


def _amazon(address: Address) -> FileSystem:
    from pyarrow.fs import S3FileSystem

    options = dict(address.options)
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if "endpoint_override" in options else _region(address.bucket)
    return S3FileSystem(
        access_key=address.key, secret_key=address.secret, region=region,
        scheme=options.get("scheme", "https"), endpoint_override=options.get("endpoint_override"),
        connect_timeout=CONNECTING, request_timeout=REQUEST,
        allow_delayed_open=True,  # a small object is one request
    )


def _region(bucket: str) -> str:
    from pyarrow.fs import resolve_s3_region

    return resolve_s3_region(bucket)


def _google(address: Address) -> FileSystem:
    from datetime import timedelta

    from pyarrow.fs import GcsFileSystem

    options = dict(address.options)
    return GcsFileSystem(
        anonymous=address.key == "anonymous", scheme=options.get("scheme", "https"),
        endpoint_override=options.get("endpoint_override"), retry_time_limit=timedelta(seconds=RETRIES),
    )


def _any_credentials(scheme: str) -> bool:
    """Whether there may be some: in the environment, in the home folder, or of the machine."""
    environment, home = os.environ, Path.home()
    if scheme == "gs":
        named = environment.get("GOOGLE_APPLICATION_CREDENTIALS")
        kept = home / ".config" / "gcloud" / "application_default_credentials.json"
        return bool(named) or kept.exists() or _answers("metadata.google.internal")
    if any(environment.get(name) for name in (
        "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    )):
        return True
    files = (environment.get(f"AWS_{name}_FILE") or home / ".aws" / file
             for name, file in (("SHARED_CREDENTIALS", "credentials"), ("CONFIG", "config")))
    if any(Path(file).exists() for file in files):
        return True
    return environment.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true" and _answers("169.254.169.254")


def _answers(host: str) -> bool:
    """Whether the machine has a metadata service, which hands out its role's credentials."""
    try:
        within(2.0, lambda: socket.create_connection((host, 80), 1.5).close())
    except OSError:
        return False
    return True
