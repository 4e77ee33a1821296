"""A step as one aligned line of plain text, for log.txt and for a console that is no terminal."""

import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from cispo.views.views import View


def number(value: float) -> str:
    """At most 8 characters: three significant digits, as an integer where it is one, with an exponent where needed."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.1f}" if 100 <= abs(value) < 1e5 else f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.0f}%" if math.isfinite(value) else str(value)


def fixed(value: float) -> str:
    return f"{value:.3f}"


Format = Callable[[float], str]

COLUMNS: tuple[tuple[str, str, int, Format], ...] = (
    ("reward", "reward/mean", 6, fixed),
    ("mixed", "group/frac_mixed", 4, percent),
    ("length", "completion/length_tokens/mean", 6, number),
    ("truncated", "completion/frac_truncated", 4, percent),
    ("entropy", "policy/entropy", 5, fixed),
    ("clipped", "loss/frac_clipped_high", 4, percent),
    ("grad norm", "optim/grad_norm", 6, number),
    ("mismatch", "policy/mismatch/max", 8, number),
    ("tokens/s", "perf/completion_tokens_per_s", 6, number),
    ("s", "time_s/step", 5, number),
)
"""Label, metric, width of the value and its format, in the order of the line."""

EVALUATION_COLUMNS: tuple[tuple[str, str, Format], ...] = (
    ("well formed", "well_formed", percent),
    ("correct given form", "correct_given_form", percent),
    ("length", "completion_length_tokens/mean", number),
)


def step_lines(step: int, steps: int, metrics: Mapping[str, float]) -> Iterator[str]:
    """The line of a step, where something of it was measured, then a line for each evaluation made after it."""
    head = f"step {step:>{len(str(steps))}}/{steps}"
    if any(metric in metrics for _, metric, _, _ in COLUMNS):
        cells = (
            f"{label} {form(metrics[metric]) if metric in metrics else '-':>{width}}"
            for label, metric, width, form in COLUMNS
        )
        yield "  ".join((head, *cells))
    for name in evaluation_names(metrics):
        yield f"{head}  {evaluation_line(name, metrics)}"


def evaluation_names(metrics: Mapping[str, float]) -> list[str]:
    """Names of the evaluations that a step's metrics hold, in the order of the alphabet."""
    return sorted({name.split("/")[1] for name in metrics if name.startswith("eval/")})


def evaluation_line(name: str, metrics: Mapping[str, float]) -> str:
    """For instance: eval heldout  pass@1 0.312 [0.270, 0.357]  well formed 95%."""
    prefix = f"eval/{name}"
    cells = [f"eval {name}"]
    if f"{prefix}/pass@1" in metrics:
        cells.append(f"pass@1 {metrics[f'{prefix}/pass@1']:.3f}")
        if f"{prefix}/pass@1/low" in metrics:
            cells[-1] += f" [{metrics[f'{prefix}/pass@1/low']:.3f}, {metrics[f'{prefix}/pass@1/high']:.3f}]"
    for label, metric, form in EVALUATION_COLUMNS:
        if f"{prefix}/{metric}" in metrics:
            cells.append(f"{label} {form(metrics[f'{prefix}/{metric}'])}")
    if metrics.get(f"{prefix}/frac_error", 0.0) > 0.0:
        cells.append(f"rewards failed {percent(metrics[f'{prefix}/frac_error'])}")
    return "  ".join(cells)


class LinesView(View):
    """Plain lines on a console, never wrapped, coloured or marked up."""

    name = "console"

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for line in step_lines(step, self._steps, metrics):
            self.message(line)

    def message(self, text: str) -> None:
        self._console.file.write(text + "\n")
        self._console.file.flush()


class LogView(View):
    """The lines of the console in log.txt, each with its time in UTC; an existing file is continued."""

    name = "log.txt"

    def __init__(self, path: Path, steps: int) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._steps = steps

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for line in step_lines(step, self._steps, metrics):
            self.message(line)

    def message(self, text: str) -> None:
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._file.writelines(f"{time} {line}\n" for line in text.splitlines() or [""])
        self._file.flush()

    def close(self, failed: bool) -> None:
        self._file.close()
