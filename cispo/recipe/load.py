"""Reading a recipe: file and overrides in, checked settings out, or every mistake at once."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cispo.errors import RecipeError
from cispo.recipe import check
from cispo.recipe.document import Mistake, SectionNode, apply_overrides, read_document
from cispo.recipe.schema import TrainRecipe
from cispo.recipe.sft_schema import SftRecipe
from cispo.recipe.validate import origin_of, raise_mistakes, validate
from cispo.resources import find_recipe

Recipe = TypeVar("Recipe", TrainRecipe, SftRecipe)


@dataclass(frozen=True, slots=True)
class LoadedRecipe(Generic[Recipe]):
    """A recipe and where each of its values was written."""

    recipe: Recipe
    path: Path
    written: SectionNode


def load_train_recipe(name: str | Path, overrides: Sequence[str] = ()) -> TrainRecipe:
    """The recipe of `cispo train`, its files checked as well; `name` is a path or a packaged recipe.

    Overrides are `section.key=value`. Raises RecipeError with one line for each mistake.
    """
    return load_train(name, overrides).recipe


def load_sft_recipe(name: str | Path, overrides: Sequence[str] = ()) -> SftRecipe:
    """The recipe of `cispo sft`, as `load_train_recipe`."""
    return load_sft(name, overrides).recipe


def load_train(name: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe[TrainRecipe]:
    """As `load_train_recipe`, with the places where values were written."""
    return _checked(read_recipe(name, overrides, TrainRecipe), check.train_mistakes)


def load_evaluation(name: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe[TrainRecipe]:
    """As `load_train`, for `cispo eval`: training data need not be there, the section `evaluation` must."""
    return _checked(read_recipe(name, overrides, TrainRecipe), check.evaluation_mistakes)


def load_sft(name: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe[SftRecipe]:
    """As `load_sft_recipe`, with the places where values were written."""
    return _checked(read_recipe(name, overrides, SftRecipe), check.sft_mistakes)


def read_recipe(name: str | Path, overrides: Sequence[str], settings: type[Recipe]) -> LoadedRecipe[Recipe]:
    """The recipe without a look at the files that it names."""
    path = find_recipe(str(name))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error}); name a YAML file") from error
    document = read_document(text, _shown(path))
    if document.mistakes:
        raise_mistakes(document.mistakes)
    apply_overrides(document, overrides)
    recipe = validate(document, settings)
    base_path = Path(os.path.abspath(path.parent))
    if "base_path" in document.root.entries:
        base_path = Path(os.path.abspath(base_path / recipe.base_path))
    return LoadedRecipe(recipe.model_copy(update={"base_path": base_path}), path, document.root)


def _shown(path: Path) -> str:
    """The path as messages name it: short where it lies below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _checked(loaded: LoadedRecipe[Recipe], find: Callable[[Recipe], list[check.FileMistake]]) -> LoadedRecipe[Recipe]:
    found = find(loaded.recipe)
    if found:
        raise_mistakes([Mistake(origin_of(loaded.written, path), path, text) for path, text in found])
    return loaded
