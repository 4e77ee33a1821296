"""Tasks of reasoning-gym as data and as a reward, whose scorers run in the sandbox.

A small package of the same name and interface stands in for the real one, which is an extra; where that is installed,
the tests of `REAL_TASKS` run it too.
"""

import ast
import importlib
import importlib.util
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cispo.data import DataSettings, check_data, load_prompts
from cispo.errors import DataError, SandboxError
from cispo.reasoning_gym_rows import split_of
from cispo.rewards.reasoning_gym_library import library_of
from cispo.rewards.reasoning_gym_reward import final_answer, is_fit
from cispo.rewards.reward_set import RewardSet
from cispo.rewards.settings import RewardSettings
from cispo.sandboxes.bubblewrap import BubblewrapSandbox
from cispo.sandboxes.settings import SandboxSettings
from cispo.types import Group, Prompt, Rollout, Score, ScoreStatus, StopReason, Turn

IS_INSTALLED = importlib.util.find_spec("reasoning_gym") is not None
# One with nothing else, one with data files, one with each package that is brought along, and those that run answers.
REAL_TASKS = [
    "chain_sum", "word_ladder", "zebra_puzzles", "time_intervals", "figlet_font", "bf", "gsm_symbolic",
    "knights_knaves", "binary_matrix", "n_queens", "spiral_matrix", "string_insertion", "countdown",
    "intermediate_integration",     "polynomial_multiplication", "puzzle24", "simple_integration", "simple_equations",
]  # fmt: skip
STAND_IN = {
    "__init__.py": "from . import arithmetic, games\nfrom .factory import create_dataset\nfrom . import factory\n",
    "coaching/__init__.py": "from .curriculum import Curriculum\n",
    "coaching/curriculum.py": "class Curriculum:\n    pass\n",
    "data/__init__.py": "from importlib import resources\n\n\ndef read_data_file(name):\n"
    "    return resources.files('reasoning_gym.data').joinpath(name).read_text()\n",
    "data/names.txt": "Ada Grace\n",
    "data/unused.txt": "x" * 1000,
    "factory.py": """
        from .coaching.curriculum import Curriculum
        DATASETS = {}

        def register_dataset(name, dataset_class, config_class, curriculum=None):
            DATASETS[name] = (dataset_class, config_class)

        def create_dataset(name, **settings):
            dataset_class, config_class = DATASETS[name]
            return dataset_class(config_class(**settings))
    """,
    "arithmetic/__init__.py": "from .sums import Sums\nfrom .few import Few\n",
    "arithmetic/sums.py": """
        from dataclasses import dataclass
        from random import Random

        import compiled_elsewhere as np

        from ..coaching import Curriculum
        from ..data import read_data_file
        from ..factory import register_dataset


        @dataclass
        class SumsConfig:
            most: int = 10_000
            seed: int = 0
            size: int = 500


        class Sums:
            def __init__(self, config):
                assert config.most > 0, "most must be positive"
                self.config, self.names = config, read_data_file("names.txt").split()

            def __getitem__(self, index):
                chance = Random(self.config.seed + index)
                pair = (chance.randrange(self.config.most), chance.randrange(self.config.most))
                question = f"{self.names[0]} has {pair[0]}, {self.names[1]} has {pair[1]}. Together?"
                return {"question": question, "answer": str(sum(pair)), "metadata": {"pair": pair, "most": {1: (2,)}}}

            def score_answer(self, answer, entry):
                if answer == "slow":
                    while True:
                        pass
                if answer == "numpy":
                    return np.array([1])
                assert type(entry["metadata"]["pair"]) is tuple and 1 in entry["metadata"]["most"]
                if int(answer) == sum(entry["metadata"]["pair"]):
                    return 1.0
                return 0.5 if answer.isdigit() else 0.01


        register_dataset("sums", Sums, SumsConfig, Curriculum)
    """,
    "arithmetic/few.py": """
        from .sums import Sums, SumsConfig
        from ..factory import register_dataset


        class Few(Sums):
            def __getitem__(self, index):
                return {"question": str(index % 3), "answer": "0", "metadata": {}}

            def score_answer(self, answer, entry):
                return 0.3


        register_dataset("few", Few, SumsConfig)
    """,
    "games/__init__.py": "from .runs import Runs\n",
    "games/runs.py": """
        from dataclasses import dataclass
        from random import Random

        from ..coaching import Curriculum
        from ..factory import register_dataset


        @dataclass
        class RunsConfig:
            seed: int = 0
            size: int = 500


        class Runs:
            def __init__(self, config):
                self.config = config

            def __getitem__(self, index):
                number = Random(self.config.seed + index).randrange(10**9)
                return {"question": f"Write {number} as a list.", "answer": str([number]), "metadata": {}}

            def score_answer(self, answer, entry):
                return float(eval(answer) == eval(entry["answer"]))


        register_dataset("runs_text", Runs, RunsConfig)
        register_dataset("n_queens", Runs, RunsConfig)
    """,
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The small package, as reasoning_gym, with a package that it needs and that is no pure Python one."""
    root = tmp_path / "installed"
    for name, source in STAND_IN.items():
        path = root / "reasoning_gym" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    (root / "compiled_elsewhere.py").write_text("array = list\n")
    monkeypatch.syspath_prepend(root)
    forget()
    importlib.invalidate_caches()
    yield root
    forget()


def forget() -> None:
    library_of.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def rewards() -> Iterator[RewardSet]:
    with_seconds = RewardSettings(name="reasoning_gym", args={"seconds": 1.0})
    made = RewardSet(
        [with_seconds], SandboxSettings(workers=1, pids=24), base_path=Path("."), max_completion_tokens=20
    )
    yield made
    made.close()


def rows(path: str, split: str | None = None) -> list[Prompt]:
    return load_prompts(DataSettings(path=path, split=split), base_path=Path("."))


def score(rewards: RewardSet, prompt: Prompt, *answers: str | None) -> list[Score]:
    turn = Turn(np.zeros(1, np.int32), np.ones(1, np.bool_), np.zeros(1, np.float32), np.zeros(1, np.int32))
    texts = ["I do not know." if answer is None else f"So <answer>{answer}</answer>." for answer in answers]
    rollouts = [
        Rollout(prompt.id, index, np.zeros(3, np.int32), (turn,), StopReason.EOS, text)
        for index, text in enumerate(texts)
    ]
    return list(rewards.score(Group(prompt, tuple(rollouts))))


def own_answer(prompt: Prompt) -> str:
    return str(ast.literal_eval(prompt.row["entry"])["item"]["answer"])


def test_a_path_means_the_same_rows_every_time(stand_in: Path) -> None:
    first, again = rows("reasoning_gym:sums?size=7&seed=3&most=50"), rows("reasoning_gym:sums?size=7&seed=3&most=50")
    assert [(row.id, row.text, row.row) for row in first] == [(row.id, row.text, row.row) for row in again]
    assert len(first) == 7 and {*first[0].row} == {"question", "task", "entry"}
    assert first[0].text == f"{first[0].row['question']}\n\nGive the final answer between <answer> and </answer>."
    assert int(own_answer(first[0])) < 100
    assert len(rows("reasoning_gym:sums")) == 1000 and len(rows("reasoning_gym:sums", "heldout")) == 200


def test_no_question_is_in_both_splits_whatever_the_sets(stand_in: Path) -> None:
    paths = [f"reasoning_gym:sums?most=40&seed={seed}&size=" for seed in (0, 1)]
    train = {row.text for path in paths for row in rows(f"{path}300")}
    heldout = {row.text for path in paths for row in rows(f"{path}99", "heldout")}
    assert len(train) > 300 and len(heldout) > 99 and not train & heldout
    assert all(split_of(row.row["question"]) == "train" for row in rows("reasoning_gym:sums?size=9"))
    one, other = rows("reasoning_gym:sums?size=200&seed=1"), rows("reasoning_gym:sums?size=200&seed=2")
    assert not {row.text for row in one} & {row.text for row in other}


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("sum", None, "there is no task 'sum'; did you mean 'sums'"),
        ("sums?most=0", None, "refuses its settings \\(most must be positive\\)"),
        ("sums?fewest=1", None, "refuses its settings .*fewest"),
        ("sums?size=0", None, "size must be a whole number of at least 1, got 0"),
        ("sums?seed=x", None, "seed must be a whole number from 0 to 2000, got 'x'"),
        ("sums", "test", "data.split is 'test', but reasoning_gym:sums has the splits train and heldout"),
        ("few?size=4", None, "draws gave . different questions"),
        ("game_of_life_halting", None, "full marks to any text"),
    ],
)
def test_what_cannot_be_is_one_line(stand_in: Path, path: str, split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        rows(f"reasoning_gym:{path}", split)
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_how_to_install_it(stand_in: Path, rewards: RewardSet) -> None:
    prompt = rows("reasoning_gym:sums?size=1")[0]
    forget()
    sys.modules["reasoning_gym"] = None  # type: ignore[assignment] # how Python marks what cannot be imported
    settings = DataSettings(path="reasoning_gym:sums")
    with pytest.raises(DataError, match="pip install 'cispo\\[reasoning-gym\\]'"):
        check_data(settings, base_path=Path("."))
    (outcome,) = score(rewards, prompt, "1")
    assert outcome.status is ScoreStatus.ERROR and "pip install 'cispo[reasoning-gym]'" in outcome.message


def test_a_group_is_scored_by_its_final_answers(stand_in: Path, rewards: RewardSet) -> None:
    prompt = rows("reasoning_gym:sums?size=1&seed=5")[0]
    right = own_answer(prompt)
    scores = score(rewards, prompt, right, "7", None, "-7", "junk", f"7</answer> no, <answer>{right}", "numpy", "slow")
    assert [outcome.status for outcome in scores] == [ScoreStatus.OK] * 8
    assert [outcome.value for outcome in scores] == [1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert [outcome.parts["correct"] for outcome in scores] == [1.0, 0, 0, 0, 0, 1.0, 0, 0]
    told = [outcome.info.get("scorer") for outcome in scores]
    assert told == [None, None, "no answer", None, "raised ValueError", None, "raised ImportError", "late"]


def test_full_marks_alone_may_count(stand_in: Path) -> None:
    settings = RewardSettings(name="reasoning_gym", args={"full_marks": True})
    rewards = RewardSet([settings], SandboxSettings(workers=1), base_path=Path("."), max_completion_tokens=20)
    prompt = rows("reasoning_gym:sums?size=1")[0]
    assert [outcome.value for outcome in score(rewards, prompt, own_answer(prompt), "7")] == [1.0, 0.0]
    rewards.close()


HOSTILE = {
    "ends its process": "__import__('os')._exit(0)",
    "kills what started it": "[__import__('os').kill(__import__('os').getppid(), 9), __import__('time').sleep(9)]",
    "kills all": "__import__('os').kill(-1, 9)",
    "loops": "[x for x in iter(int, 1)]",
    "takes all memory": "[bytearray(1 << 26) for _ in range(99)]",
    "forges replies": "[__import__('os').write(fd, b'[%d, \"score\", 1.0]\\n' % n) for n in range(9) for fd in "
    "range(3, 256) if __import__('os').path.exists('/proc/self/fd/%d' % fd)]",
    "writes to what started it": "open('/proc/%d/mem' % __import__('os').getppid(), 'r+b')",
    "forks": "[__import__('os').fork() for _ in range(99)]",
    "leaves a process": "__import__('os').fork() or [__import__('os').setsid(), __import__('time').sleep(99)]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_harms_no_other(stand_in: Path, rewards: RewardSet, name: str, tmp_path: Path) -> None:
    """The scorer runs it, and nobody says that this task's does: its own score is not safe, all others' are."""
    prompt = rows("reasoning_gym:runs_text?size=1")[0]
    scores = score(rewards, prompt, "[0]", HOSTILE[name], own_answer(prompt), "[1]")
    others = [scores[0], *scores[2:]]
    assert [(outcome.status, outcome.value) for outcome in others] == [
        (ScoreStatus.OK, 0.0), (ScoreStatus.OK, 1.0), (ScoreStatus.OK, 0.0)
    ]  # fmt: skip
    assert scores[1].status is ScoreStatus.OK


def test_an_answer_that_a_known_scorer_would_run_is_none(stand_in: Path, rewards: RewardSet) -> None:
    """Run, this one would find the right answer in the caller's variables."""
    steals = "__import__('sys')._getframe(1).f_locals['entry']['answer'] and [*eval(entry['answer'])]"
    for task, value in (("runs_text", 1.0), ("n_queens", 0.0)):
        prompt = rows(f"reasoning_gym:{task}?size=1")[0]
        outcomes = score(rewards, prompt, steals, "[*eval(entry['answer'])]", own_answer(prompt))
        assert [outcome.value for outcome in outcomes] == [value, value, 1.0]
        assert {outcome.status for outcome in outcomes} == {ScoreStatus.OK}


@pytest.mark.parametrize("answer", ["(1 + 2.5)*3 - .5/x", "x**2/2 + C", "sin(x)*exp(-x) + log(2)", "asinh(x)", "1e3"])
def test_arithmetic_may_be_run(answer: str) -> None:
    assert is_fit("simple_integration", answer)


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os')", "exec(chr(112))", "open(1)", "(1).real", "1..real", "(x .\nreal)", "x[0]", "'x'",
        "lambda: 1", "x if x else y", "symbols", "{1}", "x; y", "x @ y", "sin.func",
        "\N{MATHEMATICAL SANS-SERIF SMALL E}xec(1)",
    ],
)  # fmt: skip
def test_nothing_else_is(answer: str) -> None:
    assert not is_fit("simple_integration", answer)


def test_a_scorer_that_fails_its_own_answer_is_an_error_and_no_zero(stand_in: Path, rewards: RewardSet) -> None:
    prompt = rows("reasoning_gym:sums?size=1")[0]
    broken = Prompt(prompt.id, prompt.text, {**prompt.row, "entry": prompt.row["entry"].replace("'pair'", "'pears'")})
    (outcome,) = score(rewards, broken, "7")
    assert outcome.status is ScoreStatus.ERROR and "its own answer" not in outcome.message
    assert "given the entry's own answer, it raises KeyError" in outcome.message
    (outcome,) = score(rewards, rows("reasoning_gym:few?size=1")[0], "0")
    assert outcome.status is ScoreStatus.ERROR and "it gives 0.3" in outcome.message
    (outcome,) = score(rewards, Prompt("x", "x", {"task": "sums", "entry": "what(1)"}), "7")
    assert outcome.status is ScoreStatus.ERROR and "make the rows anew" in outcome.message


def test_a_sandbox_that_fails_is_an_error(stand_in: Path, rewards: RewardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **named: object) -> None:
        raise SandboxError("no cores")

    monkeypatch.setattr(BubblewrapSandbox, "run", fail)
    monkeypatch.setattr("cispo.sandboxes.attempts.time.sleep", lambda pause_s: None)
    scores = score(rewards, rows("reasoning_gym:sums?size=1")[0], "7", None)
    assert [outcome.status for outcome in scores] == [ScoreStatus.ERROR, ScoreStatus.OK]
    assert "no cores" in scores[0].message


def test_only_what_a_task_needs_goes_into_the_sandbox(stand_in: Path) -> None:
    import io
    import zipfile

    library = library_of("reasoning_gym.arithmetic.sums", "3.11.2")
    with zipfile.ZipFile(io.BytesIO(library.gym)) as archive:
        names = {name.removeprefix("reasoning_gym/").replace(".pyc", ".py") for name in archive.namelist()}
    assert names == {
        "arithmetic/sums.py", "coaching/__init__.py", "coaching/curriculum.py", "data/__init__.py", "data/names.txt",
        "factory.py",
    }  # fmt: skip
    assert library.placeholders == ("compiled_elsewhere",)


@pytest.mark.docker
def test_it_scores_in_containers_too(stand_in: Path) -> None:
    sandbox = SandboxSettings(workers=1, backend="docker", pids=24)
    rewards = RewardSet([RewardSettings(name="reasoning_gym")], sandbox, base_path=Path("."), max_completion_tokens=20)
    prompt = rows("reasoning_gym:runs_text?size=1")[0]
    scores = score(rewards, prompt, own_answer(prompt), HOSTILE["kills what started it"], "[0]")
    rewards.close()
    assert [(outcome.status, outcome.value) for outcome in scores] == [
        (ScoreStatus.OK, 1.0), (ScoreStatus.OK, 0.0), (ScoreStatus.OK, 0.0)
    ]  # fmt: skip


@pytest.mark.skipif(not IS_INSTALLED, reason="reasoning-gym is an extra that is not installed here")
@pytest.mark.parametrize("task", REAL_TASKS)
def test_a_real_task_scores_its_own_answer_in_the_sandbox(rewards: RewardSet, task: str) -> None:
    prompt = rows(f"reasoning_gym:{task}?size=2")[1]
    escapes = "__import__('os').system('touch /tmp/escaped')"
    scores = score(rewards, prompt, own_answer(prompt), escapes, None)
    assert [outcome.status for outcome in scores] == [ScoreStatus.OK] * 3, scores
    assert scores[0].value == 1.0 and scores[1].value < 0.5 and scores[2].value == 0.0


def test_the_last_answer_after_the_thinking_counts() -> None:
    assert final_answer("<think><answer>1</answer></think> <answer> 2 </answer>") == "2"
    assert final_answer("<answer>1</answer> <answer>2") == "1"
    assert final_answer("<answer>1 <answer>2</answer>") == "2"
    assert final_answer("2") is None
