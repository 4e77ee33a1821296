"""Finding the function that a recipe names; every mistake is one line that says what there is instead."""

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from cispo.errors import RewardError
from cispo.rewards import resolve
from cispo.rewards.code import code
from cispo.rewards.resolve import check_reward, resolve_reward
from cispo.rewards.settings import RewardSettings

SOURCE = """
from os.path import join

LIMIT = 3

def short(prompt, completion, *, most=3):
    return float(len(completion) < most)

async def later(prompt, completion, **row):
    return 1.0

def no_arguments():
    return 1.0

class Judge:
    def __call__(self, prompt, completion):
        return 0.5

judge = Judge()

def _private(prompt, completion):
    return 1.0
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("x = 1\nundefined_name\n")
    (tmp_path / "unparsable.py").write_text("def f(:\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('bye')\n")
    return tmp_path


def test_built_ins_have_plain_names(tmp_path: Path) -> None:
    assert resolve_reward("code", base_path=tmp_path) is code
    assert {resolve_reward(name, base_path=tmp_path).__name__ for name in ("format", "length")} == {
        "format_reward",
        "length",
    }


def test_a_file_is_relative_to_the_recipe_or_absolute(folder: Path) -> None:
    assert resolve_reward("mine.py:short", base_path=folder)("", "ab") == 1.0
    assert resolve_reward(f"{folder}/mine.py:short", base_path=Path("/"))("", "abcd") == 0.0


def test_a_callable_object_will_do(folder: Path) -> None:
    assert resolve_reward("mine.py:judge", base_path=folder)("", "") == 0.5


def test_a_module_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cispo_test_package.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    assert resolve_reward("cispo_test_package:short", base_path=Path("/"))("", "") == 1.0


def test_an_entry_point_is_found_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cispo_test_plugin.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(folder))
    entries = EntryPoints(
        [
            EntryPoint("terse", "cispo_test_plugin:short", resolve.ENTRY_POINT_GROUP),
            EntryPoint("gone", "cispo_test_plugin:nothing", resolve.ENTRY_POINT_GROUP),
        ]
    )
    monkeypatch.setattr(resolve, "entry_points", lambda *, group: entries.select(group=group))
    assert resolve_reward("terse", base_path=folder)("", "") == 1.0
    with pytest.raises(RewardError, match="did you mean 'terse'"):
        resolve_reward("ters", base_path=folder)
    with pytest.raises(RewardError, match="entry point cispo_test_plugin:nothing fails with AttributeError"):
        resolve_reward("gone", base_path=folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cod", "did you mean 'code'? there is answer_format, code, format, judge, language, length, math"),
        ("mine.py", "there is no reward 'mine.py'; give mine.py:FUNCTION"),
        ("mine.py:shrt", "has no 'shrt'; did you mean 'short'? there is later, no_arguments, short"),
        ("mine.py:", "has no ''; there is later, no_arguments, short"),
        ("mien.py:short", "there is no file FOLDER/mien.py; did you mean 'mine.py'?"),
        ("nothing/at_all.py:f", "there is no file FOLDER/nothing/at_all.py; the path is relative to the recipe"),
        ("broken.py:f", "fails with NameError: name 'undefined_name' is not defined (broken.py:2)"),
        ("unparsable.py:f", "fails with SyntaxError: invalid syntax, line 1"),
        ("leaves.py:f", "fails with SystemExit: bye (leaves.py:2)"),
        ("mine.py:LIMIT", "is a int, no function"),
        ("mine.py:Judge", "is a class, no function"),
        ("mine.py:no_arguments", "is called with a prompt and a completion, but takes ()"),
        ("no_such_package_at_all.x:f", "fails with ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("math:", "has no ''"),
        (":f", "fails with ValueError: Empty module name"),
    ],
)
def test_mistakes_are_one_line(folder: Path, name: str, message: str) -> None:
    with pytest.raises(RewardError) as caught:
        resolve_reward(name, base_path=folder)
    text = str(caught.value)
    assert message in text.replace(str(folder), "FOLDER")
    assert "\n" not in text and repr(name) in text


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("code", {"partal": True}, "takes no argument 'partal'; did you mean 'partial'?"),
        ("code", {"partial": "yes"}, "args.partial: Input should be a valid boolean"),
        ("format", {"x": 1}, "takes no argument 'x'; it takes none"),
        ("length", {}, "args.cache_tokens: Field required"),
        ("length", {"cache_tokens": 0}, "args.cache_tokens: Input should be greater than 0"),
        ("length", {"cache_tokens": 9, "max_tokens": 8}, "args: cache_tokens (9) must be at most max_tokens (8)"),
        ("mine.py:short", {"mots": 3}, "takes no argument 'mots'; did you mean 'most'?"),
    ],
)
def test_args_are_checked_before_a_run(folder: Path, name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(RewardError) as caught:
        check_reward(RewardSettings(name=name, args=args), base_path=folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_args_that_fit_are_taken(folder: Path) -> None:
    for name, args in (
        ("code", {"partial": True}),
        ("length", {"cache_tokens": 8}),
        ("mine.py:short", {"most": 1}),
        ("mine.py:later", {"anything": 1}),
    ):
        assert callable(check_reward(RewardSettings(name=name, args=args), base_path=folder))
