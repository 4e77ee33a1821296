"""The wheel holds every package, the recipes with their data and the bundled policy, and works from anywhere."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import cispo

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "model", "rewards", "sandboxes", "recipes")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMPORT_NAMES = {"pyyaml": "yaml"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def package_files() -> list[str]:
    """Every file of the package by its place in the tree."""
    found = []
    for folder in ("cispo", *FOLDERS):
        # The links in cispo/ are not followed: what they lead to is walked by itself.
        for place, below, names in os.walk(ROOT / folder):
            below[:] = [name for name in below if name != "__pycache__"]
            found += [str((Path(place) / name).relative_to(ROOT)) for name in names]
    return sorted(found)


def in_package(name: str) -> str:
    """The path of a file of the tree inside the installed package."""
    return name if name.startswith("cispo/") else f"cispo/{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project's files, built without network from a copy, so that nothing stale gets in."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    links = [f"cispo/{folder}" for folder in FOLDERS]
    metadata = [name for name in ("pyproject.toml", "LICENSE", "README.md") if (ROOT / name).exists()]
    files = [*package_files(), *links, *metadata]
    subprocess.run(["tar", "-cf", str(copy / "tree.tar"), *files], cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", "tree.tar"], cwd=copy, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*command, "-w", str(out)], cwd=copy, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_listed_packages_are_those_of_the_tree() -> None:
    found = [name for name in package_files() if name.endswith("/__init__.py")]
    names = {in_package(name).removesuffix("/__init__.py").replace("/", ".") for name in found}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names


def test_every_folder_with_code_is_a_package() -> None:
    folders = {Path(name).parent for name in package_files() if name.endswith(".py")}
    # Plugins are files that a recipe names, not modules.
    folders.discard(Path("recipes/plugins"))
    assert not [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()]


def test_version_comes_from_one_place() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cispo.__version__"}


def test_every_import_is_a_declared_dependency() -> None:
    # What an extra brings is imported where it is needed, and its absence has a message of its own.
    project = PYPROJECT["project"]
    items = [*project["dependencies"], *project["optional-dependencies"]["plot"]]
    declared = {normal(re.split(r"[\[><=~! ]", item)[0]) for item in items}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}
    foreign: dict[str, str] = {}
    for name in package_files():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            foreign |= {module.split(".")[0]: name for module in modules}
    # pydantic_core comes with pydantic.
    unknown = set(foreign) - known - set(sys.stdlib_module_names) - {"cispo", "pydantic_core"}
    assert not {module: foreign[module] for module in unknown}


def test_pins_cover_what_is_declared_and_leave_cuda_to_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["project"]["optional-dependencies"]["dev"]]
    # The CUDA build of torch pins a Triton of its own, so this project must not.
    declared = {normal(re.split(r"[\[><=~! ]", item)[0]) for item in wanted} - {"triton"}
    assert declared <= {normal(name) for name in pins}
    assert pins["torch"] == "2.13.0" and pins["ray"] == "2.60.0"
    assert not [name for name in pins if normal(name).startswith(("triton", "nvidia", "cuda"))]
    assert not [version for version in pins.values() if "+" in version], "a local build is not to be had elsewhere"


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {in_package(name) for name in package_files()} <= inside
    assert {"cispo/py.typed", "cispo/recipes/code.yaml", "cispo/kernels/__init__.py"} <= inside
    top_level = {name.split("/")[0] for name in inside}
    assert top_level == {"cispo", f"cispo-{cispo.__version__}.dist-info"}


def test_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    listed = subprocess.run(
        [str(site / "bin" / "cispo"), "recipes"], cwd=here, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert listed.startswith("code ")
    program = (
        "from cispo.resources import find_recipe, resolve_policy\n"
        "from pathlib import Path\n"
        "print(find_recipe('code'), resolve_policy('bundled:tiny', base_path=Path('.')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=here, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert found.split() == [f"{site}/cispo/recipes/code.yaml", f"{site}/cispo/model/assets/tiny"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment whose programs only note how they are called."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "cispo", "bwrap"):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n')
        program.chmod(0o755)
    return tmp_path


def make(clone: Path, *words: str) -> list[str]:
    """What a `make` calls."""
    # bwrap is found on any machine, so that nothing is installed here.
    environment = {**os.environ, "PATH": f"{clone}/.venv/bin:{os.environ['PATH']}"}
    (clone / "calls").write_text("")
    subprocess.run(["make", *words, "PYTHON=false"], cwd=clone, env=environment, check=True, capture_output=True)
    return (clone / "calls").read_text().splitlines()


def test_make_sets_up_once_and_again_when_pins_change(clone: Path) -> None:
    (call,) = make(clone, "setup")
    assert call.startswith("python -m pip install") and call.endswith("-c constraints.txt -e .[dev]")
    assert make(clone) == []
    later = (clone / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(clone / "constraints.txt", (later, later))
    assert len(make(clone, "setup")) == 1


def test_make_train_takes_the_next_free_name(clone: Path) -> None:
    make(clone, "setup")
    calls = []
    for name in ("code", "code-2", "code-3"):
        calls += make(clone, "train")
        (clone / "runs" / name).mkdir(parents=True)
    assert calls == [f"cispo train recipes/code.yaml --name {name}" for name in ("code", "code-2", "code-3")]
    assert make(clone, "train", "RUN=mine") == ["cispo train recipes/code.yaml --name mine"]
