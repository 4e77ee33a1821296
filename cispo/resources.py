"""Files that come with the package: recipes, their data and the bundled policies, found from any working directory."""

import os
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from cispo.errors import RecipeError

BUNDLED = "bundled:"
"""Prefix of a policy path or data path that names something in the package instead of a file of the user's."""


def recipes_folder() -> Path:
    """The folder of the packaged recipes."""
    return Path(str(files("cispo.recipes")))


def packaged_recipes() -> dict[str, Path]:
    """Every packaged recipe by name, in alphabetical order."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The recipe file that `name` means: a file at that path, else the packaged recipe of that name.

    `code`, `code.yaml` and `recipes/code.yaml` all name the packaged recipe where no such file lies at hand. Raises
    RecipeError with the nearest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    is_packaged_form = path.parent in (Path("."), Path("recipes")) and path.suffix in ("", ".yaml")
    if is_packaged_form and path.stem in packaged:
        return packaged[path.stem]
    if path.is_dir():
        raise RecipeError(f"{name} is a folder; name a recipe file in it, or one of: {', '.join(packaged)}")
    near = get_close_matches(path.stem, packaged, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "`cispo recipes` lists those that come with the package"
    raise RecipeError(f"{name}: no such recipe file; {hint}")


def resolve_policy(path: str, *, base_path: Path) -> Path:
    """The folder that a recipe's `policy.path` means; it need not exist. `bundled:tiny` is the packaged policy."""
    if path.startswith(BUNDLED):
        return Path(str(files("cispo.model"))) / "assets" / path.removeprefix(BUNDLED)
    return resolve_path(path, base_path=base_path)


def resolve_path(path: str, *, base_path: Path) -> Path:
    """The file or folder that a path in a recipe means: relative to `base_path`, then to the working directory.

    `bundled:code/train.jsonl` lies in the data folder of the packaged recipes. Where nothing exists, the first place
    that was tried is returned, absolute.
    """
    if path.startswith(BUNDLED):
        return recipes_folder() / "data" / path.removeprefix(BUNDLED)
    first = Path(os.path.abspath(base_path / Path(path).expanduser()))
    second = Path(os.path.abspath(path))
    return second if second.exists() and not first.exists() else first
