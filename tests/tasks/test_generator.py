"""The generator: same seed, same bytes; what a structure is; splits; bugs; prompts."""

import ast
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from cispo.tasks.build import build_task
from cispo.tasks.check import (
    Case,
    NoTestsError,
    TooLongError,
    draw_cases,
    load_function,
    same,
    try_mutant,
)
from cispo.tasks.compose import Draw, draw_names, fits, pairs, write_phrase, write_source
from cispo.tasks.generate import write_files
from cispo.tasks.library import OPERATIONS
from cispo.tasks.mutate import mutants, point_mutants
from cispo.tasks.operations import Operation
from cispo.tasks.splits import SPLITS, split_programs
from cispo.tasks.structure import structure

BY_NAME = {operation.name: operation for operation in OPERATIONS}
FEW = tuple(
    BY_NAME[name] for name in ("add", "multiply", "negate", "is_even", "add_each", "keep_even", "reverse", "total")
)


def named(*names: str) -> tuple[Operation, ...]:
    return tuple(BY_NAME[name] for name in names)


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes by name; those of a gzipped file are its content's, as compression differs between builds of zlib."""
    return {
        file.name: gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        for file in sorted(folder.iterdir())
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_files(tmp_path / name, seed=seed, operations=FEW, corpus=60)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")["sft.jsonl"] != contents(tmp_path / "three")["sft.jsonl"]
    assert contents(tmp_path / "one")["sft_corpus.jsonl.gz"] != contents(tmp_path / "three")["sft_corpus.jsonl.gz"]


def test_bytes_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib, tempfile, pathlib\n"
        "from cispo.tasks.generate import write_files\n"
        "from cispo.tasks.library import OPERATIONS\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "write_files(folder, operations=OPERATIONS[::16], corpus=40)\n"
        "print(hashlib.sha256(b''.join(f.read_bytes() for f in sorted(folder.iterdir()))).hexdigest())\n"
    )
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.slow
def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    from cispo.resources import recipes_folder

    write_files(tmp_path)
    committed = contents(recipes_folder() / "data" / "code")
    assert contents(tmp_path) == {name: data for name, data in committed.items() if name != "README.md"}


def test_the_imperfect_share_is_kept(tmp_path: Path) -> None:
    for share in (0.0, 1.0):
        write_files(tmp_path / str(share), operations=FEW, corpus=80, imperfect_share=share)
        rows = [json.loads(line) for line in contents(tmp_path / str(share))["sft_corpus.jsonl.gz"].splitlines()]
        assert rows and all(row["is_correct"] is (share == 0.0) for row in rows)


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("def f(x):\n    return x + 1", "def g(n):\n    return n + 20", True),
        ("def f(x):\n    return max(x)", "def g(n):\n    return sum(n)", True),
        ("def f(x):\n    return x.upper()", "def g(n):\n    return n.split()", True),
        ("def f(x):\n    return x[-1]", "def g(n):\n    return n[0]", True),
        ("def f(x):\n    return x + 1", "def f(x):\n    return x - 1", False),
        ("def f(x):\n    return x + 1", "def f(x):\n    return x + x", False),
        ("def f(x):\n    return x[1:]", "def f(x):\n    return x[:1]", False),
        ("def f(x):\n    return x < 1", "def f(x):\n    return x <= 1", False),
        ("def f(x):\n    return [y for y in x]", "def f(x):\n    return [y for y in x if y]", False),
    ],
)
def test_structure_erases_names_and_constants_and_nothing_else(one: str, other: str, are_same: bool) -> None:
    assert (structure(one) == structure(other)) is are_same


def test_splits_of_programs_share_no_structure_and_lose_no_pair() -> None:
    groups = split_programs(OPERATIONS, Random(1))
    programs = [steps for split in SPLITS for group in groups[split] for steps in group]
    assert len(programs) == len(set(programs)) == len(OPERATIONS) + len(pairs(OPERATIONS))
    found = [
        {structure(write_source(steps, draw_names(steps, Random(2)))) for group in groups[split] for steps in group}
        for split in SPLITS
    ]
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]


def test_kinds_of_a_composition_meet() -> None:
    assert fits(*named("add", "negate")) and fits(*named("total", "add_two"))
    assert not fits(*named("total", "upper"))
    assert not fits(*named("add_two", "subtract_two")), "three arguments"
    assert not fits(*named("factorial", "fibonacci")), "two helpers of one name"
    assert not fits(*named("is_even", "add"))


def test_a_recursive_step_of_a_composition_is_a_helper() -> None:
    source = write_source(named("length", "factorial"), Draw("f", ("xs",), ({}, {})))
    assert load_function(source, "f")([5, 6, 7, 8]) == 24
    alone = write_source(named("factorial"), Draw("f", ("n",), ({},)))
    assert "return n * f(n - 1)" in alone


def test_steps_come_in_order_and_extra_arguments_go_to_their_step() -> None:
    both = write_source(named("add", "multiply"), Draw("f", ("n",), ({"c": 2}, {"c": 5})))
    assert both == "def f(n):\n    r = n + 2\n    return r * 5"
    extra = write_source(named("total", "subtract_two"), Draw("f", ("xs", "k"), ({}, {})))
    assert load_function(extra, "f")([1, 2, 3], 4) == 2


def test_no_two_operations_on_the_same_kinds_are_asked_for_in_the_same_words() -> None:
    asked = [(operation.takes, phrase) for operation in OPERATIONS for phrase in operation.phrases]
    assert len(asked) == len(set(asked))
    assert all(len(operation.phrases) >= 2 for operation in OPERATIONS)


def test_one_composition_is_asked_for_in_many_ways() -> None:
    draw = Draw("f", ("xs",), ({}, {}))
    phrases = {write_phrase(named("reverse", "negate_each"), draw, Random(seed)) for seed in range(80)}
    assert len(phrases) >= 20
    assert any(", but first " in phrase for phrase in phrases)


def test_point_mutants_change_one_point_each() -> None:
    source = "def f(xs):\n    return [x * 2 for x in xs if x > 3]"
    texts = {mutant.build() for mutant in point_mutants(source)}
    assert "def f(xs):\n    return [x + 2 for x in xs if x > 3]" in texts
    assert "def f(xs):\n    return [x * 2 for x in xs if x >= 3]" in texts
    assert "def f(xs):\n    return [x * 2 for x in xs if x > 4]" in texts
    assert "def f(xs):\n    return [x * 2 for x in xs]" in texts
    assert "def f(xs):\n    return [x * 2 for x in xs[1:] if x > 3]" in texts


def test_step_mutants_swap_and_drop_steps_and_keep_the_signature() -> None:
    steps = named("reverse", "add_each")
    draw = Draw("f", ("xs",), ({}, {"c": 2}))
    found = mutants(steps, draw, OPERATIONS, Random(0))
    by_kind = {mutant.kind: mutant.build() for mutant in found}
    assert by_kind["order"] == "def f(xs):\n    ys = [x + 2 for x in xs]\n    return ys[::-1]"
    assert {"dropped", "operation", "edge", "operator"} <= set(by_kind)
    for mutant in found:
        assert mutant.build().splitlines()[0].startswith("def ")
        assert "f(xs)" in ast.unparse(ast.parse(mutant.build()))
    assert len({mutant.kind for mutant in found[: len(by_kind)]}) == len(by_kind), "kinds take turns"


def test_a_mutant_that_runs_on_is_no_bug_to_learn_from() -> None:
    source = "def f(n):\n    if n < 2:\n        return n\n    return f(n - 1) + f(n - 2)"
    trial = try_mutant([Case((40,), 0), Case((1,), 1)], source, "f")
    assert not trial.is_plausible(2)
    with pytest.raises(TooLongError):
        load_function("def f(n):\n    return list(range(n))", "f")(10**9)
    with pytest.raises(TooLongError):
        load_function("def f(n):\n    return 'x' * n", "f")(10**9)


def test_a_mutant_that_mostly_raises_is_implausible() -> None:
    trial = try_mutant([Case(("a",), "A"), Case(("b",), "B")], "def f(s):\n    return s.no()", "f")
    assert trial.killers == (0, 1) and trial.raised == 2 and not trial.is_plausible(2)


def test_equality_is_strict_about_types() -> None:
    assert not same(True, 1) and not same([1, True], [1, 1]) and not same([], "")
    assert same({"a": [1]}, {"a": [1]}) and same([], [])


def test_constant_and_idle_compositions_are_refused() -> None:
    steps = named("keep_even", "all_even")
    with pytest.raises(NoTestsError):
        draw_cases(steps, draw_names(steps, Random(0)), Random(0), wanted=40)
    with pytest.raises(NoTestsError, match=r"^ascending\.total: no sound task in .*a step changes nothing"):
        build_task(named("ascending", "total"), "0")


def test_inputs_keep_to_the_domain_of_both_steps() -> None:
    steps = named("largest", "digit_sum")
    cases = draw_cases(steps, draw_names(steps, Random(0)), Random(0), wanted=40)
    assert all(case.arguments[0] and max(case.arguments[0]) >= 0 for case in cases)


def test_the_command_writes_files_and_a_tokenizer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cispo.tasks", str(tmp_path), "--imperfect-share", "1.5"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2 and "must lie in 0 to 1, got 1.5" in done.stderr
