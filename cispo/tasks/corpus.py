"""The corpus of supervised training: many short prompts with completions of mixed quality, as real corpora have.

A share of the completions are mutants of the reference, on purpose: right in form, wrong in meaning, and marked by
`is_correct`. What they take from the policy is what reinforcement learning can give back.
"""

from collections.abc import Sequence, Set
from random import Random

from cispo.tasks.check import NoTestsError, draw_cases, try_mutant
from cispo.tasks.compose import Draw, Steps, draw_names, write_prompt, write_source
from cispo.tasks.library import OPERATIONS
from cispo.tasks.mutate import mutants
from cispo.tasks.structure import structure

SINGLE_SHARE = 0.25
"""Share of the rows that ask for one operation."""
CASES = 16


def corpus_rows(
    programs: Sequence[Steps], rows: int, imperfect_share: float, unseen: Set[str], seed: str
) -> list[dict[str, object]]:
    """About `rows` rows over all `programs` that are sound, shuffled; no prompt occurs twice.

    No completion, right or wrong, has one of the structures in `unseen`.
    """
    rng = Random(f"{seed}:corpus")
    sound = [steps for steps in programs if is_sound(steps, seed)]
    singles = [steps for steps in sound if len(steps) == 1]
    compositions = [steps for steps in sound if len(steps) == 2]
    wanted = round(rows * SINGLE_SHARE) if compositions else rows
    plan = [*_repeat(singles, wanted), *_repeat(compositions, rows - wanted)]
    rng.shuffle(plan)
    seen: set[str] = set()
    result: list[dict[str, object]] = []
    for steps in plan:
        row = _row(steps, imperfect_share, rng, seen, unseen)
        if row is not None:
            result.append({"id": f"sft-{len(result):05d}", **row})
    return result


def completion_of(source: str) -> str:
    """A program as a completion shows it: one fenced block."""
    return f"```python\n{source}\n```"


def _repeat(items: Sequence[Steps], count: int) -> list[Steps]:
    return [items[index % len(items)] for index in range(count)] if items else []


def _row(
    steps: Steps, imperfect_share: float, rng: Random, seen: set[str], unseen: Set[str]
) -> dict[str, object] | None:
    is_correct = rng.random() >= imperfect_share
    for _ in range(8):
        draw = draw_names(steps, rng)
        source = write_source(steps, draw)
        prompt = write_prompt(steps, draw, rng)
        if prompt in seen:
            continue
        if not is_correct:
            bug = _any_bug(steps, draw, rng, unseen)
            if bug is None:
                continue
            source = bug
        seen.add(prompt)
        return {"prompt": prompt, "completion": completion_of(source), "is_correct": is_correct}
    return None


def _any_bug(steps: Steps, draw: Draw, rng: Random, unseen: Set[str]) -> str | None:
    """A plausible mutant, each kind as likely as the others; None if this draw of constants has none."""
    try:
        cases = draw_cases(steps, draw, rng, wanted=CASES)
    except NoTestsError:
        return None
    for mutant in mutants(steps, draw, OPERATIONS, rng):
        source = mutant.build()
        trial = try_mutant(cases, source, draw.entry_point)
        if trial.is_plausible(len(cases)) and structure(source) not in unseen:
            return source
    return None


def is_sound(steps: Steps, seed: str) -> bool:
    """Whether the steps make sense together: defined on many inputs, with results that differ."""
    rng = Random(f"{seed}:sound:{'.'.join(step.name for step in steps)}")
    try:
        draw_cases(steps, draw_names(steps, rng), rng, wanted=CASES)
    except NoTestsError:
        return False
    return True
