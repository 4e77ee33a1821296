"""A live panel on a terminal: where the step is, how the run learns, how fast it goes, and its last lines.

The panel is drawn by a thread of rich's, so the state it reads is guarded by a lock.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cispo.views.lines import evaluation_names, number, percent, step_lines
from cispo.views.views import View

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 40
LABEL_WIDTH = 20
LAST_LINES = 4
CURVES = (
    ("reward", "reward/mean"),
    ("entropy", "policy/entropy"),
    ("length", "completion/length_tokens/mean"),
    ("loss", "sft/loss"),
    ("held-out loss", "sft/heldout_loss"),
)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between their least and greatest; a value that is not finite is a dot."""
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "·"
        return BARS[round((value - low) / (high - low) * (len(BARS) - 1))] if high > low else BARS[3]

    return "".join(map(bar, shown))


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LiveView(View):
    """Redraws the panel a few times a second; messages scroll by above it and stay."""

    name = "console"

    def __init__(
        self, console: Console, name: str, steps: int, *, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._steps = steps
        self._clock_s = clock_s
        self._started_s = clock_s()
        self._first_step: int | None = None
        self._step = 0
        self._phase = ("", 0, 0)
        self._metrics: dict[str, float] = {}
        self._curves: dict[str, deque[float]] = {}
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._lock = threading.Lock()
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self.render)
        self._live.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._first_step = step if self._first_step is None else self._first_step
            self._step = step
            self._phase = ("", 0, 0)
            self._metrics |= metrics
            self._lines.extend(step_lines(step, self._steps, metrics))
            for _, metric in self._curve_names(metrics):
                if metric in metrics:
                    self._curves.setdefault(metric, deque(maxlen=SPARKLINE_WIDTH)).append(metrics[metric])
        self._live.refresh()

    def phase(self, name: str, done: int, total: int) -> None:
        with self._lock:
            self._phase = (name, done, total)

    def message(self, text: str) -> None:
        self._live.console.print(Text(text))

    def close(self, failed: bool) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        """The panel as it stands."""
        with self._lock:
            rows: list[RenderableType] = [self._phase_row(), self._curve_table()]
            rows += [Text(row, style="dim") for row in (self._speed_row(), self._sandbox_row()) if row]
            rows += [Text(line, no_wrap=True, overflow="ellipsis") for line in self._lines]
            return Panel(Group(*rows), title=self._title(), title_align="left")

    def _title(self) -> Text:
        elapsed_s = self._clock_s() - self._started_s
        title = f"{self._name}  step {self._step}/{self._steps}  {duration(elapsed_s)}"
        done = self._step - (self._first_step or 0)
        if done > 0 and self._step < self._steps:
            title += f", about {duration(elapsed_s / done * (self._steps - self._step))} left"
        return Text(title)

    def _phase_row(self) -> RenderableType:
        name, done, total = self._phase
        row = Table.grid(padding=(0, 1))
        row.add_column(width=LABEL_WIDTH, no_wrap=True)
        row.add_column(width=SPARKLINE_WIDTH)
        row.add_column(no_wrap=True)
        if not name:
            row.add_row("between steps", "", "")
        elif total <= 0:
            row.add_row(name, ProgressBar(total=None, width=SPARKLINE_WIDTH, pulse=True), str(done) if done else "")
        else:
            bar = ProgressBar(total=total, completed=min(done, total), width=SPARKLINE_WIDTH)
            row.add_row(name, bar, f"{done}/{total}")
        return row

    def _curve_names(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        return [*CURVES, *((f"pass@1 {name}", f"eval/{name}/pass@1") for name in evaluation_names(metrics))]

    def _curve_table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=LABEL_WIDTH, no_wrap=True)
        table.add_column(width=SPARKLINE_WIDTH, style="cyan")
        table.add_column(justify="right")
        table.add_column(style="dim")
        for label, metric in self._curve_names(self._metrics):
            values = self._curves.get(metric)
            if values:
                span = f"from {number(min(values))} to {number(max(values))}"
                table.add_row(label, sparkline(values, SPARKLINE_WIDTH), number(values[-1]), span)
        return table

    def _speed_row(self) -> str:
        names = (("perf/completion_tokens_per_s", "sampled"), ("perf/learner_tokens_per_s", "trained"))
        return "  ".join(f"{number(self._metrics[m])} tokens/s {label}" for m, label in names if m in self._metrics)

    def _sandbox_row(self) -> str:
        counters = (
            ("perf/sandbox_executions", number, "executions"),
            ("perf/sandbox_cache_hits", number, "from cache"),
            ("sandbox/frac_timeout", percent, "timed out"),
            ("sandbox/frac_error", percent, "failed"),
        )
        cells = [f"{form(self._metrics[m])} {label}" for m, form, label in counters if m in self._metrics]
        return f"sandbox: {', '.join(cells)}" if cells else ""
