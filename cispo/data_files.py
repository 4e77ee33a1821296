"""Where a data set lies, and its rows as plain dicts: JSON Lines (also gzipped), JSON, Parquet, reasoning-gym, the hub.

Local files are read here, in file order; `datasets` (slow to import) is loaded for the hub alone. Every mistake is a
DataError that names the place, `file:line` in JSON Lines.
"""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cispo.errors import DataError
from cispo.reasoning_gym_rows import PREFIX, GymTask, parse_gym_path, read_gym
from cispo.resources import BUNDLED, PACKAGE, resolve_path

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class RawRow:
    """One row as its file has it; `place` says where, for messages."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class HubName:
    """A data set of the Hugging Face hub, "gsm8k" or "openai/gsm8k", since nothing lies at `place`."""

    name: str
    place: Path


def find_source(path: str, split: str | None, *, base_path: Path) -> Path | GymTask | HubName:
    """The local file or task of reasoning-gym that `path` and `split` mean, or the hub name if nothing local is meant.

    A path that exists is local, and so is one with a data file's suffix, a leading `.`, `/`, `~` or `bundled:`. Raises
    DataError if a local file is not there, or if a folder does not say which file is meant.
    """
    if path.startswith(PREFIX):
        return parse_gym_path(path, split)
    place = resolve_path(path, base_path=base_path)
    if place.is_dir():
        return _file_in_folder(place, split)
    if place.is_file():
        if not place.name.endswith(SUFFIXES):
            raise DataError(f"{place} is no data file; its name must end in one of {', '.join(SUFFIXES)}")
        if split is not None:
            raise DataError(f"data.split is {split!r}, but {place} is one file; leave data.split out")
        return place
    if path.startswith((".", "/", "~", BUNDLED, PACKAGE)) or path.endswith(SUFFIXES) or not HUB_NAME.fullmatch(path):
        raise DataError(f"there is no file {place}; {_nearest(place, path)}")
    return HubName(path, place)


def read_rows(file: Path | GymTask) -> Iterator[RawRow]:
    """The rows of a local file, in its order, or of a task."""
    if isinstance(file, GymTask):
        return (RawRow(place, values) for place, values in read_gym(file))
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_jsonl(file)
    return _read_json(file) if file.suffix == ".json" else _read_parquet(file)


def read_hub(source: HubName, subset: str | None, split: str, limit: int | None) -> Iterator[RawRow]:
    """The rows of a data set of the hub, downloaded once into the cache of `datasets`."""
    import datasets  # type: ignore[import-untyped]  # it has no annotations

    try:
        data = datasets.load_dataset(source.name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"the data set {source.name!r} (subset {subset!r}, split {split!r}) cannot be loaded from the hub: "
            f"{reason}; check name, subset and split there, or name a local file (there is none at {source.place})"
        ) from error
    for index, row in enumerate(itertools.islice(data, limit)):
        yield RawRow(f"{source.name} row {index}", dict(row))


def near(name: str, names: list[str]) -> str:
    """"; did you mean 'x'?" where one of `names` is close, else nothing."""
    found = get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _file_in_folder(folder: Path, split: str | None) -> Path:
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    names = ", ".join(file.name for file in files) or f"no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
    fitting = [file for file in files if split is None or file.name in {split + suffix for suffix in SUFFIXES}]
    if len(fitting) != 1:
        wanted = "one data file" if split is None else f"one data file for data.split {split!r}"
        raise DataError(f"{folder} does not hold just {wanted} (it has {names}); name a file in data.path")
    return fitting[0]


def _nearest(place: Path, path: str) -> str:
    if not place.parent.is_dir():
        return f"there is no folder {place.parent} either; mend data.path ({path!r})"
    names = sorted(entry.name for entry in place.parent.iterdir())
    return f"mend data.path ({path!r}){near(place.name, names)}"


def _read_jsonl(file: Path) -> Iterator[RawRow]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for number in itertools.count(1):
            try:
                line = lines.readline()
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{file}: not readable as gzip ({error}); compress it anew") from error
            if not line:
                return
            if line.strip():
                yield RawRow(f"{file}:{number}", _parse_object(line, f"{file}:{number}"))


def _parse_object(line: bytes, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error}); write one JSON object a line") from error
    return _as_row(values, place)


def _as_row(values: object, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{place}: a row must be a JSON object, got {type(values).__name__}")
    return values


def _read_json(file: Path) -> Iterator[RawRow]:
    try:
        rows = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        hint = "; if it has one object a line, its name must end in .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{file}:{error.lineno}: not valid JSON ({error.msg}){hint}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}); write a list of objects in UTF-8") from error
    if not isinstance(rows, list):
        raise DataError(f"{file}: must hold a list of objects, got {type(rows).__name__}; write [{{...}}, ...]")
    for index, row in enumerate(rows):
        place = f"{file} row {index}"
        yield RawRow(place, _as_row(row, place))


def _read_parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow as arrow  # type: ignore[import-untyped]  # it has no annotations
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]  # it has no annotations

    try:
        with parquet.ParquetFile(file) as table:
            index = itertools.count()
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    yield RawRow(f"{file} row {next(index)}", row)
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} is not readable as Parquet ({reason}); write it anew") from error
