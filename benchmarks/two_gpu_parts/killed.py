"""Two rollout workers and a learner on two GPUs: a worker is killed in the middle, and no prompt is lost."""

import json
import os
import signal
from pathlib import Path

from cispo.data import load_prompts
from cispo.prompt_order import prompts_of_step
from two_gpu_parts.common import Row, Setting, scratch_folder
from two_gpu_parts.runs import process_of, recipe, train, write_inputs

STEPS, KILLED_AFTER = 8, 3


def run(setting: Setting) -> None:
    with scratch_folder() as scratch:
        folder = Path(scratch)
        write_inputs(setting, folder)
        of = recipe(setting, folder, "killed", rollout={"workers": 2, "max_off_policy_steps": 2}, steps=STEPS)

        def kill(step: int) -> None:
            if step == KILLED_AFTER:
                process = process_of(of.name, "rollout:1")
                print(f"step {step}: killing rollout:1, process {process}", flush=True)
                os.kill(process, signal.SIGKILL)

        done, metrics = train(of, folder, kill)
        prompts = load_prompts(of.data, base_path=of.base_path)
        asked = {
            step: [
                prompt.id
                for prompt in prompts_of_step(prompts, of.rollout.prompts_per_step, seed=of.seed, step=step).prompts
            ]
            for step in range(1, STEPS + 1)
        }
        lines = (done.path / "schedule.jsonl").read_text(encoding="utf-8").splitlines()
        trained = {record["step"]: list(record["prompts"]) for record in map(json.loads, lines)}
        said = (done.path / "log.txt").read_text(encoding="utf-8")
    deaths = sum(row.get("faults/rollout", 0.0) for row in metrics)
    unsampled = sum(row.get("faults/unsampled", 0.0) for row in metrics)
    proven = all(row["broadcast/checksum_ok"] == 1.0 for row in metrics if "broadcast/checksum_ok" in row)
    ages = max(row.get("off_policy/steps/max", 0.0) for row in metrics)
    setting.say(Row("4 killed", "rollout workers killed", f"{deaths:g}", "1", deaths == 1))
    count = sum(map(len, trained.values()))
    steps = f"{len(trained)} of {STEPS} steps, {count} prompts, {unsampled:g} without completions"
    setting.say(Row("4 killed", "trained on what was asked for", steps, "all, 0", trained == asked and not unsampled))
    setting.say(Row("4 killed", "checksums proven", "all" if proven else "not all", "all", proven))
    setting.say(Row("4 killed", "oldest token trained on", f"{ages:g} versions", "at most 2", ages <= 2))
    for line in said.splitlines():
        if "died" in line:
            print(line, flush=True)
