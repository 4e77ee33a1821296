"""Answers as they come: one engine, and of every completion the text that its last tokens have made whole."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cispo.generation import Failure, Generation, GenerationError, Piece, PromptLike, RoutingUse, Usage
from cispo.model.routing import RoutingLog
from cispo.model.text_stream import TextDecoder
from cispo.rollout.engine import Engine
from cispo.rollout.request import GroupRequest, RequestError
from cispo.types import Rollout


@dataclass(slots=True)
class _Text:
    """What a completion has said. read: its tokens that were looked at; given: characters that were handed out."""

    decoder: TextDecoder
    text: str = ""
    read: int = 0
    given: int = 0


class GenerationStream(Iterator[Piece]):
    """Pieces of all completions, in the order in which they come; `usage` can be read at any time.

    Iterating runs the engine. GenerationError comes at the end where some prompts could not be answered. requests carry
    the number of their prompt as log_sequence.
    """

    def __init__(
        self,
        engine: Engine | None,
        prompts: Sequence[PromptLike],
        requests: Sequence[GroupRequest],
        failures: Sequence[Failure],
        log: RoutingLog | None,
    ) -> None:
        self.generations: list[Generation] = []
        self._engine, self._prompts, self._log = engine, prompts, log
        self._failures = list(failures)
        self._texts: dict[tuple[int, int], _Text] = {}
        self._ended: set[tuple[int, int]] = set()
        self._ready: deque[Piece] = deque()
        self._prompt_tokens = self._forked_prompt_tokens = 0
        self._started = time.perf_counter()
        self._seconds: float | None = None
        self._strings: tuple[str, ...] = requests[0].stops.strings if requests else ()
        for request in requests:
            self._submit(request)

    def _submit(self, request: GroupRequest) -> None:
        assert self._engine is not None and request.prompt_ids is not None
        try:
            self._engine.submit(request)
        except RequestError as error:
            self._failures.append(Failure(request.log_sequence, str(error)))
            return
        self._prompt_tokens += len(request.prompt_ids)
        self._forked_prompt_tokens += len(request.prompt_ids) * (request.group_size - 1)

    @property
    def usage(self) -> Usage:
        """What was computed so far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            forked_prompt_tokens=self._forked_prompt_tokens,
            completion_tokens=sum(text.read for text in self._texts.values()),
            seconds=time.perf_counter() - self._started if self._seconds is None else self._seconds,
        )

    def __next__(self) -> Piece:
        while not self._ready:
            if self._engine is None or self._engine.is_idle:
                self._finish()
                raise StopIteration
            self._engine.step()
            self._look(self._engine)
        return self._ready.popleft()

    def _look(self, engine: Engine) -> None:
        """Queue the pieces of what the last step has sampled."""
        for request, index, ids_T in engine.tokens_so_far():
            self._advance(request.log_sequence, index, ids_T)
        if self._log is None:
            for request, rollout in engine.rollouts_so_far():
                self._end(request.log_sequence, rollout)
        for group in engine.collect():
            for rollout in group.rollouts:
                self._end(int(group.prompt.id), rollout)
        self._failures += [Failure(int(one.prompt_id), one.message) for one in engine.collect_failures()]

    def _advance(self, number: int, index: int, ids_T: npt.NDArray[np.int32]) -> None:
        state = self._text(number, index)
        new = "".join(map(state.decoder.push, ids_T[state.read :].tolist()))
        state.read = len(ids_T)
        state.text += new
        end = len(state.text) - held_characters(state.text, self._strings)
        if end > state.given:
            self._ready.append(Piece(number, index, state.text[state.given : end]))
            state.given = end

    def _text(self, number: int, index: int) -> _Text:
        assert self._engine is not None
        key = number, index
        if key not in self._texts:
            self._texts[key] = _Text(self._engine.tokenizer.text_decoder())
        return self._texts[key]

    def _end(self, number: int, rollout: Rollout) -> None:
        key = number, rollout.completion_index
        if key in self._ended:
            return
        self._ended.add(key)
        state = self._text(*key)
        state.read = rollout.completion_length_tokens
        routing = None if self._log is None else _routing_use(self._log, number)
        generation = _generation(self._prompts[number], number, rollout, routing)
        self.generations.append(generation)
        self._ready.append(Piece(*key, generation.text[state.given :], generation))

    def _finish(self) -> None:
        if self._seconds is None:
            self._seconds = time.perf_counter() - self._started
            self.generations.sort(key=lambda one: (one.prompt_number, one.completion_index))
        if self._failures:
            failures = sorted(self._failures, key=lambda one: one.prompt_number)
            text = "\n".join(dict.fromkeys(failure.message for failure in failures))
            raise GenerationError(text, failures=failures, generations=self.generations)


def held_characters(text: str, strings: Sequence[str]) -> int:
    """How many of the last characters of a text may be the beginning of one of the strings."""
    longest = min(len(text), max(map(len, strings), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(len(string) > length and text.endswith(string[:length]) for string in strings):
            return length
    return 0


def _generation(prompt: PromptLike, number: int, rollout: Rollout, routing: RoutingUse | None) -> Generation:
    return Generation(
        prompt=prompt,
        prompt_number=number,
        completion_index=rollout.completion_index,
        text=rollout.text,
        token_ids=tuple(rollout.completion_token_ids_T.tolist()),
        is_sampled=tuple(rollout.loss_mask_T.tolist()),
        logprobs=tuple(rollout.logprobs_T.tolist()),
        stop_reason=rollout.stop_reason,
        prompt_tokens=len(rollout.prompt_token_ids_T),
        routing=routing,
    )


@torch.no_grad()
def _routing_use(log: RoutingLog, number: int) -> RoutingUse:
    tokens_LE: list[list[int]] = log.tokens_BLE[number].tolist()
    return RoutingUse(tuple(map(tuple, tokens_LE)), tuple(log.mean_entropy_BL[number].tolist()))
