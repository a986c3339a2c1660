"""Renew docs/images/demo.png: what the learners of the demo look at, cut out of its report.

    .venv/bin/python tools/picture.py demo/report.html

Needs Chromium at /usr/bin/chromium.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Photograph the masks of the report."""
    page_file = Path(sys.argv[1]).resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(page_file.as_uri())
        page.locator("#masks table").last.screenshot(path=ROOT / "docs/images/demo.png")
        browser.close()


if __name__ == "__main__":
    main()
