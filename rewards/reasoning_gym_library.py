"""What of the package reasoning-gym, and of those it needs, goes into a sandbox to score one task.

The program's user may not be able to read where they are installed, and its Python may be another one. So they are
packed into two archives: the modules that the task imports, with the data files that they name, and the pure Python
packages among their requirements, as compiled as they are here. Nothing of it is imported or run outside.
"""

import ast
import functools
import importlib.util
import io
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cispo.errors import RewardError

PACKAGE = "reasoning_gym"
# Imported by all modules of tasks, directly or through the package's own __init__, which is not run.
ALWAYS = (f"{PACKAGE}.factory", f"{PACKAGE}.coaching")
# What the pure packages among the requirements import in turn, beyond the standard library.
REQUIREMENTS = {"sympy": ("mpmath",), "dateutil": ("six",), "zss": ("six",), "yaml": ()}
PURE = ("sympy", "mpmath", "yaml", "dateutil", "six", "zss", "bfi", "pyfiglet", "pytz", "tabulate")
LEFT_OUT = ("tests", "testing", "benchmarks", "__pycache__")


@dataclass(frozen=True)
class Library:
    """gym, libraries: the two archives. placeholders: imported packages that are in neither."""

    gym: bytes
    libraries: bytes
    placeholders: tuple[str, ...]


@functools.lru_cache(maxsize=64)
def library_of(module: str, python_version: str) -> Library:
    """For the task that `module` defines and a Python such as "3.11.2". RewardError where the package is missing."""
    root = _folder_of(PACKAGE)
    if root is None:
        raise RewardError("the package reasoning-gym is not installed; run: pip install 'cispo[reasoning-gym]'")
    sources, foreign = _closure(root, (module, *ALWAYS))
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    data = [path for path in sorted((root / "data").iterdir()) if any(path.name in text for text in texts.values())]
    tag = f"cpython-{''.join(python_version.split('.')[:2])}"
    pure = {name: folder for name in _with_requirements(foreign) if name in PURE and (folder := _folder_of(name))}
    files = [file for folder in pure.values() for file in _files_of(folder)]
    return Library(
        gym=_archive(((path, path.relative_to(root.parent)) for path in [*sources, *data]), tag),
        libraries=_archive(files, tag),
        placeholders=tuple(sorted(foreign - set(pure))),
    )


def _closure(root: Path, modules: tuple[str, ...]) -> tuple[list[Path], set[str]]:
    """The files of the package that these modules import, and the other packages that those import."""
    found: dict[Path, None] = {}
    foreign: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _file_of(root, name)
        if path is None or path in found:
            continue
        found[path] = None
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _imports(path, package):
            if imported.partition(".")[0] == PACKAGE:
                waiting.append(imported)
            else:
                foreign.add(imported.partition(".")[0])
    return list(found), foreign - set(sys.stdlib_module_names)


def _imports(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if base.startswith(PACKAGE))


def _file_of(root: Path, name: str) -> Path | None:
    """The file of a module; none for the packages of tasks, whose __init__ imports all of them."""
    parts = name.split(".")[1:]
    path = root.joinpath(*parts)
    if path.with_suffix(".py").is_file() and parts:
        return path.with_suffix(".py")
    return path / "__init__.py" if parts and (path / "__init__.py").is_file() and _is_small(path) else None


def _is_small(package: Path) -> bool:
    """Whether importing a package as a whole is meant, and not one of the folders with tasks."""
    return "register_dataset(" not in "".join(file.read_text(encoding="utf-8") for file in package.glob("*.py"))


def _with_requirements(names: set[str]) -> set[str]:
    return names | {needed for name in names for needed in REQUIREMENTS.get(name, ())}


def _folder_of(package: str) -> Path | None:
    """The package's folder, or the file of one that is a single module; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)


def _files_of(folder: Path) -> Iterator[tuple[Path, Path]]:
    if folder.is_file():
        yield folder, Path(folder.name)
        return
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder.parent)
        if path.is_file() and not set(LEFT_OUT) & set(inside.parts) and path.suffix not in (".so", ".pyi", ".pyx"):
            yield path, inside


def _archive(files: "Iterator[tuple[Path, Path]] | list[tuple[Path, Path]]", tag: str) -> bytes:
    """Modules compiled for the tagged Python where they are so installed, else as source; all else as it is."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path, inside in files:
            compiled = path.parent / "__pycache__" / f"{path.stem}.{tag}.pyc"
            if path.suffix == ".py" and compiled.is_file():
                archive.writestr(f"{inside.with_suffix('.pyc')}", compiled.read_bytes())
            else:
                archive.writestr(str(inside), path.read_bytes())
    return buffer.getvalue()
