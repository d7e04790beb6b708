"""Downloads: whole, of the right content, and continued where they broke off."""

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

TRIES, PAUSE, TIMEOUT = 4, 0.5, (5, 20)  # in a row, seconds between, of silence


def download(url: str, path: Path, sha256: str) -> Path:
    """Fetches url into path, unless a file with that hash is there; whole or not at all.

    Raises DataError where it cannot be had or has another hash.
    """
    def check(file: Path) -> None:
        if hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise DataError("another hash than it should have")

    try:
        check(path)
    except (DataError, OSError):
        fetch(url, path, check, keep=False)
    return path


def fetch(url: str, path: Path, check: Callable[[Path], object], keep: bool = True) -> Path:
    """Downloads url into path: under its name only when it is whole, of the size that the server
    tells, and check(file) raises no ValueError.

    What breaks off is continued where it stopped, after a pause and up to TRIES times without a
    new byte, and with keep by the next call too. Raises DataError.
    """
    part = path.with_name(f".{path.name}.part" if keep else f".{path.name}.{os.getpid()}.part")
    label = part.with_suffix(".etag")  # which version of the file the part is of
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with requests.Session() as session:
            _fetch_all(session, url, part, label)
        try:
            check(part)
        except ValueError as error:
            part.unlink()
            label.unlink(missing_ok=True)
            raise DataError(f"{path.name} arrived damaged ({error})") from error
        part.replace(path)
        label.unlink(missing_ok=True)
    except OSError as error:  # requests' errors are too
        raise DataError(f"{path.name} cannot be downloaded ({_reason(error)})") from error
    finally:
        if not keep:
            with suppress(OSError):
                part.unlink(missing_ok=True)
                label.unlink(missing_ok=True)
    return path


def _fetch_all(session: requests.Session, url: str, part: Path, label: Path) -> None:
    """Asks for the rest of the part until it is there. Raises OSError."""
    most, tries = -1, 0
    while True:
        try:
            return _fetch_rest(session, url, part, label)
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 503
            have = part.stat().st_size if part.exists() else 0
            most, tries = max(most, have), 1 if have > most >= 0 else tries + 1
            if tries >= TRIES or (400 <= status < 500 and status not in (408, 416, 429)):
                raise
            if status == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            time.sleep(PAUSE * 2 ** (tries - 1))


def _fetch_rest(session: requests.Session, url: str, part: Path, label: Path) -> None:
    have = part.stat().st_size if part.exists() and label.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": label.read_text(encoding="utf-8")}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0
        if have and not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise requests.ConnectionError("another piece than was asked for")
        if etag := reply.headers.get("ETag", ""):
            label.write_text(etag, encoding="utf-8")
        length = reply.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (open(part, "ab" if have else "wb") as file,
              tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.name,
                   disable=not sys.stderr.isatty()) as bar):
            for block in reply.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"{part.stat().st_size} of {total} bytes arrived")


def _reason(error: OSError) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code}"
    return error.strerror or type(error).__name__
