"""Views of a run behind one object. A view that breaks is reported once on the others and left out; the run goes on.

metrics.jsonl in the run folder is not a view but the record, and its failure is the loop's to raise.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console

from cispo.views.advice import Advisor

ConsoleMode = Literal["auto", "live", "lines"]
WandbMode = Literal["disabled", "offline", "online"]


class View:
    """One way to show a run. Every method may raise; `Views` reports it and drops the view."""

    name: str = "view"
    greeting: str = ""
    """Said once when the view opens, for instance where to look; empty says nothing."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a step that has ended."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Show how far the phase of the current step is; total 0 means that its length is unknown."""

    def message(self, text: str) -> None:
        """Show a message, which may have several lines."""

    def close(self, failed: bool) -> None:
        """Let go of files, terminals and connections; `failed` says that the run ended with an error."""


class Views:
    """All views of one run. Use it from one thread, and close it however the run ends (it is a context manager)."""

    def __init__(self, advisor: Advisor | None = None) -> None:
        self._views: list[View] = []
        self._advisor = advisor

    def open(self, name: str, make: Callable[[], View]) -> None:
        """Add the view that `make` returns, or report why it cannot be had."""
        try:
            view = make()
        except Exception as error:
            self._report(name, error)
            return
        self._views.append(view)
        if view.greeting:
            self.message(view.greeting)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step's reduced metrics, then the advice that follows from them."""
        self._each(lambda view: view.step(step, metrics))
        for advice in self._advisor.step(step, metrics) if self._advisor else ():
            self.message(f"advice: {advice}")

    def phase(self, name: str, done: int, total: int) -> None:
        """Show progress within the current step, for instance ("rollout", 12, 64)."""
        self._each(lambda view: view.phase(name, done, total))

    def message(self, text: str) -> None:
        """Show a message on the console and in log.txt."""
        self._each(lambda view: view.message(text))

    def close(self, failed: bool = False) -> None:
        """Close every view, the last opened first, so that what breaks while closing is reported on the others."""
        while self._views:
            self._close(self._views.pop(), failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)

    def _each(self, act: Callable[[View], None]) -> int:
        """Do it to every view; returns how many managed."""
        managed = 0
        for view in tuple(self._views):
            if view not in self._views:  # a report on one view can break another
                continue
            try:
                act(view)
                managed += 1
            except Exception as error:
                self._views.remove(view)
                self._report(view.name, error)
                self._close(view, failed=True)
        return managed

    def _close(self, view: View, failed: bool) -> None:
        try:
            view.close(failed)
        except Exception as error:
            self._report(f"{view.name} (while closing)", error)

    def _report(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split()) or "no reason given"
        text = f"warning: {name} is off: {type(error).__name__}: {reason}; the run goes on without it"
        if not self._each(lambda view: view.message(text)):
            print(text, file=sys.stderr)


def open_views(
    run_folder: Path,
    *,
    name: str,
    steps: int,
    recipe: Mapping[str, Any] | None = None,
    console: ConsoleMode = "auto",
    wandb: WandbMode = "disabled",
    wandb_project: str = "cispo",
    ray_metrics: bool = False,
    advice_every_steps: int = 10,
    terminal: Console | None = None,
) -> Views:
    """Open the views of a run of `steps` steps called `name`, whose folder exists.

    recipe: the resolved recipe, shown by W&B as the run's configuration.
    console: a live panel where there is a terminal (`auto`), always (`live`), or one line a step (`lines`).
    ray_metrics: set gauges on the Ray that this process has joined.
    advice_every_steps: how many steps must pass before the same advice is given again; 0 gives none.
    terminal: where the console writes, standard output by default.
    """
    # Imported here so that a recipe can be checked without them.
    from cispo.views.lines import LinesView, LogView
    from cispo.views.live import LiveView
    from cispo.views.ray_view import RayView
    from cispo.views.wandb_view import WandbView

    terminal = terminal or Console()
    is_live = console == "live" or (console == "auto" and terminal.is_terminal and terminal.encoding.startswith("utf"))
    views = Views(Advisor(advice_every_steps) if advice_every_steps else None)
    views.open("log.txt", lambda: LogView(run_folder / "log.txt", steps))
    views.open("console", lambda: LiveView(terminal, name, steps) if is_live else LinesView(terminal, steps))
    if wandb != "disabled":
        config = recipe or {}
        views.open("W&B", lambda: WandbView(run_folder, name=name, mode=wandb, project=wandb_project, config=config))
    if ray_metrics:
        views.open("Ray metrics", lambda: RayView(name))
    return views
