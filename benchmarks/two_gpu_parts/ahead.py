"""Sampling ahead of the learner, each on a GPU of its own, against taking turns."""

import statistics
from pathlib import Path
from typing import Any

from two_gpu_parts.common import Row, Setting, scratch_folder
from two_gpu_parts.runs import recipe, train, write_inputs

WARM = 3
"""Steps that are not counted: kernels are compiled in them."""


def run(setting: Setting) -> None:
    with scratch_folder() as scratch:
        folder = Path(scratch)
        write_inputs(setting, folder)
        speeds = {}
        for ahead in (0, 4):
            steps = 7 if ahead == 0 else 11
            of = recipe(setting, folder, f"ahead{ahead}", rollout={"max_off_policy_steps": ahead}, steps=steps)
            _, metrics = train(of, folder)
            # With sampling ahead the first steps have none to wait for, and the last none to hand out.
            counted = [row for row in metrics if row["step"] > WARM and row["step"] <= steps - ahead]
            speeds[ahead] = _report(setting, f"k = {ahead}", counted)
    setting.say(Row("1 split", "k = 4 against k = 0", f"{speeds[4] / speeds[0]:.2f} times the tokens/s"))


def _report(setting: Setting, what: str, rows: list[dict[str, Any]]) -> float:
    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    seconds = sum(row["time_s/step"] for row in rows)
    tokens = sum(row["perf/completion_tokens_per_s"] * row["time_s/step"] for row in rows) / seconds
    idle = f"idle: rollout {median('perf/rollout_idle_share'):.0%}, learner {median('perf/learner_idle_share'):.0%}"
    parts = f"step {median('time_s/step'):.2f} s, learner {median('time_s/forward_backward'):.2f} s"
    setting.say(Row("1 split", f"sampling ahead, {what}", f"{tokens:,.0f} tokens/s; {idle}; {parts}"))
    told = f"{median('time_s/broadcast') * 1e3:.1f} ms of the step"
    if "broadcast/gb_per_s" in rows[0]:
        told += f", the link {median('time_s/broadcast_link') * 1e3:.1f} ms, {median('broadcast/gb_per_s'):.1f} GB/s"
    setting.say(Row("1 split", f"broadcast in these steps, {what}", told))
    proven = all(row["broadcast/checksum_ok"] == 1.0 for row in rows)
    setting.say(Row("1 split", f"checksums proven, {what}", "all" if proven else "not all", "all", proven))
    return tokens
