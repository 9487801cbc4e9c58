"""The browser of `benchmarks.browser` for tests, which are skipped where there is none."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.browser import NAMES, Tab, find_browser
from benchmarks.browser import open_tab as open_found_tab

__all__ = ["Tab", "open_tab"]


@asynccontextmanager
async def open_tab() -> AsyncIterator[Tab]:
    """A fresh browser with one tab."""
    if find_browser() is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    async with open_found_tab() as tab:
        yield tab
