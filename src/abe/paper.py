"""The paper's own numbers: Tables 1-8 as printed, read from `paper_tables.json`."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def _tables() -> dict[str, Any]:
    text = resources.files("abe").joinpath("paper_tables.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def table_rows(table: str) -> list[dict[str, Any]]:
    """The rows of "table1" .. "table8"; the superscripts of method names are written "^512"."""
    rows: list[dict[str, Any]] = _tables()[table]["rows"]
    return rows
