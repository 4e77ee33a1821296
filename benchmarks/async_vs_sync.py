"""Steps a second and final held-out reward of a run that samples ahead against one that does not.

    python benchmarks/async_vs_sync.py --steps 34 --rounds 1

Both train by the same recipe, in turn, on the CPU unless the settings say otherwise. A first short run measures how
long the sampling of a step and its update take; sampling is then slowed, by sleeping, until it takes as long as the
update, so that there is something to win: rollout workers on machines elsewhere would look the same from here. Speed is
of all steps but those in which the samplers get ahead, and the last, which evaluates. Needs cores enough that the two
do not wait for the same ones; how idle each was is in the table.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cispo.actors import RolloutWorker
from cispo.crew import Roles
from cispo.loop import run_training
from cispo.recipe.load import load_train
from cispo.recipe.schema import TrainRecipe
from cispo.rollout.request import GroupRequest
from cispo.run_folder import RunFolder

WANTED_RATIO = 1.6
PILOT_STEPS = 6
COLUMNS = (
    "seed", "ahead", "s a step", "sampling s", "update s", "rewards s", "rollout idle", "learner idle",
    "held-out before", "after", "mismatch",
)  # fmt: skip


def slowed_worker(factor: float) -> type:
    """A rollout worker whose slices of work take `factor` times as long; what it samples is the same."""

    class SlowRolloutWorker(RolloutWorker):
        def run_slice(self, requests: Sequence[GroupRequest], slice_s: float) -> Any:
            done = super().run_slice(requests, slice_s / factor)
            extra_s = done.busy_s * (factor - 1.0)
            time.sleep(extra_s)
            return replace(done, busy_s=done.busy_s + extra_s)

    return SlowRolloutWorker


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: medians over its steps, and pass@1 with its interval before the first and after the last."""

    step_s: float
    learner_s: float
    sampling_s: float
    reward_s: float
    rollout_idle: float
    learner_idle: float
    before: tuple[float, float, float] | None
    after: tuple[float, float, float] | None
    mismatch: float


def measure(recipe: TrainRecipe, folder: Path, roles: Roles) -> Measured:
    """Train in a new run folder, with what it prints in a file beside it."""
    run = RunFolder.create(folder, recipe)
    try:
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            run_training(recipe, run, resume=False, roles=roles)
        rows = run.read_metrics()
    finally:
        run.close()
    steps = [row for row in rows if "time_s/step" in row][recipe.rollout.max_off_policy_steps + 1 : -1]

    def median(name: str) -> float:
        return statistics.median(row.get(name, 0.0) for row in steps)

    step_s, rollout_idle = median("time_s/step"), median("perf/rollout_idle_share")
    return Measured(
        step_s=statistics.mean(row["time_s/step"] for row in steps),
        learner_s=median("time_s/forward_backward"),
        sampling_s=(1.0 - rollout_idle) * step_s,
        reward_s=median("time_s/reward"),
        rollout_idle=rollout_idle,
        learner_idle=median("perf/learner_idle_share"),
        before=_pass_at_1(rows[0]),
        after=_pass_at_1(rows[-1]),
        mismatch=max(row.get("policy/mismatch/max", 0.0) for row in steps),
    )


def _pass_at_1(row: dict[str, Any]) -> tuple[float, float, float] | None:
    name = "eval/heldout/pass@1"
    return (row[name], row[f"{name}/low"], row[f"{name}/high"]) if name in row else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="code")
    parser.add_argument("--steps", type=int, default=34)
    parser.add_argument("--ahead", type=int, default=4, help="rollout.max_off_policy_steps of the asynchronous run")
    parser.add_argument("--rounds", type=int, default=1, help="pairs of runs, each with a seed of its own")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the recipe, for both")
    options = parser.parse_args()
    common = ["policy.device=cpu", "ray.dashboard=false", "logging.console=lines", *options.settings]

    def recipe(name: str, *settings: str) -> TrainRecipe:
        return load_train(options.recipe, [*common, f"name={name}", *settings]).recipe

    with tempfile.TemporaryDirectory() as scratch:
        pilot = measure(recipe("pilot", f"steps={PILOT_STEPS}", "evaluation=null"), Path(scratch, "pilot"), Roles())
        factor = max(1.0, pilot.learner_s / pilot.sampling_s)
        print(
            f"an update takes {pilot.learner_s:.2f} s and the sampling of a step {pilot.sampling_s:.2f} s: the latter "
            f"is slowed {factor:.2f} times",
            flush=True,
        )
        roles = Roles(rollout=slowed_worker(factor))
        ratios = []
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for seed in range(options.rounds):
            pair = []
            for ahead in (0, options.ahead):
                name = f"seed{seed}_ahead{ahead}"
                settings = (f"steps={options.steps}", f"seed={seed}", f"rollout.max_off_policy_steps={ahead}")
                pair.append(measure(recipe(name, *settings), Path(scratch, name), roles))
                print(_row(seed, ahead, pair[-1]), flush=True)
            ratios.append(pair[0].step_s / pair[1].step_s)
    ratio = statistics.median(ratios)
    verdict = "reached" if ratio >= WANTED_RATIO else "NOT reached"
    print(f"steps/s, ahead {options.ahead} over 0: {ratio:.2f} ({WANTED_RATIO} wanted: {verdict})")


def _row(seed: int, ahead: int, run: Measured) -> str:
    times = (run.step_s, run.sampling_s, run.learner_s, run.reward_s, run.rollout_idle, run.learner_idle)
    shares = [f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" if value else "-" for value in (run.before, run.after)]
    return f"| {seed} | {ahead} | {' | '.join(f'{x:.2f}' for x in times)} | {' | '.join(shares)} | {run.mismatch:.2g} |"


if __name__ == "__main__":
    main()
