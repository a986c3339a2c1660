"""Progress: a bar on a terminal, elsewhere a line a minute."""

import io

from rich.console import Console

from abe.progress import progress, step_progress


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


def test_the_rate_is_of_the_steps_since_it_began(monkeypatch):
    """Not of those before an interruption; in images a second."""
    now, shown = [0.0], io.StringIO()
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with step_progress(Console(file=shown), done=10, steps=20, batch_size=8) as advance:
        now[0] = 2.0
        advance(15, 0.5)
    assert shown.getvalue().splitlines() == ["step     15  loss 0.5000  20 images/s"]
