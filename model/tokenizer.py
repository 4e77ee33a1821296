"""Text to token ids and back, and the chat rendering of a prompt, from a policy folder's own files.

`tokenizer.json` holds the vocabulary; `tokenizer_config.json` names the end-of-sequence token and the Jinja chat
template, which may also be a file of its own, `chat_template.jinja`. Ids that came from the policy are never re-encoded
from text.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from cispo.errors import CheckpointError
from cispo.model.text_stream import TextDecoder, encode_pieces

Message = Mapping[str, Any]
"""`role` (system, user, assistant, tool) and `content`, as text or as the list of parts that some templates ask for."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE_FILE = "chat_template.jinja"


def count_ids(path: Path | str) -> int | None:
    """One more than the largest id that the tokenizer of a policy folder gives; None where it has no tokenizer."""
    file = Path(path) / TOKENIZER_FILES[0]
    if not file.is_file():
        return None
    return 1 + max(_read_vocabulary(file).get_vocab(with_added_tokens=True).values(), default=-1)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """The tokenizer of one policy folder."""

    _tokenizer: tokenizers.Tokenizer
    _template: jinja2.Template
    _template_place: Path
    _special: dict[str, str]
    _takes_parts: bool
    eos_id: int
    path: Path

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read the files of a policy folder; CheckpointError names what is missing and what to do."""
        path = Path(path)
        missing = [name for name in TOKENIZER_FILES if not (path / name).is_file()]
        if missing:
            raise CheckpointError(f"{path} has no {' and no '.join(missing)}; copy the tokenizer of the policy there")
        config = _read_object(path / TOKENIZER_FILES[1])
        place, source = _template_source(path, config)
        tokenizer = _read_vocabulary(path / TOKENIZER_FILES[0])
        special = {key: _token_text(config[key]) for key in ("bos_token", "eos_token") if config.get(key)}
        eos_id = tokenizer.token_to_id(special.get("eos_token", ""))
        if eos_id is None:
            raise CheckpointError(f"{path / TOKENIZER_FILES[1]} names no eos_token of the vocabulary; add it")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat_template of {place} is no Jinja template ({error}); restore it") from error
        return cls(tokenizer, template, place, special, _takes_parts(template, special), int(eos_id), path)

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, with no special token added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are dropped."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """The ids of the text that the pieces make up, in lists, without holding all of it."""
        return encode_pieces(self._tokenizer, pieces)

    def text_decoder(self) -> TextDecoder:
        """A decoder of ids as they come, which never splits a character."""
        return TextDecoder(self._tokenizer)

    def render_prompt(self, text: str, earlier: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Token ids of one user message in the chat template, up to where the policy's answer begins.

        earlier: role and content of the messages before it. CheckpointError when the template refuses a message or
        fails on it.
        """
        messages = [*earlier, ("user", text)]
        return self.encode(self.render_messages([{"role": role, "content": content} for role, content in messages]))

    def render_messages(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """A conversation as text in the chat template, up to where the policy's answer begins.

        tools: JSON schemas of functions the policy may call, for templates that know of tools. Templates that read
        content as a list of parts (MiniMax-M1's) get it as one. CheckpointError when the template fails on a message.
        """
        if self._takes_parts:
            messages = [_with_parts(message) for message in messages]
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=True, **self._special)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            roles = ", ".join(dict.fromkeys(str(message.get("role")) for message in messages))
            raise CheckpointError(
                f"the chat_template of {self._template_place} fails on a {roles} message ({error}); mend it"
            ) from error

    def save(self, path: Path | str) -> None:
        """Copy the tokenizer's files into another policy folder."""
        for name in (*TOKENIZER_FILES, TEMPLATE_FILE):
            if (self.path / name).is_file() and (self.path / name).resolve() != (Path(path) / name).resolve():
                shutil.copyfile(self.path / name, Path(path) / name)


def _template_source(path: Path, config: Mapping[str, Any]) -> tuple[Path, str]:
    """The chat template and the file it stands in: its own, or the settings, as text or as a list of named ones."""
    if (path / TEMPLATE_FILE).is_file():
        return path / TEMPLATE_FILE, (path / TEMPLATE_FILE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path} has no {TEMPLATE_FILE} and its {TOKENIZER_FILES[1]} no chat_template as text; add the policy's own"
        )
    return path / TOKENIZER_FILES[1], template


def _takes_parts(template: jinja2.Template, special: Mapping[str, str]) -> bool:
    """Whether a template reads `content` as a list of {"type": "text", "text": ...} rather than as text."""
    probe: Message = {"role": "user", "content": "probe"}

    def shows(message: Message) -> bool:
        try:
            return "probe" in template.render(messages=[message], add_generation_prompt=True, **special)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError):
            return False

    return not shows(probe) and shows(_with_parts(probe))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """As chat templates mean it; the template library's own escapes what would be unsafe within HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _read_object(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); restore it from its source") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds a {type(config).__name__}, no object of keys; restore it from its source")
    return config


def _read_vocabulary(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
        raise CheckpointError(f"{file} is no tokenizer ({error}); restore it from its source") from error


def _token_text(token: Any) -> str:
    """Hugging Face writes a special token as text or as an object with its text under `content`."""
    return str(token["content"] if isinstance(token, dict) else token)
