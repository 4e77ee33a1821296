"""From text to typed values, by what each setting declares, with every mistake noted instead of raised.

Rules: a number is a number in any spelling (`1e-6` too), a boolean is `true` or `false` and nothing else, text stays as
it was written (`on`, `1e3`), null is an unquoted `null`, `~` or nothing, a choice must be one of its values. Where a
setting declares no type (the `args` of a reward), unquoted text is read as null, a boolean or a number if it looks
like one.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cispo.recipe import declared
from cispo.recipe.document import (
    COMMAND_LINE,
    ListNode,
    Mistake,
    Node,
    ScalarNode,
    SectionNode,
    SettingPath,
    is_null,
    parse_fragment,
)

WHOLE = re.compile(r"[-+]?\d+(_\d+)*")
NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.?inf(inity)?", re.IGNORECASE)
BOOLEANS = {"true": True, "false": False}
SCALAR_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
REFUSED = object()
"""Stands for a value that could not be converted: no setting accepts it, and its mistake is noted already."""


def convert_section(
    node: Node, settings: declared.SettingsClass, path: SettingPath, mistakes: list[Mistake]
) -> dict[str, Any] | object:
    """The entries of a section as typed values by name, ready for validation by `settings`."""
    section = _as_section(node)
    if section is None:
        mistakes.append(Mistake(node.origin, path, f"expected a section of settings, got {_shown(node)}"))
        return REFUSED
    values: dict[str, Any] = {}
    for name, entry in section.entries.items():
        field = settings.model_fields.get(name)
        if field is None:
            text = f"no such setting; {nearest(name, settings.model_fields)}"
            mistakes.append(Mistake(entry.origin, (*path, name), text))
            continue
        values[name] = convert(entry, field.annotation, (*path, name), mistakes)
    return values


def convert(node: Node, annotation: Any, path: SettingPath, mistakes: list[Mistake]) -> Any:
    """The value of `node` as `annotation` declares it."""
    types, allows_null = declared.members(annotation)
    if allows_null and is_null(node):
        return None
    classes = declared.settings_classes(annotation)
    if len(classes) == 1:
        return convert_section(node, classes[0], path, mistakes)
    if classes:
        return _convert_tagged(node, classes, path, mistakes)
    if types == [Any]:
        return _infer(node)
    container = next((kind for kind in types if _is_container(kind)), None)
    if container is not None and not (len(types) > 1 and isinstance(node, ScalarNode)):
        return _convert_container(node, container, path, mistakes)
    return _convert_scalar(node, [kind for kind in types if not _is_container(kind)], path, mistakes)


def nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """`did you mean 'betas'?`, or what there is to choose from; initials count, as `lr` for `learning_rate`."""
    initials = {"".join(part[:1] for part in key.split("_")): key for key in known}
    near = [initials[name]] if name in initials else get_close_matches(name, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else f"there is {', '.join(sorted(known))}"


def _convert_tagged(
    node: Node, classes: list[declared.SettingsClass], path: SettingPath, mistakes: list[Mistake]
) -> dict[str, Any] | object:
    section = _as_section(node)
    if section is None:
        return convert_section(node, classes[0], path, mistakes)
    tag, by_tag = declared.tag_name(classes), declared.tagged_classes(classes)
    entry = section.entries.get(tag)
    if not isinstance(entry, ScalarNode):
        origin = entry.origin if entry else section.origin
        mistakes.append(Mistake(origin, (*path, tag), f"is not set; choose one of {', '.join(by_tag)}"))
        return REFUSED
    if entry.text not in by_tag:
        mistakes.append(Mistake(entry.origin, (*path, tag), _not_a_choice(entry.text, list(by_tag))))
        return REFUSED
    return convert_section(section, by_tag[entry.text], path, mistakes)


def _convert_container(node: Node, kind: Any, path: SettingPath, mistakes: list[Mistake]) -> Any:
    node = _parsed(node)
    if _is_mapping(kind):
        section = _as_section(node)
        if section is None:
            mistakes.append(Mistake(node.origin, path, f"expected `key: value` pairs, got {_shown(node)}"))
            return REFUSED
        inner = declared.value_type(kind)
        return {key: convert(entry, inner, (*path, key), mistakes) for key, entry in section.entries.items()}
    if not isinstance(node, ListNode):
        mistakes.append(Mistake(node.origin, path, f"expected a list, such as [a, b], got {_shown(node)}"))
        return REFUSED
    return [convert(item, declared.item_type(kind, i), (*path, i), mistakes) for i, item in enumerate(node.items)]


def _convert_scalar(node: Node, types: list[Any], path: SettingPath, mistakes: list[Mistake]) -> Any:
    if not isinstance(node, ScalarNode):
        mistakes.append(Mistake(node.origin, path, f"expected {_type_names(types)}, got {_shown(node)}"))
        return REFUSED
    if is_null(node):
        mistakes.append(Mistake(node.origin, path, f"expected {_type_names(types)}, got {_shown(node)}"))
        return REFUSED
    # Text would accept everything, so it is tried last.
    for kind in sorted(types, key=lambda kind: kind is str):
        value = _read_scalar(node.text, kind)
        if value is not REFUSED:
            return value
    choices = [str(choice) for kind in types for choice in _choices(kind)]
    text = _not_a_choice(node.text, choices) if choices else f"expected {_type_names(types)}, got {_shown(node)}"
    mistakes.append(Mistake(node.origin, path, text))
    return REFUSED


def _read_scalar(text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`, or REFUSED."""
    for choice in _choices(kind):
        if str(choice) == text:
            return choice
    stripped = text.strip()
    if kind is bool:
        return BOOLEANS.get(stripped, REFUSED)
    if kind is int:
        return int(stripped) if WHOLE.fullmatch(stripped) else REFUSED
    if kind is float:
        return _read_number(stripped)
    if kind is str:
        return text
    return Path(text) if kind is Path and stripped else REFUSED


def _read_number(text: str) -> float | object:
    if not NUMBER.fullmatch(text):
        return REFUSED
    return float(re.sub(r"\.(inf)", r"\1", text, flags=re.IGNORECASE))


def _infer(node: Node) -> Any:
    """The value of a node for which no type is declared."""
    if node.origin.source == COMMAND_LINE and isinstance(node, ScalarNode) and node.text[:1] in ("[", "{"):
        node = _parsed(node)
    if isinstance(node, SectionNode):
        return {key: _infer(entry) for key, entry in node.entries.items()}
    if isinstance(node, ListNode):
        return [_infer(item) for item in node.items]
    if is_null(node):
        return None
    kinds = (bool, int, float) if node.is_plain else ()
    return next((value for kind in kinds if (value := _read_scalar(node.text, kind)) is not REFUSED), node.text)


def _parsed(node: Node) -> Node:
    """A list or section that was written on the command line, where everything arrives as text."""
    if isinstance(node, ScalarNode) and node.origin.source == COMMAND_LINE:
        return parse_fragment(node.text, node.origin) or node
    return node


def _as_section(node: Node) -> SectionNode | None:
    node = _parsed(node)
    if is_null(node):
        return SectionNode({}, node.origin)
    return node if isinstance(node, SectionNode) else None


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_container(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, (Mapping, Sequence)) and origin is not str


def _choices(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def _not_a_choice(text: str, choices: list[str]) -> str:
    near = get_close_matches(text, choices, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"must be one of {', '.join(choices)}, got '{text}'{hint}"


def _type_names(types: list[Any]) -> str:
    return " or ".join(_type_name(kind) for kind in types)


def _type_name(kind: Any) -> str:
    choices = _choices(kind)
    return f"one of {', '.join(map(str, choices))}" if choices else SCALAR_NAMES.get(kind, "a value")


def _shown(node: Node) -> str:
    if isinstance(node, ScalarNode):
        return f"'{node.text}'" if node.text else "nothing"
    return "a list" if isinstance(node, ListNode) else "a section"
