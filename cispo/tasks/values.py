"""Inputs for tasks: edge cases first, then random ones; and the bounds that every value keeps."""

from collections.abc import Callable
from random import Random
from typing import Any

from cispo.tasks.operations import Kind

LETTERS = "aaeeinorst"
POOL = ("ant", "sea", "tree", "rose", "note", "tin", "a", "stone", "rain", "net", "east", "noon", "iron", "seat", "on")

EDGES: dict[str, tuple[Any, ...]] = {
    "int": (0, 1, -3),
    "small": (0, 1),
    "digits": (0, 7),
    "ints": ([], [4]),
    "close": ([], [2]),
    "ordered": ([], [5]),
    "mirrored": ([], [5]),
    "evens": ([], [5]),
    "str": ("", "a"),
    "palindromes": ("", "a"),
    "sentence": ("", "rain"),
    "words": ([], ["tin"]),
    "dict": ({}, {"a": 5}),
}


def random_word(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(POOL)
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6)))


def random_ints(rng: Random, low: int, high: int) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(2, 6))]


def mirrored(rng: Random) -> list[int]:
    half = random_ints(rng, 0, 9)[:3]
    return half + half[::-1] if rng.random() < 0.5 else random_ints(rng, 0, 3)


def evens(rng: Random) -> list[int]:
    xs = random_ints(rng, 0, 9)[:4]
    return [2 * x for x in xs] if rng.random() < 0.5 else xs


def palindrome(rng: Random) -> str:
    half = random_word(rng)[:3]
    return half + half[::-1] if rng.random() < 0.5 else random_word(rng)


def ordered(rng: Random) -> list[int]:
    xs = random_ints(rng, 0, 20)
    return sorted(xs) if rng.random() < 0.5 else xs


def random_dict(rng: Random) -> dict[str, int]:
    keys = [rng.choice(LETTERS) if rng.random() < 0.5 else random_word(rng) for _ in range(rng.randint(1, 4))]
    return {key: rng.randint(-5, 20) for key in keys}


GENERATORS: dict[str, Callable[[Random], Any]] = {
    "int": lambda rng: rng.randint(-6, 24) if rng.random() < 0.8 else rng.randint(25, 99),
    "small": lambda rng: rng.randint(0, 12),
    "digits": lambda rng: rng.randint(0, rng.choice((99, 999, 9999))),
    "ints": lambda rng: random_ints(rng, -6, 20),
    "close": lambda rng: random_ints(rng, -1, 5),
    "ordered": ordered,
    "mirrored": mirrored,
    "evens": evens,
    "str": random_word,
    "palindromes": palindrome,
    "sentence": lambda rng: " ".join(random_word(rng) for _ in range(rng.randint(1, 3))),
    "words": lambda rng: [random_word(rng) for _ in range(rng.randint(1, 4))],
    "dict": random_dict,
}

GENERATOR_KIND: dict[str, Kind] = {
    "small": "int", "digits": "int", "close": "ints", "ordered": "ints", "mirrored": "ints", "evens": "ints",
    "palindromes": "str", "sentence": "str",
}


def is_bounded(value: object) -> bool:
    """Whether JSON keeps the value as it is, and it is small: below ten million, at most 24 items or letters."""
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) < 10_000_000
    if isinstance(value, str):
        return len(value) <= 24
    if isinstance(value, list):
        return len(value) <= 24 and all(is_bounded(item) for item in value)
    if isinstance(value, dict):
        return len(value) <= 12 and all(isinstance(key, str) and is_bounded(value[key]) for key in value)
    return False
