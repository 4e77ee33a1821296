"""The rollouts of a step as a person reads them: a prompt, then the completions of its group side by side in rewards.

Completions are untrusted text: control characters are shown as escapes, so that none of them reaches the terminal.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from textwrap import indent
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from cispo.errors import RunFolderError

Record = Mapping[str, Any]
STEP_FILE = re.compile(r"step_(\d{6,})\.jsonl")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PROMPT_LINES = 40
INFO_CHARACTERS = 60


def print_rollouts(run_folder: Path, step: int | None, limit: int, console: Console) -> None:
    """Print the first `limit` groups of a step (None takes the last step there is), through a pager on a terminal.

    Raises RunFolderError when the run, the step or a line cannot be read.
    """
    path = rollouts_path(run_folder, step)
    groups = list(group_records(read_records(path)))
    if not groups:
        raise RunFolderError(f"{path} has no rollouts; choose another step with --step")
    with console.pager() if console.is_terminal else nullcontext():
        for group in islice(groups, limit):
            print_group(group, console)
        if len(groups) > limit:
            console.print(Text(f"{len(groups) - limit} more groups in {path}; see them with --limit {len(groups)}"))


def rollouts_path(run_folder: Path, step: int | None) -> Path:
    """The file of a step, or of the last step that has one."""
    steps = {}
    if (run_folder / "rollouts").is_dir():
        matches = ((entry, STEP_FILE.fullmatch(entry.name)) for entry in (run_folder / "rollouts").iterdir())
        steps = {int(match[1]): entry for entry, match in matches if match}
    if not steps:
        raise RunFolderError(f"{run_folder} holds no rollouts; give the folder of a run that has ended a step")
    wanted = max(steps) if step is None else step
    if wanted not in steps:
        span = f"{min(steps)} to {max(steps)}"
        raise RunFolderError(f"{run_folder} has no rollouts of step {wanted}; take one of {span}")
    return steps[wanted]


def read_records(path: Path) -> Iterator[Record]:
    """One record a line; RunFolderError names a line that is no JSON object."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise RunFolderError(f"{path}:{number} is no JSON ({error.msg}); delete that line") from error
            if not isinstance(record, dict):
                raise RunFolderError(f"{path}:{number} is no JSON object; delete that line")
            yield record


def group_records(records: Iterator[Record]) -> Iterator[list[Record]]:
    """The records of each group in the order of the file: a group ends when the prompt changes or the index falls."""
    group: list[Record] = []
    for record in records:
        last = group[-1] if group else record
        is_same = record.get("prompt_id") == last.get("prompt_id")
        if group and not (is_same and record.get("completion_index", 0) > last.get("completion_index", 0)):
            yield group
            group = []
        group.append(record)
    if group:
        yield group


def print_group(group: Sequence[Record], console: Console) -> None:
    """A group: its prompt, what became of it as a whole, then each completion under a line of its facts."""
    first = group[0]
    rewards = [record["reward"] for record in group if record.get("status") == "ok"]
    mean = f"mean reward {sum(rewards) / len(rewards):.3f}" if rewards else "no reward"
    title = f"step {first.get('step', '?')}  prompt {first.get('prompt_id', '?')}  {mean} of {len(rewards)}"
    console.print(Rule(Text(visible(title)), align="left"))
    prompt = visible(str(first.get("prompt", ""))).splitlines()
    shown = [*prompt[:PROMPT_LINES], *([f"({len(prompt) - PROMPT_LINES} more lines)"] if prompt[PROMPT_LINES:] else [])]
    console.print(Text(indent("\n".join(shown), "  "), style="dim"))
    for record in group:
        style = "bold red" if record.get("status") != "ok" else "bold"
        console.print(Text(facts(record), style=style))
        console.print(Text(indent(visible(str(record.get("completion", ""))), "    ")))
    console.print()


def facts(record: Record) -> str:
    """One line: reward, advantage if known and parts, or why there is none; details, end, length, version."""
    cells = [f"#{record.get('completion_index', '?')}"]
    if record.get("status") == "ok":
        cells.append(f"reward {record['reward']:.3f}")
        if record.get("advantage") is not None:
            cells.append(f"advantage {record['advantage']:+.3f}")
        cells += [f"{part} {value:.3g}" for part, value in (record.get("parts") or {}).items()]
    else:
        cells.append(f"{record.get('status', 'no status')}: {record.get('message') or 'no message'}")
    cells += [f"{name}={_short(value)}" for name, value in (record.get("info") or {}).items()]
    cells += [f"stop {record.get('stop_reason', '?')}", f"{record.get('completion_length_tokens', '?')} tokens"]
    cells += ["thinking interrupted"] if record.get("is_interrupted") else []
    version = record.get("policy_version")
    if version:
        low, high = version["min"], version["max"]
        cells.append(f"policy version {low}" if low == high else f"policy versions {low} to {high}")
    return visible("  ".join(cells).replace("\n", " "))


def visible(text: str) -> str:
    """Text with control characters written as escapes, other than newline and tab."""
    return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= INFO_CHARACTERS else f"{text[: INFO_CHARACTERS - 3]}..."
