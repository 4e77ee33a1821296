"""What ends or interrupts a completion, and what is kept of it as its tokens come.

T tokens of one sequence, L layers that have a router, K experts a token.
"""

import math

import numpy as np

from cispo.model.tokenizer import Tokenizer
from cispo.rollout.request import RequestError
from cispo.rollout.sequence import GroupState, Reading, Sequence, text_cut
from cispo.rollout.slots import SlotArrays, Tokens
from cispo.types import ExpertIdArray, StopReason

ENDS_OF_TURN = (StopReason.EOS, StopReason.STOP_STRING, StopReason.STOP_TOKEN)
"""What ends a turn of an open request; anything else ends the completion."""

_NEVER = np.iinfo(np.int64).max


def with_interruption(group: GroupState, tokenizer: Tokenizer, limit: int) -> GroupState:
    """The group with the tokens that interrupt its thinking. RequestError where they leave no room for an answer."""
    thinking = group.request.stops.thinking
    if thinking is None:
        return group
    group.forced_ids = tokenizer.encode(thinking.interruption)
    end_ids = tokenizer.encode(thinking.end)
    group.thinking_end_id = end_ids[0] if len(end_ids) == 1 else None
    if thinking.tokens + len(group.forced_ids) >= limit:
        raise RequestError(
            f"a thinking_budget of {thinking.tokens} and the {len(group.forced_ids)} tokens that interrupt it leave no "
            f"room for an answer in {limit} new tokens; lower the budget or raise max_new_tokens"
        )
    return group


def reads_text(group: GroupState) -> bool:
    """Whether the text of its completions has to be followed as it comes."""
    return bool(group.request.stops.strings) or (
        group.request.stops.thinking is not None and group.thinking_end_id is None
    )


def set_rules(arrays: SlotArrays, completion: Sequence) -> None:
    """What a slot's arrays say of how its sequence ends."""
    slot, stops = completion.slot, completion.group.request.stops
    arrays.run_S[slot] = 0
    arrays.run_limit_S[slot] = _NEVER
    arrays.likely_S[slot] = 0.0
    _watch(arrays, completion)
    if stops.repetition is not None:
        arrays.run_limit_S[slot] = stops.repetition.tokens
        arrays.likely_S[slot] = likely = math.log(stops.repetition.probability)
        count = int(arrays.count_S[slot])
        is_likely_T = arrays.is_sampled_ST[slot, :count] & (arrays.logprobs_ST[slot, :count] > likely)
        unlikely = np.flatnonzero(~is_likely_T)
        arrays.run_S[slot] = count - (unlikely[-1] + 1 if unlikely.size else 0)


def follow(completion: Sequence, tokens: Tokens) -> None:
    """Read the text of a completion that was begun elsewhere."""
    given = np.flatnonzero(~tokens.is_sampled_T)
    turn = int(given[-1]) + 1 if given.size else 0
    ids = tokens.ids_T.tolist()
    read_given(completion, ids[:turn])
    _read(completion, ids[turn:])


def read_given(completion: Sequence, ids: list[int]) -> None:
    """Read the text of tokens that the policy did not sample: nothing in it ends anything."""
    _read(completion, ids)
    completion.turn_start = len(completion.text)


def _read(completion: Sequence, ids: list[int]) -> None:
    if completion.text_decoder is not None:
        completion.text += "".join(map(completion.text_decoder.push, ids))


def reason_to_end(arrays: SlotArrays, completion: Sequence, token: int, eos_id: int) -> StopReason | None:
    """Why a completion ends with the token that it has just sampled, if it does. Follows its text."""
    slot, stops = completion.slot, completion.group.request.stops
    before = len(completion.text)
    _read(completion, [token])
    if token == eos_id:
        return StopReason.EOS
    if token in stops.token_ids:
        return StopReason.STOP_TOKEN
    if stops.strings and text_cut(completion.text, stops.strings, _from(completion, stops.strings, before)) is not None:
        return StopReason.STOP_STRING
    if arrays.run_S[slot] >= arrays.run_limit_S[slot]:
        return StopReason.REPETITION
    if arrays.count_S[slot] >= arrays.limit_S[slot]:
        return StopReason.LENGTH
    if completion.is_thinking and _ends_thinking(completion, token, before):
        end_thinking(arrays, completion)
    return None


def end_thinking(arrays: SlotArrays, completion: Sequence) -> None:
    """Note that a completion no longer spends its thinking budget."""
    completion.is_thinking = False
    _watch(arrays, completion)


def _watch(arrays: SlotArrays, completion: Sequence) -> None:
    stops = completion.group.request.stops
    arrays.is_watched_S[completion.slot] = bool(stops.strings or stops.token_ids or completion.is_thinking)


def _from(completion: Sequence, strings: tuple[str, ...], before: int) -> int:
    """Where to look on in a turn of which the text's first `before` characters hold none of the strings."""
    return max(completion.turn_start, before - max(map(len, strings)) + 1)


def _ends_thinking(completion: Sequence, token: int, before: int) -> bool:
    thinking, end_id = completion.group.request.stops.thinking, completion.group.thinking_end_id
    assert thinking is not None
    if end_id is not None:
        return token == end_id
    return thinking.end in completion.text[_from(completion, (thinking.end,), before) :]


def is_out_of_thinking(arrays: SlotArrays, completion: Sequence) -> bool:
    """Whether a completion has thought for all of its budget."""
    thinking = completion.group.request.stops.thinking
    return completion.is_thinking and thinking is not None and arrays.count_S[completion.slot] >= thinking.tokens


def text_before_stop(completion: Sequence) -> str:
    """Its text up to the first string of its last turn that stops it."""
    return completion.text[: text_cut(completion.text, completion.group.request.stops.strings, completion.turn_start)]


def keep_experts(expert_ids_STLK: ExpertIdArray, reading: Reading, start: int, ids_TLK: ExpertIdArray) -> None:
    """Keep the experts of tokens that were read, from position `start` on: with the token that comes after each."""
    group, (_, *sizes) = reading.sequences[0].group, ids_TLK.shape
    prompt = len(group.prompt_ids)
    if group.prompt_expert_ids_TLK is None:
        group.prompt_expert_ids_TLK = np.zeros((prompt - 1, *sizes), ids_TLK.dtype)
    in_prompt = min(max(prompt - 1 - start, 0), len(ids_TLK))
    group.prompt_expert_ids_TLK[start : start + in_prompt] = ids_TLK[:in_prompt]
    after = ids_TLK[in_prompt:]
    first = start + in_prompt + 1 - prompt
    room = expert_ids_STLK.shape[1] - first
    for completion in reading.sequences:
        expert_ids_STLK[completion.slot, first : first + len(after)] = after[:room]
