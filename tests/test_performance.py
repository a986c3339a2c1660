"""docs/performance.md shows what the benchmarks' files say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_the_page_is_written_from_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import performance

    monkeypatch.delitem(sys.modules, "performance")
    stale = "write it anew: python benchmarks/performance.py"
    assert performance.PAGE.read_text() == performance.page(), stale
