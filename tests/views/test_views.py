import io
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from cispo.views import View, Views, open_views
from cispo.views.lines import number, step_lines

STEP = {
    "reward/mean": 0.4125,
    "group/frac_mixed": 0.5,
    "completion/length_tokens/mean": 84.25,
    "completion/frac_truncated": 0.0625,
    "policy/entropy": 0.8314,
    "loss/frac_clipped_high": 0.01,
    "optim/grad_norm": 1.5,
    "policy/mismatch/max": 0.0,
    "perf/completion_tokens_per_s": 1834.2,
    "time_s/step": 1.93,
}
EVALUATION = {
    "eval/heldout/pass@1": 0.3125,
    "eval/heldout/pass@1/low": 0.27,
    "eval/heldout/pass@1/high": 0.357,
    "eval/heldout/well_formed": 0.95,
    "eval/heldout/correct_given_form": 0.33,
}


class Recorder(View):
    """Remembers what it is told, and fails in the method named."""

    def __init__(self, name: str, breaks_in: str = "") -> None:
        self.name = name
        self.breaks_in = breaks_in
        self.told: list[tuple[object, ...]] = []

    def _tell(self, *what: object) -> None:
        if what[0] == self.breaks_in:
            raise OSError("no space\nleft")
        self.told.append(what)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._tell("step", step)

    def phase(self, name: str, done: int, total: int) -> None:
        self._tell("phase", name, done, total)

    def message(self, text: str) -> None:
        self._tell("message", text)

    def close(self, failed: bool) -> None:
        self._tell("close", failed)


def views_of(*recorders: Recorder) -> Views:
    views = Views()
    for recorder in recorders:
        views.open(recorder.name, lambda recorder=recorder: recorder)  # type: ignore[misc]  # binds the loop's value
    return views


def test_every_view_is_told_everything_in_order() -> None:
    first, second = Recorder("first"), Recorder("second")
    with views_of(first, second) as views:
        views.phase("rollout", 1, 2)
        views.step(1, {})
        views.message("hello")
    told = [("phase", "rollout", 1, 2), ("step", 1), ("message", "hello"), ("close", False)]
    assert first.told == told and second.told == told


@pytest.mark.parametrize("method", ["step", "phase", "message"])
def test_a_view_that_breaks_is_reported_once_and_closed_and_the_rest_go_on(method: str) -> None:
    broken, whole = Recorder("broken", breaks_in=method), Recorder("whole")
    views = views_of(broken, whole)
    for step in (1, 2):
        views.step(step, {})
        views.phase("rollout", 1, 2)
        views.message("hello")
    views.close()
    reports = [what[1] for what in whole.told if what[0] == "message" and "warning" in str(what[1])]
    assert reports == ["warning: broken is off: OSError: no space left; the run goes on without it"]
    assert [what for what in whole.told if what[0] == "step"] == [("step", 1), ("step", 2)]
    assert broken.told[-1] == ("close", True)


def test_a_view_that_cannot_open_or_close_is_reported() -> None:
    whole, stuck = Recorder("whole"), Recorder("stuck", breaks_in="close")
    views = views_of(whole, stuck)

    def fail() -> View:
        raise ModuleNotFoundError("No module named 'wandb'")

    views.open("W&B", fail)
    views.close()
    messages = [str(what[1]) for what in whole.told if what[0] == "message"]
    assert "W&B is off: ModuleNotFoundError: No module named 'wandb'" in messages[0]
    assert "stuck (while closing) is off: OSError" in messages[1]
    assert whole.told[-1] == ("close", False)


def test_when_every_view_is_broken_the_report_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    views = views_of(Recorder("one", breaks_in="message"), Recorder("two", breaks_in="message"))
    views.message("hello")
    error = capsys.readouterr().err
    assert "one is off" in error and "two is off" in error
    views.step(1, {})


def test_views_close_as_failed_when_the_run_raises() -> None:
    recorder = Recorder("one")
    with pytest.raises(RuntimeError), views_of(recorder):
        raise RuntimeError("the run failed")
    assert recorder.told == [("close", True)]


def test_lines_are_aligned_whatever_was_measured() -> None:
    full = "\n".join(step_lines(7, 60, STEP))
    sparse = "\n".join(step_lines(60, 60, {"reward/mean": -0.5, "time_s/step": 12.25}))
    assert full.startswith("step  7/60  reward  0.412  mixed  50%  length   84.2  truncated   6%  entropy 0.831")
    assert sparse.startswith("step 60/60  reward -0.500  mixed    -")
    assert len(full) == len(sparse)
    for label in ("mixed", "truncated", "grad norm", "tokens/s"):
        assert full.index(label) == sparse.index(label)


def test_an_evaluation_has_a_line_of_its_own_with_its_interval() -> None:
    assert list(step_lines(0, 60, EVALUATION)) == [
        "step  0/60  eval heldout  pass@1 0.312 [0.270, 0.357]  well formed 95%  correct given form 33%"
    ]
    assert len(list(step_lines(5, 60, STEP | EVALUATION))) == 2
    (failed,) = step_lines(0, 60, {"eval/heldout/frac_error": 1.0})
    assert failed == "step  0/60  eval heldout  rewards failed 100%"


def test_numbers_are_short() -> None:
    shown = [number(v) for v in (0.0, 12.0, 1834.24, 0.000012345, 5e9, float("nan"), float("inf"))]
    assert shown == ["0", "12", "1834.2", "1.23e-05", "5e+09", "nan", "inf"]


def test_a_run_without_a_terminal_prints_the_lines_that_log_txt_keeps(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_views(tmp_path, name="demo", steps=60, terminal=Console(file=stream, width=20)) as views:
        views.phase("rollout", 1, 2)
        views.step(1, STEP | EVALUATION)
        views.message("[bold] is no markup here")
    printed = stream.getvalue().splitlines()
    assert printed == [*step_lines(1, 60, STEP | EVALUATION), "[bold] is no markup here"]
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", "", line) for line in logged] == printed


def test_log_txt_is_continued_by_a_resumed_run(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with open_views(tmp_path, name="demo", steps=2, console="lines", terminal=Console(file=io.StringIO())) as views:
            views.message(text)
    assert [line.split()[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


def test_advice_reaches_console_and_log(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_views(tmp_path, name="demo", steps=9, advice_every_steps=5, terminal=Console(file=stream)) as views:
        for step in range(1, 7):
            views.step(step, {"reward/frac_error": 0.25})
    assert stream.getvalue().count("advice: reward/frac_error is 0.25 (healthy: at most 0)") == 2
    assert "advice: reward/frac_error" in (tmp_path / "log.txt").read_text()


def test_ray_metrics_without_ray_are_reported(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_views(tmp_path, name="demo", steps=1, ray_metrics=True, terminal=Console(file=stream)) as views:
        views.step(1, STEP)
    assert "Ray metrics is off: UnsupportedError: this process has not joined Ray" in stream.getvalue()
    assert "reward  0.412" in stream.getvalue()
