"""Chromium and node for the tests of the page, or a skip where they are not."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def node() -> str:
    """The path of node, if need be of the one in playwright's wheel."""
    wheel = find_spec("playwright")
    inside = Path(wheel.origin).parent / "driver" / "node" if wheel else None
    found = shutil.which("node") or (inside and inside.exists() and str(inside))
    return found or pytest.skip("there is no node here, and no playwright, whose wheel has one")


@contextmanager
def chromium() -> Iterator:
    """A headless browser of playwright's synchronous interface."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
