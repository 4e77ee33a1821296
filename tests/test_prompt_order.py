"""Which prompts a step takes: a function of seed and step alone."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo.prompt_order import prompts_of_step
from cispo.types import Prompt


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"p{index}", text=f"question {index}") for index in range(count)]


def ids(count: int, per_step: int, *, seed: int, step: int) -> tuple[str, ...]:
    return tuple(prompt.id for prompt in prompts_of_step(make_prompts(count), per_step, seed=seed, step=step).prompts)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_a_pass_takes_no_prompt_twice_and_ends_with_its_last_whole_step(count: int, per_step: int, seed: int) -> None:
    steps = count // per_step
    if steps == 0:
        with pytest.raises(ValueError, match="prompts_per_step"):
            ids(count, per_step, seed=seed, step=1)
        return
    for epoch in range(2):
        first = epoch * steps + 1
        chosen = [prompts_of_step(make_prompts(count), per_step, seed=seed, step=first + at) for at in range(steps)]
        assert {step.epoch for step in chosen} == {epoch}
        taken = [prompt.id for step in chosen for prompt in step.prompts]
        assert len(taken) == len(set(taken)) == steps * per_step


def test_seeds_and_passes_are_shuffled_apart() -> None:
    first = ids(64, 64, seed=0, step=1)
    assert sorted(first) == sorted(ids(64, 64, seed=0, step=2)) == sorted(prompt.id for prompt in make_prompts(64))
    assert len({first, ids(64, 64, seed=0, step=2), ids(64, 64, seed=1, step=1)}) == 3


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_order_is_the_same_in_every_process(hash_seed: str) -> None:
    """A resumed run is another process, with other hashes of texts."""
    code = (
        "from cispo.prompt_order import prompts_of_step; from cispo.types import Prompt;"
        "chosen = prompts_of_step([Prompt(f'p{i}', '') for i in range(20)], 5, seed=7, step=6).prompts;"
        "print(*(prompt.id for prompt in chosen))"
    )
    environment = {"PYTHONHASHSEED": hash_seed}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert tuple(printed.stdout.split()) == ids(20, 5, seed=7, step=6)
