"""Where the tests find node and Chromium."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest


def node() -> str:
    """node's path, or that of the one in playwright's wheel; a skip without either."""
    wheel = find_spec("playwright")
    inside = Path(wheel.origin).parent / "driver" / "node" if wheel else None
    found = shutil.which("node") or (inside and inside.exists() and str(inside))
    return found or pytest.skip("there is no node here, and no playwright, whose wheel has one")
