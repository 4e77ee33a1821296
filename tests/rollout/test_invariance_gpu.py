"""On a GPU in bfloat16, with CUDA graphs and steps launched ahead: samples that depend on weights and request alone."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cispo.model.checkpoint import initialise_policy, load_policy, save_policy
from cispo.model.tokenizer import Tokenizer
from cispo.rollout.request import Drawing, Repetition, Stops, ThinkingBudget
from tests.conftest import SMALL_CONFIG, write_byte_tokenizer
from tests.rollout.trials import Policy, assert_empty, request, run, samples, stops

pytestmark = pytest.mark.gpu

REQUESTS = [
    request("short", 1, 4),
    request("chunk", 61, 3),
    request("page", 62, 2, drawing=Drawing(0.7)),
    request("long", 120, 3, **stops(max_new_tokens=20)),
    request("cut", 40, 2, drawing=Drawing(1.3, top_p=0.8, top_k=30, banned_ids=(0, 1, 2))),
    request("greedy", 30, 1, drawing=Drawing(0.0)),
    request("ends", 20, 5, **stops(token_ids=tuple(range(100, 120)), strings=("q",))),
    request("thinks", 70, 2, **stops(thinking=ThinkingBudget(30, "</t>", "time is up</t>"))),
    request("repeats", 9, 3, **stops(repetition=Repetition(3, 0.004))),
]


@pytest.fixture(scope="module")
def gpu_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Heads of 64, as the Triton kernels want them."""
    folder: Path = tmp_path_factory.mktemp("gpu_policy")
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "rotary_dim": 32, "intermediate_size": 256}
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG | sizes), encoding="utf-8")
    save_policy(initialise_policy(folder, seed=0, dtype=torch.float32, device="cpu"), folder)
    write_byte_tokenizer(folder)
    return Policy(load_policy(folder, dtype=torch.bfloat16, device="cuda"), Tokenizer.load(folder))


@pytest.fixture(scope="module")
def reference(gpu_policy: Policy) -> dict[tuple[str, int], tuple[Any, ...]]:
    return samples(run(gpu_policy.engine(), REQUESTS))


@pytest.mark.parametrize(
    ("capacity", "pages", "piece"), [(5, None, 16_384), (12, 12, 64), (12, 6, 100), (30, 8, 16_384)]
)
@pytest.mark.parametrize("parks", [False, True])
def test_requests_sample_alike_in_any_engine_and_order(
    gpu_policy: Policy,
    reference: dict[tuple[str, int], tuple[Any, ...]],
    capacity: int,
    pages: int | None,
    piece: int,
    parks: bool,
) -> None:
    engine = gpu_policy.engine(capacity=capacity, cache_pages=pages, max_prefill_tokens=piece)
    for one in reversed(REQUESTS):
        engine.submit(one)
    groups = {}
    if parks:
        for _ in range(20):
            engine.step()
        parked = pickle.loads(pickle.dumps(engine.park()))
        assert_empty(engine)
        groups = {group.prompt.id: group for group in engine.collect()}
        for group in parked:
            engine.resume(group)
    assert samples(groups | run(engine)) == reference
    assert pages is None or engine.times_set_aside > 0
    assert_empty(engine)


def test_turns_that_grow_together_beyond_the_pages_go_on_one_after_the_other(gpu_policy: Policy) -> None:
    every = Stops(token_ids=tuple(range(260)))
    results = []
    for pages in (None, 6):
        engine = gpu_policy.engine(limit=300, max_prompt_tokens=64, cache_pages=pages)
        for number in range(4):
            engine.submit(request(f"p{number}", 10, is_open=True, stops=every))
        for _ in range(3):
            turns = []
            for _ in range(200):
                if len(turns) == 4:
                    break
                engine.step()
                turns += engine.collect_turns()
            for turn in turns:
                assert engine.extend(turn, [65 + turn.token_ids[0] % 10] * 90)
        while engine.open_turns < 4:
            engine.step()
        for turn in engine.collect_turns():
            engine.close_turn(turn)
        while not engine.is_idle:
            engine.step()
        results.append(samples({group.prompt.id: group for group in engine.collect()}))
        assert_empty(engine)
    assert len(results[0]) == 4
    assert results[0] == results[1]


def test_logits_that_are_not_numbers_fail_their_request_alone(
    gpu_policy: Policy, reference: dict[tuple[str, int], tuple[Any, ...]]
) -> None:
    own = Policy(pickle.loads(pickle.dumps(gpu_policy.decoder)), gpu_policy.tokenizer)
    with torch.no_grad():
        own.decoder.embedding[300] = float("nan")
    engine = own.engine(capacity=12, cache_pages=24)
    bad = [request(f"bad{at}", group_size=3, prompt_ids=[65] * at + [300] + [65] * (99 - at)) for at in (0, 63, 64, 99)]
    mixed = [one for pair in zip(bad, REQUESTS[:4], strict=True) for one in pair] + REQUESTS[4:]
    assert samples(run(engine, mixed)) == reference
    assert sorted(failure.prompt_id for failure in engine.collect_failures()) == sorted(x.prompt.id for x in bad)
    assert_empty(engine)
