"""Downloads that are verified, resumed after an interruption, and never leave a partial file."""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import requests
from tqdm import tqdm

from tinygpt.data import DataError

TRIES = 4  # in a row without progress
PAUSE = 0.5  # seconds before the first retry
TIMEOUT = (5, 20)  # seconds to connect, and between two reads


def download(url: str, path: Path, sha256: str) -> Path:
    """Downloads url to path, unless path already has this hash. Raises DataError if the download
    fails or has another hash; path is unchanged then."""
    def check(file: Path) -> None:
        if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise DataError("its hash is not the expected one")

    try:
        check(path)
    except (DataError, OSError):
        fetch(url, path, check, keep=False)
    return path


def fetch(url: str, path: Path, check: Callable[[Path], object], keep: bool = True) -> Path:
    """Downloads url to path, which appears only when it is complete, has the size that the server
    reported, and check(file) raises no ValueError.

    An interrupted download is resumed after a pause, up to TRIES times without progress; with
    keep, the next call resumes it too. Raises DataError.
    """
    part = path.with_name(f".{path.name}.part" if keep else f".{path.name}.{os.getpid()}.part")
    etag_file = part.with_suffix(".etag")  # of the version that `part` belongs to
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with requests.Session() as session:
            _fetch_all(session, url, part, etag_file)
        try:
            check(part)
        except ValueError as error:
            part.unlink()
            etag_file.unlink(missing_ok=True)
            raise DataError(f"the downloaded {path.name} is damaged ({error}): try again"
                            ) from error
        part.replace(path)
        etag_file.unlink(missing_ok=True)
    except OSError as error:  # includes those of requests
        raise DataError(f"{path.name} cannot be downloaded ({_reason(error)})") from error
    finally:
        if not keep:
            with suppress(OSError):
                part.unlink(missing_ok=True)
                etag_file.unlink(missing_ok=True)
    return path


def _fetch_all(session: requests.Session, url: str, part: Path, etag_file: Path) -> None:
    """Requests the rest of the file until it is complete. Raises OSError."""
    largest, tries = -1, 0
    while True:
        try:
            return _fetch_rest(session, url, part, etag_file)
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 503
            size = part.stat().st_size if part.exists() else 0
            tries = 1 if size > largest >= 0 else tries + 1
            largest = max(largest, size)
            if tries >= TRIES or (400 <= status < 500 and status not in (408, 416, 429)):
                raise
            if status == 416:  # range not satisfiable: the part is longer than the file
                part.unlink(missing_ok=True)
            time.sleep(PAUSE * 2 ** (tries - 1))


def _fetch_rest(session: requests.Session, url: str, part: Path, etag_file: Path) -> None:
    """One request, for the bytes that follow those in part. Raises OSError."""
    start = part.stat().st_size if part.exists() and etag_file.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": etag_file.read_text(encoding="utf-8")}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        reply.raise_for_status()
        start = start if reply.status_code == 206 else 0
        if start and not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise requests.ConnectionError("the server sent another range than requested")
        if etag := reply.headers.get("ETag", ""):
            etag_file.write_text(etag, encoding="utf-8")
        length = reply.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (open(part, "ab" if start else "wb") as file,
              tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.name,
                   disable=not sys.stderr.isatty()) as bar):
            for block in reply.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes were received")


def _reason(error: OSError) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code}"
    return error.strerror or type(error).__name__
