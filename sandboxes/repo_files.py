"""The files of a repository judge: which of an agent's files count, and pytest as an archive to run them with."""

import functools
import importlib.metadata
import importlib.util
import io
import marshal
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from cispo.errors import SandboxError

PYTEST_PACKAGES = ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments")
# Of pygments, which is large, pytest needs these at its start, and the tables that list the rest.
NEEDED_OF_PYGMENTS = frozenset({"__init__.py", "_mapping.py", "terminal.py", "diff.py", "python.py"})
# Files that steer Python or pytest, whoever asks for them.
STEERING_NAMES = frozenset({
    "conftest.py", "pytest.ini", ".pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml", "sitecustomize.py",
    "usercustomize.py", "pyvenv.cfg",
})  # fmt: skip
STEERING_FOLDERS = frozenset({".git", "__pycache__", "tests", "test", "testing"})
STEERING_SUFFIXES = frozenset({".pth", ".pyc", ".pyo", ".so", ".pyd"})


def allowed_files(
    base_files: Mapping[str, str], agent_files: Mapping[str, str], hidden_tests: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Those of the agent's files that count, to be laid over the base, and the names of those that do not."""
    own_names = {PurePosixPath(name).parts[0].removesuffix(".py") for name in base_files}
    allowed = {name: text for name, text in agent_files.items() if _is_allowed(name, own_names, hidden_tests)}
    return allowed, sorted(set(agent_files) - set(allowed))


def conftests_of(base_files: Mapping[str, str], hidden_tests: Mapping[str, str]) -> dict[str, str]:
    """The base's conftest.py files in the folders of the hidden tests and above them; no agent can change those."""
    folders = {folder for name in hidden_tests for folder in PurePosixPath(name).parents}
    paths = {name: PurePosixPath(name) for name in base_files}
    found = [name for name, path in paths.items() if path.name == "conftest.py" and path.parent in folders]
    return {name: base_files[name] for name in found}


def _is_allowed(name: str, own_names: set[str], hidden_tests: Mapping[str, str]) -> bool:
    path = PurePosixPath(name)
    is_inside = is_plain_path(name) and name not in hidden_tests
    if not is_inside or path.name in STEERING_NAMES or path.suffix in STEERING_SUFFIXES:
        return False
    if STEERING_FOLDERS & set(path.parts) or path.name.startswith("test_") or path.stem.endswith("_test"):
        return False
    top = path.parts[0].removesuffix(".py")
    return top in own_names or (top not in sys.stdlib_module_names and top not in PYTEST_PACKAGES)


def is_plain_path(name: str) -> bool:
    """Whether it is a relative path in its normal form."""
    path = PurePosixPath(name)
    is_normal = str(path) == name and not path.is_absolute() and ".." not in path.parts and bool(path.parts)
    return is_normal and "\0" not in name and "\\" not in name and name.isprintable()


@functools.cache
def pytest_archive() -> bytes:
    """The pytest of this interpreter as a zip archive that Python can import, compiled for its own version.

    Raises SandboxError when pytest is not installed here.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in PYTEST_PACKAGES:
            for name, path in _sources(package):
                source = path.read_bytes()
                archive.writestr(name, source)
                archive.writestr(f"{name}c", _compiled(source, name))
        for name in ("pytest", "pluggy"):  # they look up their own versions
            version = importlib.metadata.version(name)
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            archive.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
    return buffer.getvalue()


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SandboxError(f"judge_repo needs the package {package}, which is not installed; run: pip install pytest")
    folder = Path(spec.origin).parent
    if spec.submodule_search_locations is None:
        yield f"{package}.py", Path(spec.origin)
        return
    for path in sorted(folder.rglob("*.py")):
        is_detail = package == "pygments" and path.parent != folder
        if is_detail and path.name not in NEEDED_OF_PYGMENTS:
            continue
        yield path.relative_to(folder.parent).as_posix(), path


def _compiled(source: bytes, name: str) -> bytes:
    """Bytecode that the importer takes without a look at dates; where the version differs it takes the source."""
    code = compile(source, name, "exec", dont_inherit=True)
    unchecked_hash = (1).to_bytes(4, "little")
    return importlib.util.MAGIC_NUMBER + unchecked_hash + importlib.util.source_hash(source) + marshal.dumps(code)
