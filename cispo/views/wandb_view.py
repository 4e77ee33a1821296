"""A run in W&B: one `log` call a step, on the same W&B run after a resume, and never a question asked.

`wandb.json` in the run folder keeps the id of the W&B run and the last step given to it. A resumed run repeats the
steps since its checkpoint; W&B refuses steps that go backwards, so those it has are not given again.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cispo.errors import UnsupportedError
from cispo.views.views import View

INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 120.0


class WandbView(View):
    """Offline it needs neither account nor network; online it needs a key that `wandb login` or WANDB_API_KEY gave."""

    name = "W&B"

    def __init__(
        self,
        run_folder: Path,
        *,
        name: str,
        mode: Literal["offline", "online"],
        project: str,
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UnsupportedError("no W&B key on this machine; run `wandb login`, or set logging.wandb=offline")
        self._state_path = run_folder / "wandb.json"
        self._id, self._last_step = self._read_state()
        self._write_state()
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            show_info=False,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
        )
        self._run = wandb.init(
            project=project,
            name=name,
            id=self._id,
            dir=run_folder,
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=dict(config),
            settings=settings,
        )
        if mode == "online":
            self._last_step = max(self._last_step, self._run.step - 1)
            self.greeting = f"W&B: {self._run.url}"
        else:
            self.greeting = f"W&B offline: `wandb sync {Path(self._run.dir).parent}` uploads this run"

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._last_step:
            return
        # Noted first: after a kill between the two, W&B lacks a step, which does no harm, instead of refusing one.
        self._last_step = step
        self._write_state()
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _read_state(self) -> tuple[str, int]:
        if not self._state_path.exists():
            return secrets.token_hex(4), -1
        state = json.loads(self._state_path.read_text(encoding="utf-8"))
        return str(state["id"]), int(state["last_step"])

    def _write_state(self) -> None:
        partial = self._state_path.with_suffix(".json.partial")
        partial.write_text(json.dumps({"id": self._id, "last_step": self._last_step}) + "\n", encoding="utf-8")
        os.replace(partial, self._state_path)
