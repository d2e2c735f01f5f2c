"""Reads byte ranges of objects at URLs, and repeats requests that failed for the moment."""

from __future__ import annotations

import importlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipelines.checks import between, check_fields, positive
from pipelines.files import cache_folder
from pipelines.names import Url, visible
from pipelines.runtime import InputError, invalid

_log = logging.getLogger("mvssl.data")
_LIBRARY = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud auth application-default login",
    "hf": "set HF_TOKEN, or log in with hf auth login",
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt]?)(i?)b?", re.IGNORECASE)
_MOST_BYTES = 1 << 60
_DEEPEST = 6  # levels of folders that pages of links are followed
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds before the first repetition; it doubles
_TRANSIENT = (408, 425, 429)  # and 500 and above
_BUGS = (TypeError, AttributeError, NameError, KeyError, NotImplementedError)
_BACKSTOP = 20  # timeouts that a whole request may take, for libraries without a timeout between two packets


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How data at s3://, gs://, hf:// and http(s):// are read; no effect on other data.

    Attributes:
        cache: folder on a local disk that processes of a host share; by default remote/ in the user's cache folder.
        cache_size: bytes that the folder may hold, such as 200GB; the least recently used go first. 0 caches nothing.
        block: bytes that are fetched and cached at once, such as 4MiB.
        connections: requests in flight of each process.
        retries: of a request that failed for the moment, after waits from half a second to half a minute.
        timeout: seconds without an answer after which a request has failed.
    """

    cache: Path | None = None
    cache_size: str = "200GB"
    block: str = "4MiB"
    connections: int = between(1, 256, 16)
    retries: int = between(0, 1000, 6)
    timeout: float = positive(30.0)

    def __post_init__(self) -> None:
        check_fields(self, prefix="remote.")
        parse_size(self.cache_size, "remote.cache_size")
        if not 1 << 16 <= self.block_bytes <= 1 << 30:
            raise invalid("remote.block", self.block, "between 64KiB and 1GiB", "give a size such as 4MiB")
        if self.cache is not None and _is_url(self.cache):
            raise invalid("remote.cache", str(self.cache), "a folder of this machine", "give a path on a local disk")

    @property
    def folder(self) -> Path:
        """The cache folder."""
        return cache_folder() / "remote" if self.cache is None else self.cache.expanduser()

    @property
    def cache_bytes(self) -> int:
        """Size of the cache."""
        return parse_size(self.cache_size, "remote.cache_size")

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        return parse_size(self.block, "remote.block")


def _is_url(path: Path) -> bool:
    return isinstance(path, Url) or ":/" in str(path)


def parse_size(text: str, field: str) -> int:
    """Bytes of a size such as 200GB, 1.5TB, 512MiB or 4096."""
    found = _SIZE.fullmatch(text.strip())
    unit = 1 if found is None else (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
    if found is None or float(found[1]) * unit > _MOST_BYTES:
        raise invalid(field, text, "a size such as 200GB or 512MiB", "write a number and a unit")
    return int(float(found[1]) * unit)


class Missing(InputError):
    """The object does not exist."""


class Refused(Missing):
    """The object may not be read with the account's rights; without a right to list, S3 says so of missing ones too."""


class Remote:
    """Objects below a URL. Thread-safe; opens its connections again after a fork."""

    def __init__(self, root: Url, options: RemoteOptions) -> None:
        """Raises InputError if the scheme is unknown or its library is not installed."""
        self.root = root
        self._options = options
        self._random = random.Random()  # for waits only
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None  # (process, filesystem)
        self.closing = threading.Event()
        self.ignores_ranges = False
        """Whether the server has answered a request for a part with everything."""
        if root.scheme not in _LIBRARY:
            known = ", ".join(f"{scheme}://" for scheme in _LIBRARY)
            raise InputError(
                f"data is {str(root)!r} but must be a path or begin with one of {known}: copy the data there, or mount "
                "it."
            )
        if "://" not in str(root):
            raise InputError(f"data is '{root}//' but must name a bucket or server too: write {root}//NAME/FOLDER.")
        for name in ("fsspec", _LIBRARY[root.scheme]):
            try:
                importlib.import_module(name)
            except ImportError as error:
                extra = "'mvssl[remote]'" if name != "gcsfs" else "gcsfs"
                raise InputError(
                    f"data is {str(root)!r}, which needs {name}, which cannot be imported ({error}): pip install "
                    f"{extra}."
                ) from error

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of an object; all of them where the server `ignores_ranges`.

        Raises:
            Missing: it does not exist; Refused: it may not be read.
            InputError: the request was refused, or failed in all attempts.
        """
        whole = start == 0 and end is None

        def request() -> bytes:
            fs = self._filesystem()
            path = fs._strip_protocol(str(self.root / name))
            arguments = {} if whole else {"start": start, "end": end}
            data = bytes(self._call(fs, "cat_file", path, **arguments))
            if end is not None and len(data) > end - start:
                self.ignores_ranges = True
            elif end is not None and len(data) < end - start:
                raise OSError(f"the answer ended after {len(data):,} of {end - start:,} bytes")
            return data

        data: bytes = self._retried(self.root / name, request)
        return data

    def facts(self, name: str) -> dict[str, str]:
        """Size, ETag and time of an object, as far as the server tells them."""

        def request() -> dict[str, str]:
            fs = self._filesystem()
            fs.invalidate_cache()
            return _facts(self._call(fs, "info", fs._strip_protocol(str(self.root / name))))

        found: dict[str, str] = self._retried(self.root / name, request)
        return found

    def listing(self, folder: str = "") -> dict[str, dict[str, str]]:
        """Facts, as far as they are known, of the files below a folder, by name; {} if the server does not list them.

        Raises:
            InputError: as `read`.
        """
        top = self.root / folder

        def request() -> dict[str, dict[str, str]]:
            fs = self._filesystem()
            fs.invalidate_cache()
            start = fs._strip_protocol(str(top)).rstrip("/") + "/"
            if self.root.scheme in ("http", "https"):
                return dict(self._linked(fs, start, start, _DEEPEST))
            found = self._call(fs, "find", start, detail=True)
            return {name[len(start) :]: _facts(info) for name, info in found.items() if name.startswith(start)}

        try:
            found: dict[str, dict[str, str]] = self._retried(top, request)
        except Refused:
            raise
        except Missing:
            return {}
        return {f"{folder}/{name}".lstrip("/"): facts for name, facts in found.items()}

    def _linked(self, fs: Any, folder: str, start: str, depth: int) -> Iterator[tuple[str, dict[str, str]]]:
        """The files that a page of links names, and those of folders below."""
        for entry in self._call(fs, "ls", folder, detail=True):
            name = entry["name"]
            if not name.startswith(folder) or "?" in name or "#" in name or name[len(folder) :].startswith("."):
                continue
            if not name.endswith("/"):
                yield unquote(name[len(start) :]), {}
            elif depth and "/" not in name[len(folder) : -1]:
                yield from self._linked(fs, name, start, depth - 1)

    def _call(self, fs: Any, method: str, path: str, **arguments: Any) -> Any:
        if not getattr(fs, "async_impl", False):
            return getattr(fs, method)(path, **arguments)
        from fsspec.asyn import sync

        return sync(fs.loop, getattr(fs, f"_{method}"), path, timeout=_BACKSTOP * self._options.timeout, **arguments)

    def _filesystem(self) -> Any:
        """The filesystem of this process."""
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                self._made = (os.getpid(), self._make())
            return self._made[1]

    def _make(self) -> Any:
        import fsspec
        from fsspec.config import conf

        scheme, timeout = self.root.scheme, self._options.timeout
        given: dict[str, Any] = {"skip_instance_cache": True}  # others' instances keep their settings
        if scheme == "s3":
            settings = {
                "connect_timeout": timeout,
                "read_timeout": timeout,
                "retries": {"total_max_attempts": 1},  # repeated by `_retried`, which counts and names them
                "max_pool_connections": self._options.connections,
            }
            given["config_kwargs"] = settings | dict(conf.get("s3", {}).get("config_kwargs", {}))
        elif scheme in ("http", "https"):
            import aiohttp

            limit = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            given["client_kwargs"] = {"timeout": limit} | dict(conf.get(scheme, {}).get("client_kwargs", {}))
        fs = fsspec.filesystem(scheme, **given)
        if scheme == "s3":
            fs.retries = 1
        return fs

    def _retried(self, url: Path, request: Callable[[], Any]) -> Any:
        """The result of a request, repeated after growing waits while its failure may pass."""
        began, wait = time.monotonic(), _FIRST_WAIT
        for attempt in range(self._options.retries + 1):
            try:
                return request()
            except InputError:
                raise
            except Exception as error:
                if isinstance(error, _BUGS):
                    raise
                last, status = error, status_of(error)
            problem = f"status {status}" if status is not None else visible(_in_words(last))
            refusal = self._refusal(url, last, status, problem)
            if refusal is not None:
                raise refusal from last
            if attempt == self._options.retries:
                break
            _log.debug("%s: attempt %d failed (%s)", url, attempt + 1, problem)
            if self.closing.wait(wait * self._random.uniform(0.5, 1.0)):
                break
            wait = min(2 * wait, _LONGEST_WAIT)
        raise InputError(
            f"{url} could not be read: {attempt + 1} attempts in {time.monotonic() - began:.0f} s failed, the last "
            f"with {problem}: check the network and the server and run the same command again (a run with --resume), "
            "or raise --remote.retries and --remote.timeout."
        ) from last

    def _refusal(self, url: Path, error: Exception, status: int | None, problem: str) -> InputError | None:
        """The error if it makes no sense to ask again."""
        cause = type(error.__cause__ or error.__context__).__module__  # fsspec says so of any failed HEAD request
        is_missing = isinstance(error, FileNotFoundError) and status is None and not cause.startswith("aiohttp")
        if is_missing or status in (404, 410):
            return Missing(f"{url} does not exist (status {status or 404}): check the address.")
        no_account = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
        if isinstance(error, PermissionError) or status in (401, 403) or no_account:
            remedy = _CREDENTIALS.get(self.root.scheme, "give the server's data to readers, or use another address")
            return Refused(f"{url} may not be read with these credentials ({problem}): {remedy}.")
        if status is not None and 400 <= status < 500 and status not in _TRANSIENT:
            return InputError(f"{url} is refused by the server ({problem}): check the address and the server.")
        if status is None and isinstance(error, ValueError):  # such as an address that is none
            return InputError(f"{url} cannot be read ({problem}): check the address.")
        return None


def _in_words(error: BaseException) -> str:
    """Kind and text of an exception, or of the one behind it where fsspec only says that there is no such file."""
    behind = error.__cause__ or error.__context__
    seen = behind if isinstance(error, FileNotFoundError) and behind is not None else error
    return f"{type(seen).__name__}: {seen}"[:200].rstrip(": ")


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    """Size, ETag and time in what a library says of an object."""
    by_name = {key.lower().replace("-", "_"): value for key, value in found.items() if value is not None}
    wanted = ("size", "etag", "last_modified", "lastmodified", "mtime", "blob_id", "generation")
    return {key: str(by_name[key]) for key in wanted if key in by_name}


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception of one of the libraries, or in those that caused it."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            break
        response = getattr(seen, "response", None)
        nested = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        by_code = type(seen).__module__.startswith(("gcsfs", "google"))  # aiohttp's code 400 says that of a cut answer
        own = getattr(seen, "code" if by_code else "status", None)
        found = (own, getattr(response, "status_code", None))
        for value in (nested, *found):
            if isinstance(value, int) and 100 <= value < 600:
                return value
        seen = seen.__cause__ or seen.__context__
    return None
