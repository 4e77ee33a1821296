"""Whole runs of `cispo train` with a random hybrid: rollout workers on one GPU, the learner on the other."""

import json
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
import torch
from policies import write_tokenizer

from cispo.loop import run_training
from cispo.model.checkpoint import save_policy
from cispo.ray_runtime import NAMESPACE
from cispo.recipe.schema import TrainRecipe
from cispo.run_folder import RunFolder
from two_gpu_parts.common import HYBRID, TINY, Setting, new_decoder

REWARD = """\
from zlib import crc32

def reward(prompt, completion, **row):
    return crc32(completion.encode()) % 1000 / 1000
"""
"""Of a random policy all completions are as good; what is timed needs rewards that differ."""


def write_inputs(setting: Setting, folder: Path) -> None:
    """A policy, its tokenizer, prompts and a reward."""
    dtype = torch.bfloat16 if setting.is_gpu else torch.float32
    config = HYBRID if setting.is_gpu else TINY
    save_policy(new_decoder(config, dtype, setting.of_rank(0)), folder / "policy")
    write_tokenizer(folder / "policy", config.vocabulary_size)
    rows = [json.dumps({"id": f"p{index}", "prompt": f"Number {index}."}) for index in range(512)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "mixed.py").write_text(REWARD, encoding="utf-8")


def recipe(setting: Setting, folder: Path, name: str, **changes: dict[str, Any]) -> TrainRecipe:
    """changes: by section."""
    prompts, tokens, at_once = (32, 256, 256) if setting.is_gpu else (6, 16, 16)
    sections: dict[str, Any] = {
        "name": name,
        "steps": 8,
        "policy": {
            "path": str(folder / "policy"),
            "device": setting.device,
            "dtype": "bfloat16" if setting.is_gpu else "float32",
        },
        "data": {"path": str(folder / "prompts.jsonl")},
        "rollout": {
            "prompts_per_step": prompts,
            "group_size": 8,
            "max_prompt_tokens": 64,
            "max_completion_tokens": tokens,
            "max_concurrent_completions": at_once,
            "timeout_s": 100,
        },
        "rewards": [{"name": f"{folder / 'mixed.py'}:reward"}],
        "sandbox": {"workers": 2},
        "learner": {"learning_rate": 1e-6, "updates_per_step": 4, "tokens_per_micro_batch": 16_384},
        "checkpoint": {"every_steps": 1000},
        "logging": {"console": "lines"},
        "ray": {"dashboard": False, "start_timeout_s": 90 if setting.is_gpu else 300, "call_timeout_s": 100},
        "resources": {"placement": "split", "broadcast": "links"},
    }
    for section, values in changes.items():
        sections[section] = {**sections[section], **values} if isinstance(values, dict) else values
    return TrainRecipe.model_validate(sections)


def train(of: TrainRecipe, folder: Path, at_step: Callable[[int], None] | None = None) -> tuple[RunFolder, Any]:
    """The run's folder and its metrics. at_step: called from another thread when a step is done."""
    with closing(RunFolder.create(folder / of.name, of)) as run:
        ended = threading.Event()
        if at_step is not None:
            threading.Thread(target=_watch, args=(run, at_step, ended), daemon=True).start()
        try:
            run_training(of, run, resume=False)
        finally:
            ended.set()
        return run, run.read_metrics()


def _watch(run: RunFolder, at_step: Callable[[int], None], ended: threading.Event) -> None:
    seen = 0
    while not ended.wait(0.05):
        text = (run.path / "metrics.jsonl").read_text(encoding="utf-8")
        while seen < text.count("\n"):
            seen += 1
            at_step(seen)


def process_of(run: str, actor: str) -> int:
    """The process id of an actor of a run on this machine, told by the name of its log."""
    path = ray.get(ray.get_actor(f"{run}:{actor}", namespace=NAMESPACE).log_path.remote(), timeout=30)
    return int(Path(path).stem.rpartition("-")[2])
