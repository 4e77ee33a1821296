"""One task: a draw of names and constants, hidden tests, mutants that they kill."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from cispo.tasks.check import Case, NoTestsError, Trial, draw_cases, try_mutant
from cispo.tasks.compose import Draw, Steps, draw_names, write_prompt, write_source
from cispo.tasks.library import OPERATIONS
from cispo.tasks.mutate import mutants

POOL_SIZE = 40
TESTS = 8
MAX_TESTS = 10
RARE = 3
"""How many of the hidden tests have another result than the commonest, so that no constant comes close."""
MUTANTS = 3
TRIED = 10
"""How many plausible mutants the hidden tests are chosen against; the row shows the first three."""
DRAWS = 6
"""How many draws of names and constants a composition gets before it is given up."""


@dataclass(frozen=True)
class Task:
    """A task as a row says it; `steps` names its operations."""

    steps: Steps
    prompt: str
    entry_point: str
    examples: tuple[Case, ...]
    tests: tuple[Case, ...]
    solution: str
    mutants: tuple[str, ...]

    @property
    def id(self) -> str:
        return ".".join(step.name for step in self.steps)

    @property
    def family(self) -> str:
        return " + ".join(step.family for step in self.steps)

    def as_row(self, split: str) -> dict[str, object]:
        """Cases are JSON text, because columns of mixed types are not for `datasets`; see `cispo.data.json_columns`."""
        return {
            "id": self.id, "split": split, "family": self.family, "prompt": self.prompt,
            "entry_point": self.entry_point, "examples": _as_json(self.examples), "tests": _as_json(self.tests),
            "solution": self.solution, "mutants": list(self.mutants),
        }


def build_task(steps: Steps, seed: str) -> Task:
    """Draws until the task is sound; NoTestsError if it never is."""
    name = ".".join(step.name for step in steps)
    rng = Random(f"{seed}:{name}")
    reasons = []
    for _ in range(DRAWS):
        try:
            return _attempt(steps, rng)
        except NoTestsError as error:
            reasons.append(str(error))
    raise NoTestsError(f"{name}: no sound task in {DRAWS} draws ({'; '.join(dict.fromkeys(reasons))})")


def _attempt(steps: Steps, rng: Random) -> Task:
    draw = draw_names(steps, rng)
    source = write_source(steps, draw)
    cases = draw_cases(steps, draw, rng, wanted=POOL_SIZE)
    if len(cases) < TESTS + 2:
        raise NoTestsError(f"only {len(cases)} inputs")
    trials = _try_mutants(steps, draw, source, cases, rng)
    chosen = list(trials)[:MUTANTS]
    if len(chosen) < MUTANTS:
        raise NoTestsError(f"only {len(chosen)} mutants")
    example_indexes = _pick_examples(cases, rng)
    tests = _pick_tests(cases, example_indexes, [trials[mutant] for mutant in chosen], list(trials.values()), rng)
    return Task(
        steps,
        write_prompt(steps, draw, rng),
        draw.entry_point,
        tuple(cases[index] for index in example_indexes),
        tuple(cases[index] for index in tests),
        source,
        tuple(chosen),
    )


def _try_mutants(steps: Steps, draw: Draw, source: str, cases: Sequence[Case], rng: Random) -> dict[str, Trial]:
    """Plausible mutants by source, kinds taking turns; NoTestsError if a step can be dropped unnoticed."""
    plausible: dict[str, Trial] = {}
    for mutant in mutants(steps, draw, OPERATIONS, rng):
        if len(plausible) == TRIED and mutant.kind != "dropped":
            continue
        text = mutant.build()
        if text == source or text in plausible:
            continue
        trial = try_mutant(cases, text, draw.entry_point)
        if mutant.kind == "dropped" and not trial.killers:
            raise NoTestsError("a step changes nothing")
        if trial.is_plausible(len(cases)):
            plausible[text] = trial
    return plausible


def _pick_examples(cases: Sequence[Case], rng: Random) -> list[int]:
    """Two cases past the edge cases, with different results where there are any."""
    order = rng.sample(range(2, len(cases)), len(cases) - 2)
    second = next((i for i in order[1:] if cases[i].expected != cases[order[0]].expected), order[1])
    return [order[0], second]


def _pick_tests(
    cases: Sequence[Case], taken: Sequence[int], chosen: Sequence[Trial], trials: Sequence[Trial], rng: Random
) -> list[int]:
    """Edge cases and rare results, then whatever kills most of the mutants alive (the task's own first), then any."""
    free = [index for index in range(len(cases)) if index not in taken]
    results = [repr(case.expected) for case in cases]
    commonest = max(dict.fromkeys(results), key=results.count)
    tests = [*free[:2], *[index for index in free[2:] if results[index] != commonest][:RARE]]
    if all(results[index] == commonest for index in tests):
        raise NoTestsError("the hidden tests all have one result")
    for alive in (list(chosen), list(trials)):
        while len(tests) < MAX_TESTS:
            alive = [trial for trial in alive if not set(trial.killers) & set(tests)]
            scores = {index: sum(index in trial.killers for trial in alive) for index in free if index not in tests}
            best = max(scores, key=lambda index: scores[index])
            if scores[best] == 0:
                break
            tests.append(best)
    rest = [index for index in free if index not in tests]
    tests += rng.sample(rest, max(0, TESTS - len(tests)))
    if any(not set(trial.killers) & set(tests) for trial in chosen):
        raise NoTestsError("a mutant survives the hidden tests")
    return tests


def _as_json(cases: Sequence[Case]) -> str:
    return json.dumps([case.as_row() for case in cases], separators=(",", ":"))
