"""Imports point one way, nothing heavy loads early, and no top-level folder is imported under its own name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "model", "rewards", "sandboxes", "recipes")
LEAVES = {"cispo", "cispo.types", "cispo.errors"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "model": {"model", "kernels"},
    "sandboxes": {"sandboxes"},
    "rewards": {"rewards", "sandboxes"},
    "recipes": {"recipes", "rewards"},
}


def source_files() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder in ("cispo", *FOLDERS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            # The links in cispo/ lead to the top-level folders, which are walked by themselves.
            inside = path.relative_to(ROOT)
            if "__pycache__" in inside.parts or (folder == "cispo" and inside.parts[1] in FOLDERS):
                continue
            parts = inside.with_suffix("").parts
            name = ".".join(parts if folder == "cispo" else ("cispo", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = source_files()


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports, those inside functions too unless `at_import_only`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in at_module_scope(tree) if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_module_scope(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_module_scope(node)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_what_lies_below_it(folder: str) -> None:
    upward = []
    for name, path in SOURCES.items():
        if not f"{name}.".startswith(f"cispo.{folder}."):
            continue
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] != "cispo" or imported in LEAVES or ".".join(parts[:2]) in LEAVES:
                continue
            if len(parts) > 1 and parts[1] not in MAY_IMPORT[folder]:
                upward.append(f"{name} imports {imported}")
    assert not upward


@pytest.mark.parametrize("leaf", ["cispo.types", "cispo.errors"])
def test_leaves_import_nothing_of_ours(leaf: str) -> None:
    ours = [name for name in imports(SOURCES[leaf]) if name.split(".")[0] == "cispo" and name not in LEAVES]
    assert not [name for name in ours if ".".join(name.split(".")[:2]) not in LEAVES]


def test_folders_are_imported_through_the_package_only() -> None:
    files = [*SOURCES.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path)
        if name.split(".")[0] in FOLDERS
    ]
    assert not wrong


def test_nothing_imports_transformers_at_module_scope() -> None:
    assert not [name for name, path in SOURCES.items() if "transformers" in set(imports(path, at_import_only=True))]


def test_every_folder_is_a_package_and_every_link_leads_to_its_folder() -> None:
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").is_file()
        assert (ROOT / "cispo" / folder).resolve() == ROOT / folder


def test_kernels_package_is_one_docstring() -> None:
    # transformers imports a `kernels` that it finds in the working directory: that must have no effect.
    (only,) = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)


@pytest.mark.parametrize(
    "module",
    [
        "cispo",
        "cispo.types",
        "cispo.errors",
        "cispo.cli",
        "cispo.recipe",
        "cispo.run_folder",
        "cispo.model",
        "cispo.kernels",
        "cispo.rewards",
        "cispo.sandboxes",
        "cispo.recipes",
    ],
)
def test_importing_it_loads_neither_torch_nor_ray(module: str) -> None:
    program = f"import sys, {module}; sys.exit(any(heavy in sys.modules for heavy in ('torch', 'ray')))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_files_stay_readable_in_one_sitting() -> None:
    long = {name: lines for name, path in SOURCES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
