"""What a run that samples ahead leaves of each step, so that any update can be done again: `cispo replay`.

    schedule.jsonl          a line a step: prompts, the policy versions of their tokens, checksum of the new weights
    batches/step_000042.npz what the learner trained on: token ids, masks, logprobs, versions, scores

With weights that change in flight a group cannot be sampled again the same, so what was sampled is kept.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cispo.durable_files import read_lines
from cispo.errors import RunFolderError
from cispo.run_folder import SCHEDULE, RunFolder
from cispo.types import Prompt, Rollout, Score, ScoredGroup, ScoreStatus, StopReason, Turn

_ARRAYS = ("token_ids_T", "loss_mask_T", "logprobs_T", "policy_versions_T", "expert_ids_TLK")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One line of the schedule. versions: of each prompt's sampled tokens, least and greatest.

    weights: checksum after the step; None where engine and learner share one copy, which is not hashed.
    """

    step: int
    prompts: tuple[str, ...]
    versions: tuple[tuple[int, int], ...]
    weights: str | None


def write_schedule(folder: RunFolder, step: int, groups: Sequence[ScoredGroup], weights: str | None) -> None:
    """Keep a step's batch and its line. weights: the checksum after the step."""
    record = StepRecord(step, tuple(group.prompt.id for group in groups), tuple(map(_versions, groups)), weights)
    folder.append_schedule(asdict(record), _pack(groups))


def read_schedule(path: Path) -> dict[int, StepRecord]:
    """The lines of a run's folder by step."""
    file = path / SCHEDULE
    if not file.is_file() or not file.stat().st_size:
        raise RunFolderError(
            f"{path} has no {SCHEDULE}: only runs with rollout.max_off_policy_steps above 0 keep what they trained on; "
            "a synchronous run does any step again with --resume"
        )
    return {record.step: record for record in map(_step_record, read_lines(file))}


def _step_record(line: tuple[str, dict[str, Any]]) -> StepRecord:
    fields = line[1]
    versions = tuple((int(low), int(high)) for low, high in fields["versions"])
    return StepRecord(int(fields["step"]), tuple(fields["prompts"]), versions, fields["weights"])


def read_batch(path: Path) -> list[ScoredGroup]:
    """What the learner trained on in a step, from its file."""
    if not path.is_file():
        raise RunFolderError(f"{path} is not there; the run has not done this step, or its file was removed")
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return [_group(fields, arrays) for fields in json.loads(str(arrays["groups"]))]


def _versions(group: ScoredGroup) -> tuple[int, int]:
    sampled = np.concatenate([rollout.policy_versions_T[rollout.loss_mask_T] for rollout in group.rollouts])
    return int(sampled.min()), int(sampled.max())


def _pack(groups: Sequence[ScoredGroup]) -> bytes:
    """All arrays under numbered names, and everything else as one JSON text."""
    arrays: dict[str, npt.NDArray[Any]] = {}

    def store(array: npt.NDArray[Any] | None) -> str | None:
        if array is None:
            return None
        name = f"a{len(arrays)}"
        arrays[name] = array
        return name

    def rollout(one: Rollout) -> dict[str, Any]:
        turns = [{name: store(getattr(turn, name)) for name in _ARRAYS} for turn in one.turns]
        return {
            "completion_index": one.completion_index,
            "stop_reason": one.stop_reason.value,
            "prompt_token_ids_T": store(one.prompt_token_ids_T),
            "prompt_expert_ids_TLK": store(one.prompt_expert_ids_TLK),
            "turns": turns,
        }

    fields = [
        {
            "prompt": group.prompt.id,
            "rollouts": [rollout(one) for one in group.rollouts],
            "scores": [{"value": score.value, "status": score.status.value} for score in group.scores],
        }
        for group in groups
    ]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, groups=np.array(json.dumps(fields)), **arrays)
    return buffer.getvalue()


def _group(fields: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> ScoredGroup:
    prompt = Prompt(fields["prompt"], "")
    scores = tuple(Score(one["value"], ScoreStatus(one["status"])) for one in fields["scores"])
    return ScoredGroup(prompt, tuple(_rollouts(prompt.id, fields["rollouts"], arrays)), scores)


def _rollouts(
    prompt_id: str, rollouts: Sequence[dict[str, Any]], arrays: dict[str, npt.NDArray[Any]]
) -> Iterator[Rollout]:
    def stored(name: str | None) -> Any:
        return None if name is None else arrays[name]

    for one in rollouts:
        yield Rollout(
            prompt_id=prompt_id,
            completion_index=one["completion_index"],
            prompt_token_ids_T=stored(one["prompt_token_ids_T"]),
            turns=tuple(Turn(**{name: stored(turn[name]) for name in _ARRAYS}) for turn in one["turns"]),
            stop_reason=StopReason(one["stop_reason"]),
            text="",
            prompt_expert_ids_TLK=stored(one["prompt_expert_ids_TLK"]),
        )
