"""`python -m cispo.tasks.arithmetic OUT_DIR [--seed 0]` writes the sums that recipes/smollm2_math.yaml trains on.

The task is three parts in equal shares: one-digit `a + b - c`, two-digit `a + b` and two-digit `a + b - c`, numbers
from 1 to 9 and from 10 to 99. Held-out questions are drawn first and never trained on. Training has further parts
beside these, easier ones that lead up to them: a small policy is right now and then on the easiest, and a group in
which nobody is right teaches nothing. A row has `id`, `part`, `prompt`, `answer` and `equations`, the number of steps
that it takes; the questions of heldout_examples.jsonl are those of heldout.jsonl after three worked examples of the
same part, each a turn of a conversation.
"""

import argparse
import itertools
import json
from collections.abc import Container, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random

HELDOUT_ROWS = 512
EXAMPLES = 3
PROMPT = "Compute {}. Work step by step and end with 'Answer: <number>'."
ONE_DIGIT, TWO_DIGITS, TENS = range(1, 10), range(10, 100), range(10, 100, 10)


@dataclass(frozen=True, slots=True)
class Part:
    """Questions of one form: the numbers in their order and the signs before the second and third.

    train_rows: how many rows training has of it; where there are fewer questions, they come several times.
    """

    numbers: tuple[range, ...]
    signs: str
    train_rows: int


TASK = {
    "one_digit_three_terms": Part((ONE_DIGIT, ONE_DIGIT, ONE_DIGIT), "+-", 1200),
    "two_digit_two_terms": Part((TWO_DIGITS, TWO_DIGITS), "+", 1600),
    "two_digit_three_terms": Part((TWO_DIGITS, TWO_DIGITS, TWO_DIGITS), "+-", 1600),
}
"""What is measured, in equal shares."""
STEPS = {
    "one_digit_sum": Part((ONE_DIGIT, ONE_DIGIT), "+", 400),
    "one_digit_difference": Part((ONE_DIGIT, ONE_DIGIT), "-", 300),
    "tens_sum": Part((TENS, TENS), "+", 300),
    "mixed_sum": Part((TWO_DIGITS, ONE_DIGIT), "+", 600),
    "mixed_three_terms": Part((TWO_DIGITS, ONE_DIGIT, ONE_DIGIT), "+-", 400),
}
"""What leads up to it, in training alone."""

Numbers = tuple[int, ...]
Row = dict[str, object]


def expression(numbers: Numbers, signs: str) -> str:
    """`12 + 30 - 7` of (12, 30, 7) and `+-`."""
    return " ".join([str(numbers[0]), *(f"{sign} {value}" for sign, value in zip(signs, numbers[1:], strict=True))])


def value(numbers: Numbers, signs: str) -> int:
    return numbers[0] + sum(number if sign == "+" else -number for sign, number in zip(signs, numbers[1:], strict=True))


def worked(numbers: Numbers, signs: str) -> str:
    """An answer of the form that is asked for, one operation a line."""
    lines = []
    for count in range(1, len(numbers)):
        so_far = value(numbers[:count], signs[: count - 1])
        result = value(numbers[: count + 1], signs[:count])
        lines.append(f"{so_far} {signs[count - 1]} {numbers[count]} = {result}")
    return "\n".join([*lines, f"Answer: {value(numbers, signs)}"])


def split_rows(seed: int) -> dict[str, list[Row]]:
    """The rows of each file, by its name without ending."""
    rng = Random(f"arithmetic:{seed}")
    sources = {name: _questions(part, rng, frozenset()) for name, part in TASK.items()}
    names = [name for _, name in zip(range(HELDOUT_ROWS), itertools.cycle(TASK), strict=False)]
    asked = [(name, next(sources[name])) for name in names]
    measured = frozenset(expression(numbers, TASK[name].signs) for name, numbers in asked)
    heldout = [_row(f"heldout-{index:05d}", name, TASK[name], numbers) for index, (name, numbers) in enumerate(asked)]
    unseen = {name: _questions(part, rng, measured) for name, part in TASK.items()}
    examples = [_with_examples(row, TASK[name], unseen[name]) for row, name in zip(heldout, names, strict=True)]
    train = [
        _row(f"{name}-{index:05d}", name, part, numbers)
        for name, part in (TASK | STEPS).items()
        for index, numbers in enumerate(itertools.islice(_questions(part, rng, measured), part.train_rows))
    ]
    return {"train": train, "heldout": heldout, "heldout_examples": examples}


def _questions(part: Part, rng: Random, measured: Container[str]) -> Iterator[Numbers]:
    """Without end, outside `measured`; none comes again before all others of a round have come."""
    count = prod(map(len, part.numbers))
    while True:
        for index in rng.sample(range(count), min(count, part.train_rows + HELDOUT_ROWS)):
            numbers = []
            for choices in part.numbers:
                index, at = divmod(index, len(choices))
                numbers.append(choices[at])
            if expression(tuple(numbers), part.signs) not in measured:
                yield tuple(numbers)


def _with_examples(row: Row, part: Part, questions: Iterator[Numbers]) -> Row:
    messages = []
    for numbers in itertools.islice(questions, EXAMPLES):
        messages.append({"role": "user", "content": PROMPT.format(expression(numbers, part.signs))})
        messages.append({"role": "assistant", "content": worked(numbers, part.signs)})
    return row | {"prompt": [*messages, {"role": "user", "content": row["prompt"]}]}


def _row(name: str, part_name: str, part: Part, numbers: Numbers) -> Row:
    return {
        "id": name,
        "part": part_name,
        "prompt": PROMPT.format(expression(numbers, part.signs)),
        "answer": str(value(numbers, part.signs)),
        "equations": len(part.signs),
    }


def write_files(folder: Path, seed: int) -> dict[str, int]:
    """Write the files into `folder`; the number of rows of each, by its name. Equal seeds give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in split_rows(seed).items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        counts[file.name] = len(rows)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cispo.tasks.arithmetic", description="Generate sums.")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, count in write_files(options.folder, options.seed).items():
        print(f"{options.folder / name}: {count} rows")


if __name__ == "__main__":
    main()
