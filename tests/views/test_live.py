import io
from pathlib import Path

from rich.console import Console

from cispo.views import open_views
from cispo.views.live import LiveView, duration, sparkline
from cispo.views.views import Views


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=110, height=40, color_system=None), stream


def drawn(view: LiveView) -> str:
    console, stream = terminal()
    console.print(view.render())
    return stream.getvalue()


def test_the_panel_shows_phase_curves_speed_and_sandbox() -> None:
    clock = Clock()
    console, _ = terminal()
    view = LiveView(console, "demo", 60, clock_s=clock)
    try:
        for step in range(1, 11):
            clock.now_s += 6.0
            view.step(
                step,
                {
                    "reward/mean": step / 10,
                    "policy/entropy": 1.0 - step / 20,
                    "perf/completion_tokens_per_s": 1834.0,
                    "perf/sandbox_executions": 512.0,
                    "sandbox/frac_timeout": 0.02,
                    **({"eval/heldout/pass@1": 0.25} if step == 5 else {}),
                },
            )
        view.phase("rollout", 24, 64)
        panel = drawn(view)
    finally:
        view.close(failed=False)
    assert "demo  step 10/60  1:00, about 5:33 left" in panel
    assert "rollout" in panel and "24/64" in panel
    assert "▁▂▃▃▄▅▆▆▇█" in panel and "from 0.1 to 1" in panel
    assert "█▇▆▆▅▄▃▃▂▁" in panel
    assert "pass@1 heldout" in panel
    assert "1834 tokens/s sampled" in panel
    assert "sandbox: 512 executions, 2% timed out" in panel
    assert "step 10/60  reward  1.000" in panel and "step  6/60" not in panel


def test_a_phase_of_unknown_length_and_an_empty_panel_can_be_drawn() -> None:
    console, _ = terminal()
    view = LiveView(console, "demo", 2)
    try:
        assert "between steps" in drawn(view)
        view.phase("waiting for workers", 3, 0)
        assert "waiting for workers" in drawn(view)
        view.phase("rollout", 70, 64)
        assert "70/64" in drawn(view)
    finally:
        view.close(failed=False)


def test_messages_stay_above_the_panel_and_are_no_markup() -> None:
    console, stream = terminal()
    views = Views()
    views.open("console", lambda: LiveView(console, "demo", 2))
    views.message("warning: [red] x [/blue] is off")
    views.close()
    assert "warning: [red] x [/blue] is off" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor must be shown again"


def test_a_terminal_gets_the_panel_without_being_asked(tmp_path: Path) -> None:
    console, stream = terminal()
    with open_views(tmp_path, name="demo", steps=1, terminal=console) as views:
        views.step(1, {"reward/mean": 0.5})
    assert "╭─ demo  step 1/1" in stream.getvalue()


def test_sparkline() -> None:
    assert sparkline([], 5) == ""
    assert sparkline([1.0, 1.0], 5) == "▄▄"
    assert sparkline([9.0, 0.0, float("nan"), 7.0], 3) == "▁·█"
    assert sparkline([float("inf")], 3) == "·"


def test_duration() -> None:
    assert [duration(s) for s in (0, 59.9, 61, 3661)] == ["0:00", "0:59", "1:01", "1:01:01"]
