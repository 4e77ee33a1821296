"""From the name of a reward in a recipe to its function, with errors of one line that say what there is instead."""

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ValidationError

from cispo.errors import RewardError
from cispo.rewards.answer_format import AnswerFormatArgs, answer_format
from cispo.rewards.code import CodeArgs, FormatArgs, code, format_reward
from cispo.rewards.language import LanguageArgs, language
from cispo.rewards.length import LengthArgs, length
from cispo.rewards.math_reward import MathArgs, math_reward
from cispo.rewards.model_graded import JudgeArgs, judge_reward
from cispo.rewards.reasoning_gym_reward import ReasoningGymArgs, reasoning_gym
from cispo.rewards.settings import RewardSettings

ENTRY_POINT_GROUP = "cispo.rewards"
BUILT_INS: dict[str, tuple[Callable[..., Any], type[BaseModel]]] = {
    "code": (code, CodeArgs),
    "format": (format_reward, FormatArgs),
    "answer_format": (answer_format, AnswerFormatArgs),
    "judge": (judge_reward, JudgeArgs),
    "language": (language, LanguageArgs),
    "length": (length, LengthArgs),
    "math": (math_reward, MathArgs),
    "reasoning_gym": (reasoning_gym, ReasoningGymArgs),
}

# Called with all completions of a group at once, and with the sandbox itself.
GROUP_BUILT_INS = frozenset({"reasoning_gym"})


def resolve_reward(name: str, *, base_path: Path) -> Callable[..., Any]:
    """The function called `name`: a built-in, `file.py:function` (relative to base_path), `package.module:function`, or
    an entry point of the group `cispo.rewards`.

    Runs the user's module, but starts no sandbox. Raises RewardError, one line, when there is no such function or when
    it cannot be called with a prompt and a completion.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon:
        function = BUILT_INS[name][0] if name in BUILT_INS else _from_entry_point(name)
    elif place.endswith(".py"):
        function = _attribute(_import_file(name, (base_path / place).resolve()), attribute, name)
    else:
        function = _attribute(_import_module(name, place), attribute, name)
    _check_callable(name, function)
    return function


def check_reward(settings: RewardSettings, *, base_path: Path) -> Callable[..., Any]:
    """resolve_reward, and a check that the function takes the settings' args. Raises RewardError, one line."""
    function = resolve_reward(settings.name, base_path=base_path)
    if settings.name in BUILT_INS:
        _check_built_in_args(settings)
        return function
    if takes_all_columns(function):
        return function
    known = [parameter.name for parameter in keyword_parameters(function)]
    for key in settings.args:
        if key not in known:
            raise RewardError(f"reward {settings.name!r} takes no argument {key!r}; {_instead(key, known)}")
    return function


def keyword_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters beyond prompt and completion that can be given by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(function).parameters.values())
    positional = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    return [parameter for parameter in parameters if parameter not in positional[:2] and parameter.kind in named]


def takes_all_columns(function: Callable[..., Any]) -> bool:
    """Whether the function ends in `**row`."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values())


def one_line(value: object) -> str:
    """The text of anything, in one line; even of what fails to say what it is.

    Control characters are written as escapes: an error may quote a completion, and goes to terminals.
    """
    try:
        text = " ".join(str(value).split())
    except Exception:  # the value is a user's own, and its __str__ may raise anything
        return f"a {type(value).__name__} that cannot be shown"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def describe_error(error: BaseException, file: str | None = None) -> str:
    """`ValueError: text (file.py:12)`, where the line is the last one of `file` that the error passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = one_line(error) if not isinstance(error, SyntaxError) else f"{error.msg}, line {error.lineno}"
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"


def _from_entry_point(name: str) -> Any:
    found: dict[str, EntryPoint] = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if name not in found:
        hint = f"give {name}:FUNCTION" if name.endswith(".py") else _instead(name, [*BUILT_INS, *found])
        raise RewardError(f"there is no reward {name!r}; {hint}")
    try:
        return found[name].load()
    except Exception as error:
        raise RewardError(
            f"reward {name!r}: the entry point {found[name].value} fails with {describe_error(error)}"
        ) from error


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; the path is relative to the recipe"
        raise RewardError(f"reward {name!r}: there is no file {path}{hint}")
    module_name = f"cispo_reward_{path.stem}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward {name!r}: {path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise RewardError(f"reward {name!r}: importing {path} fails with {describe_error(error, str(path))}") from error
    return module


def _import_module(name: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {name!r}: importing {module} fails with {describe_error(error)}") from error


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    if hasattr(module, attribute):
        return getattr(module, attribute)
    functions = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    place = module.__file__ or module.__name__
    raise RewardError(f"reward {name!r}: {place} has no {attribute!r}; {_instead(attribute, functions)}")


def _instead(wrong: str, known: list[str]) -> str:
    if not known:
        return "it has none"
    near = difflib.get_close_matches(wrong, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}there is {', '.join(sorted(known))}"


def _check_callable(name: str, function: Any) -> None:
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"a {type(function).__name__}"
        raise RewardError(f"reward {name!r} is {kind}, no function; name a function(prompt, completion, **row)")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name!r} has no signature to read ({one_line(error)}); wrap it in a def") from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    if not takes_any and sum(parameter.kind in positional for parameter in parameters) < 2:
        signature = inspect.signature(function)
        raise RewardError(f"reward {name!r} is called with a prompt and a completion, but takes {signature}")


def _check_built_in_args(settings: RewardSettings) -> None:
    model = BUILT_INS[settings.name][1]
    try:
        model.model_validate(settings.args)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = list(model.model_fields)
        if first["type"] == "extra_forbidden":
            hint = _instead(key, known) if known else "it takes none"
            raise RewardError(f"reward {settings.name!r} takes no argument {key!r}; {hint}") from error
        text = first["msg"].removeprefix("Value error, ")
        raise RewardError(f"reward {settings.name!r}: args{'.' if key else ''}{key}: {text}") from error
