"""`cispo reward`: one reward over a file of completions, to see what it says before a run depends on it.

Each row is a group of its own, scored by the RewardSet that a run uses, so that deadlines, checks and messages are the
same. A row's `completion_length_tokens` and `is_truncated` are taken from it where it has them; else the length is the
number of words, as no tokenizer is at hand, and the completion is taken for whole.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cispo.data import DataSettings, load_prompts
from cispo.errors import DataError, RewardError
from cispo.rewards.resolve import one_line
from cispo.rewards.reward_set import RewardSet
from cispo.rewards.settings import RewardSettings
from cispo.sandboxes.settings import SandboxSettings
from cispo.types import Group, Prompt, Rollout, Score, ScoreStatus, StopReason, Turn


@dataclass(frozen=True)
class RowResult:
    """What became of one row, and the seconds that it took."""

    id: str
    score: Score
    wall_s: float


def parse_pairs(texts: Sequence[str], option: str) -> dict[str, Any]:
    """`key=value` texts as a dict; values are read as in a recipe. Raises RewardError."""
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RewardError(f"{option}: expected KEY=VALUE, got {text!r}")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RewardError(f"{option}: the value in {text!r} is not valid YAML; put it in quotes") from error
    return pairs


def run_reward(
    name: str,
    data: str,
    *,
    args: Mapping[str, Any],
    columns: Mapping[str, str],
    json_columns: Sequence[str],
    limit: int | None,
    max_completion_tokens: int,
    timeout_s: float,
) -> Iterator[RowResult]:
    """The results row by row, as they come. Raises RewardError or DataError for a reward or a file that is missing."""
    try:
        settings = RewardSettings(name=name, args=dict(args), timeout_s=timeout_s)
        source = DataSettings(path=data, columns=dict(columns), json_columns=tuple(json_columns), limit=limit)
    except ValidationError as error:
        first = error.errors()[0]
        raise RewardError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}") from error
    prompts = load_prompts(source, base_path=Path("."))
    groups = [_group(prompt) for prompt in prompts]
    rewards = RewardSet([settings], SandboxSettings(), base_path=Path("."), max_completion_tokens=max_completion_tokens)
    return _results(rewards, groups)


def _results(rewards: RewardSet, groups: Sequence[Group]) -> Iterator[RowResult]:
    try:
        for group in groups:
            started = time.monotonic()
            (score,) = rewards.score(group)
            yield RowResult(group.prompt.id, score, time.monotonic() - started)
    finally:
        rewards.close()


def _group(prompt: Prompt) -> Group:
    row = dict(prompt.row)
    completion = row.pop("completion", None)
    if not isinstance(completion, str):
        raise DataError(f"row {prompt.id!r}: the column completion must be text; name it with --column completion=NAME")
    tokens = row.pop("completion_length_tokens", len(completion.split()))
    if not isinstance(tokens, int) or tokens < 0:
        raise DataError(f"row {prompt.id!r}: completion_length_tokens must be a whole number, got {tokens!r}")
    stop_reason = StopReason.LENGTH if row.pop("is_truncated", False) else StopReason.EOS
    turn = Turn(
        np.zeros(tokens, np.int32), np.ones(tokens, np.bool_), np.zeros(tokens, np.float32), np.zeros(tokens, np.int32)
    )
    rollout = Rollout(prompt.id, 0, np.zeros(0, np.int32), (turn,), stop_reason, completion)
    return Group(Prompt(prompt.id, prompt.text, row, prompt.earlier), (rollout,))


def print_results(results: Iterator[RowResult], console: Console) -> int:
    """Print a table and a summary; 1 when a row's score is an error, else 0."""
    rows = list(results)
    table = Table("row", "status", "score", "seconds", "parts, or what went wrong")
    for row in rows:
        is_ok = row.score.status is ScoreStatus.OK
        parts = ", ".join(f"{name} {value:g}" for name, value in row.score.parts.items())
        details = "; ".join([parts, *(f"{name}: {value}" for name, value in row.score.info.items())])
        value = f"{row.score.value:g}" if is_ok else "-"
        text = details if is_ok else row.score.message
        # Text, so that no bracket of a message is taken for markup; in one line, as it may quote a completion.
        shown = map(Text, (one_line(row.id), row.score.status.value, value, f"{row.wall_s:.3f}", one_line(text)))
        table.add_row(*shown)
    console.print(table)
    values = [row.score.value for row in rows if row.score.status is ScoreStatus.OK]
    failed = len(rows) - len(values)
    spread = f"mean {sum(values) / len(values):g}, from {min(values):g} to {max(values):g}" if values else "no score"
    seconds = [row.wall_s for row in rows]
    console.print(f"{len(rows)} rows: {spread}; {failed} failed")
    console.print(f"seconds a row: mean {sum(seconds) / len(seconds):.3f}, longest {max(seconds):.3f}")
    return 1 if failed else 0
