"""The wheel holds every package, the recipes with their data and the bundled policy, and works from anywhere."""

import ast
import os
import re
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


def tracked_files() -> list[str]:
    """Files that belong to the project, whether committed yet or not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def in_package(name: str) -> str:
    """The path of a file of the tree inside the installed package."""
    return name if name.startswith("cispo/") else f"cispo/{name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project's files, built without network from a copy, so that nothing stale gets in."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    files = tracked_files()
    links = [f"cispo/{folder}" for folder in FOLDERS]
    subprocess.run(["tar", "-cf", str(copy / "tree.tar"), *files, *links], cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", "tree.tar"], cwd=copy, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*command, "-w", str(out)], cwd=copy, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_listed_packages_are_those_of_the_tree() -> None:
    found = {
        in_package(name).removesuffix("/__init__.py").replace("/", ".")
        for name in tracked_files()
        if name.endswith("/__init__.py") and name.split("/")[0] in ("cispo", *FOLDERS)
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_code_is_a_package() -> None:
    folders = {str(Path(name).parent) for name in tracked_files() if name.endswith(".py")}
    ours = [folder for folder in folders if folder.split("/")[0] in ("cispo", *FOLDERS)]
    # Plugins are files that a recipe names, not modules.
    assert not [name for name in ours if "plugins" not in name and not (ROOT / name / "__init__.py").is_file()]


def test_version_comes_from_one_place() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cispo.__version__"}


def test_every_import_is_a_declared_dependency() -> None:
    declared = {normal(re.split(r"[\[><=~! ]", item)[0]) for item in PYPROJECT["project"]["dependencies"]}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in declared}
    foreign: dict[str, str] = {}
    for name in tracked_files():
        if not name.endswith(".py") or name.split("/")[0] not in ("cispo", *FOLDERS):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            foreign |= {module.split(".")[0]: name for module in modules}
    # Triton comes with the CUDA build of torch, which pins it; pydantic_core with pydantic.
    unknown = set(foreign) - known - set(sys.stdlib_module_names) - {"cispo", "triton", "pydantic_core"}
    assert not {module: foreign[module] for module in unknown}


def test_pins_cover_what_is_declared_and_leave_cuda_to_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["project"]["optional-dependencies"]["dev"]]
    assert {normal(re.split(r"[\[><=~! ]", item)[0]) for item in wanted} <= {normal(name) for name in pins}
    assert pins["torch"] == "2.13.0" and pins["ray"] == "2.60.0"
    assert not [name for name in pins if normal(name).startswith(("triton", "nvidia", "cuda"))]
    assert not [version for version in pins.values() if "+" in version], "a local build is not to be had elsewhere"


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        in_package(name)
        for name in tracked_files()
        if name.split("/")[0] in ("cispo", *FOLDERS) and not name.endswith(".md")
    }
    assert wanted <= inside
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


def test_make_needs_no_second_setup() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^\$\(STAMP\): pyproject\.toml constraints\.txt$", makefile, re.MULTILINE)
