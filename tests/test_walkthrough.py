"""docs/walkthrough.md: its Python blocks run as they stand, in order, in one namespace.

A `text` block shows what the Python block above it prints. `python tests/test_walkthrough.py`
writes these and the pictures anew; the test fails when they are stale.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import blocks, run_python
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "walkthrough.md"
PICTURE_BYTES = 60_000  # at most
PICTURE_DIFFERENCE = 15  # of 255, on average: training rounds otherwise on another processor


def page() -> str:
    """The page with what its blocks print here; their pictures go below the working folder."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    whole, end, printed = "", 0, ""
    for block in blocks(PAGE):
        if block["language"] == "python":
            assert not printed, f"the page does not show {printed!r}"
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                run_python(block, PAGE, namespace)
            printed = said.getvalue()
        elif block["language"] == "text":
            whole += block.string[end : block.start("code")] + printed
            end, printed = block.end("code"), ""
    assert not printed, f"the page does not show {printed!r}"
    return whole + block.string[end:]


@pytest.mark.slow
def test_the_page_shows_what_its_code_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "docs" / "images"
    images.mkdir(parents=True)
    stale = "stale: run `python tests/test_walkthrough.py`"
    assert page() == PAGE.read_text(encoding="utf-8"), stale
    made = sorted(images.iterdir())
    kept = ROOT / "docs" / "images"
    assert [file.name for file in made] == [
        file.name for file in sorted(kept.glob("walkthrough-*"))
    ]
    for file in made:
        assert f"](images/{file.name})" in PAGE.read_text(encoding="utf-8")
        assert (kept / file.name).stat().st_size < PICTURE_BYTES
        shown, own = (
            np.asarray(Image.open(folder / file.name).convert("RGB"), float)
            for folder in (kept, images)
        )
        assert shown.shape == own.shape, stale
        assert abs(shown - own).mean() < PICTURE_DIFFERENCE, stale


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.chdir(ROOT):
        PAGE.write_text(page(), encoding="utf-8")
