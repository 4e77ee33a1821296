"""Three splits that share no structure, in which training meets only new compositions of known operations.

A structure (`cispo.tasks.structure`) belongs to one split, and with it every pair of operations that has it; so a pair
is in one split only. Single operations, and all that has the structure of one, are in `sft`. Structures move from the
other splits to `sft` until each operation is in several compositions there, first and second, where its kinds allow.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random

from cispo.tasks.compose import Steps, draw_names, pairs, write_source
from cispo.tasks.operations import Operation
from cispo.tasks.structure import structure

SPLITS = ("sft", "train", "heldout")
SHARES = {"sft": 0.44, "train": 0.44, "heldout": 0.12}
SEEN_AT_LEAST = 6
"""In how many sft compositions each operation is first, and in how many second, where there are so many."""

Groups = list[list[Steps]]
"""Programs by structure: those of one inner list share it. The first is a single operation where there is one."""


def split_programs(operations: Sequence[Operation], rng: Random) -> dict[str, Groups]:
    """Every operation and every fitting pair, by split and structure."""
    singles = _by_structure([(operation,) for operation in operations])
    compositions = _by_structure(pairs(operations))
    sft = [[*group, *compositions.pop(key, [])] for key, group in singles.items()]
    free = list(compositions.values())
    for group in free:
        rng.shuffle(group)
    rng.shuffle(free)
    sft_end, train_end = (round(share * len(free)) for share in (SHARES["sft"], SHARES["sft"] + SHARES["train"]))
    groups = {"sft": [*sft, *free[:sft_end]], "train": free[sft_end:train_end], "heldout": free[train_end:]}
    _cover(groups)
    return groups


def _by_structure(programs: Sequence[Steps]) -> dict[str, list[Steps]]:
    groups: dict[str, list[Steps]] = {}
    for steps in programs:
        source = write_source(steps, draw_names(steps, Random(0)))
        groups.setdefault(structure(source), []).append(steps)
    return groups


def _cover(groups: dict[str, Groups]) -> None:
    """Moves structures into sft until every operation is seen there often enough in each place."""
    seen = Counter(role for group in groups["sft"] for role in _roles(group))
    for split in ("heldout", "train"):
        kept: Groups = []
        for group in groups[split]:
            roles = _roles(group)
            if any(seen[role] < SEEN_AT_LEAST for role in roles):
                groups["sft"].append(group)
                seen.update(roles)
            else:
                kept.append(group)
        groups[split] = kept


def _roles(group: Sequence[Steps]) -> list[tuple[str, int]]:
    return [(step.name, place) for steps in group if len(steps) == 2 for place, step in enumerate(steps)]
