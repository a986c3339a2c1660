"""Progress: a bar on a terminal, elsewhere a line a minute."""

import io

from rich.console import Console

from abe.progress import progress


def test_off_a_terminal_it_is_a_line_a_minute(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    shown = io.StringIO()
    with progress(Console(file=shown), "reading", 1000) as on_progress:
        for done in range(1, 1001):
            now += 0.125  # seconds
            on_progress(done)
    assert shown.getvalue().splitlines() == [
        "reading: 480 of 1,000",
        "reading: 960 of 1,000",
    ]


def test_on_a_terminal_it_is_a_bar():
    shown = io.StringIO()
    with progress(Console(file=shown, force_terminal=True), "reading", 4) as on_progress:
        on_progress(2)
    assert "reading" in shown.getvalue()
    assert "50%" in shown.getvalue()
    with progress(None, "reading", 4) as on_progress:
        on_progress(2)
