"""`python -m cispo.tasks.maths OUT_DIR [--seed 0]` writes short maths questions with exact answers.

Every number comes from a seeded generator, answers are computed with integers and fractions, and no question occurs
twice, so held-out questions are not trained on. A row has `prompt`, `answer` and `family`; those for supervised
training have a `completion` that ends in a box, wrong in a share of them, so that reinforcement learning has something
to mend.
"""

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from random import Random

TRAIN_ROWS, HELDOUT_ROWS, SFT_ROWS = 1000, 200, 4000
WRONG_SHARE = 0.4
Question = tuple[str, str, str]
"""The question, a step on the way, and the answer."""


def addition(rng: Random) -> Question:
    a, b, c = rng.randint(2, 49), rng.randint(2, 49), rng.randint(1, 9)
    if rng.random() < 0.5:
        return f"add {a} and {b}", f"{a} + {b}", str(a + b)
    return f"find {a} + {b} - {c}", f"{a} + {b} = {a + b}", str(a + b - c)


def product(rng: Random) -> Question:
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 9)
    if rng.random() < 0.5:
        return f"find {a} times {b}", f"{a} * {b}", str(a * b)
    return f"find {a} times {b} plus {c}", f"{a} * {b} = {a * b}", str(a * b + c)


def fraction(rng: Random) -> Question:
    a, b, c = rng.randint(1, 12), rng.randint(2, 12), rng.randint(1, 12)
    value = Fraction(a, b) + Fraction(c, b)
    return f"add {a}/{b} and {c}/{b} as a fraction", f"{a + c}/{b}", _latex(value)


def equation(rng: Random) -> Question:
    a, x, b = rng.randint(2, 9), rng.randint(-5, 12), rng.randint(1, 20)
    return f"find x if {a} x + {b} = {a * x + b}", f"{a} x = {a * x}", str(x)


def remainder(rng: Random) -> Question:
    a, b = rng.randint(10, 199), rng.randint(2, 9)
    return f"find the rest of {a} divided by {b}", f"{b} * {a // b} = {a - a % b}", str(a % b)


def divisor(rng: Random) -> Question:
    scale = rng.randint(2, 9)
    a, b = scale * rng.randint(1, 12), scale * rng.randint(1, 12)
    if rng.random() < 0.5:
        return f"find the largest divisor of {a} and {b}", f"{a} and {b}", str(gcd(a, b))
    return f"find the least multiple of {a} and {b}", f"{a} and {b}", str(lcm(a, b))


def percent(rng: Random) -> Question:
    share, whole = rng.choice((5, 10, 20, 25, 50, 75)), rng.randint(1, 160)
    return f"find {share} percent of {whole}", f"{share} * {whole} / 100", _latex(Fraction(share * whole, 100))


def roots(rng: Random) -> Question:
    a, b = sorted(rng.sample([root for root in range(-12, 13) if root], 2))
    middle = f"{'-' if a + b > 0 else '+'} {abs(a + b)} x"
    last = f"{'+' if a * b > 0 else '-'} {abs(a * b)}"
    return f"solve x^2 {middle} {last} = 0", f"{a} * {b} = {a * b}", f"{a}, {b}"


FAMILIES: dict[str, Callable[[Random], Question]] = {
    function.__name__: function
    for function in (addition, product, fraction, equation, remainder, divisor, percent, roots)
}


def questions(seed: int) -> Iterator[tuple[str, Question]]:
    """Families in turn, without end; no question twice. A family that is used up is left out."""
    rng = Random(f"maths:{seed}")
    seen: set[str] = set()
    while True:
        for name, draw in FAMILIES.items():
            for _ in range(20):
                question = draw(rng)
                if question[0] not in seen:
                    seen.add(question[0])
                    yield name, question
                    break


def split_rows(seed: int) -> dict[str, list[dict[str, object]]]:
    """The rows of each file, by its name without ending."""
    source = questions(seed)
    rng = Random(f"maths:{seed}:completions")
    rows: dict[str, list[dict[str, object]]] = {"heldout": [], "train": [], "sft_corpus": []}
    for name, count in (("heldout", HELDOUT_ROWS), ("train", TRAIN_ROWS), ("sft_corpus", SFT_ROWS)):
        for index in range(count):
            family, question = next(source)
            row: dict[str, object] = {"id": f"{name}-{index:05d}", "family": family, "prompt": question[0]}
            rows[name].append(row | (_completion(question, rng) if name == "sft_corpus" else {"answer": question[2]}))
    return rows


def _completion(question: Question, rng: Random) -> dict[str, object]:
    _, step, answer = question
    is_correct = rng.random() >= WRONG_SHARE
    shown = answer if is_correct else _wrong(answer, rng)
    return {"completion": rf"{step} \boxed{{{shown}}}", "is_correct": is_correct}


def _wrong(answer: str, rng: Random) -> str:
    """The answer with another digit in one place."""
    places = [place for place, character in enumerate(answer) if character.isdigit()]
    place = rng.choice(places)
    digit = rng.choice([digit for digit in "123456789" if digit != answer[place]])
    return answer[:place] + digit + answer[place + 1 :]


def _latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def write_files(folder: Path, seed: int) -> dict[str, int]:
    """Write the files into `folder`; the number of rows of each, by its name. Equal seeds give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, rows in split_rows(seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file = folder / (f"{name}.jsonl.gz" if name == "sft_corpus" else f"{name}.jsonl")
        file.write_bytes(gzip.compress(text, mtime=0) if file.suffix == ".gz" else text)
        counts[file.name] = len(rows)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cispo.tasks.maths", description="Generate maths questions.")
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="where the files go")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, count in write_files(options.folder, options.seed).items():
        print(f"{options.folder / name}: {count} rows")


if __name__ == "__main__":
    main()
