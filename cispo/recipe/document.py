"""A recipe's text as a tree that remembers where each value was written.

YAML is read no further than its structure: scalars stay text until `cispo.recipe.convert` knows which type a setting
declares, because YAML 1.1 would make a string of `1e-6` and a boolean of `on`. Overrides from the command line are
put into the same tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml

COMMAND_LINE = "command line"

SettingPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a value was written: `source` is a file as the user named it, or the command line (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(slots=True)
class ScalarNode:
    """A single value, still text; `is_plain` says that it was not quoted, so that `null` can mean null."""

    text: str
    is_plain: bool
    origin: Origin


@dataclass(slots=True)
class ListNode:
    items: list["Node"]
    origin: Origin


@dataclass(slots=True)
class SectionNode:
    """Settings by name; the origin of each entry's node is the line of its key."""

    entries: dict[str, "Node"]
    origin: Origin


Node = ScalarNode | ListNode | SectionNode


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong, and where: printed as `recipes/code.yaml:12 learner.lr: must be > 0, got -1`."""

    origin: Origin
    path: SettingPath
    text: str

    def __str__(self) -> str:
        name = dotted(self.path)
        return f"{self.origin} {name}: {self.text}" if name else f"{self.origin}: {self.text}"


@dataclass(slots=True)
class Document:
    """A recipe's tree and the mistakes that were found while it was built."""

    root: SectionNode
    mistakes: list[Mistake] = field(default_factory=list)


def dotted(path: SettingPath) -> str:
    return ".".join(str(part) for part in path)


def read_document(text: str, source: str) -> Document:
    """Parse YAML `text`; `source` is how its mistakes name the file."""
    document = Document(SectionNode({}, Origin(source, 1)))
    try:
        composed = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        text = f"is not valid YAML: {error.problem or error.context}; check indentation, colons and quotes there"
        document.mistakes.append(Mistake(Origin(source, line), (), text))
        return document
    except yaml.YAMLError as error:
        document.mistakes.append(Mistake(Origin(source, 1), (), f"is not valid YAML: {' '.join(str(error).split())}"))
        return document
    if composed is None:
        return document
    root = _Reader(source, document.mistakes).node(composed, (), Origin(source, 1))
    if isinstance(root, SectionNode):
        document.root = root
    else:
        document.mistakes.append(Mistake(root.origin, (), "holds no settings; write one `key: value` a line"))
    return document


def parse_fragment(text: str, origin: Origin) -> Node | None:
    """The value of an override that stands for a list or a section, such as `[0.9, 0.99]`; None if it is no YAML."""
    try:
        composed = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    mistakes: list[Mistake] = []
    node = _Reader(origin.source, mistakes, origin).node(composed, (), origin) if composed else None
    return None if mistakes else node


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Put `section.key=value` overrides into the tree; a list's items go by number, as in `rewards.0.weight=2`."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            text = f"expected key=value, got '{override}'; for instance learner.learning_rate=1e-5"
            document.mistakes.append(Mistake(Origin(COMMAND_LINE), (), text))
            continue
        problem = _put(document.root, key.split("."), ScalarNode(value, True, Origin(COMMAND_LINE)))
        if problem:
            document.mistakes.append(Mistake(Origin(COMMAND_LINE), tuple(key.split(".")), problem))


def is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.is_plain and node.text.strip() in ("", "~", "null", "Null", "NULL")


class _Reader:
    """Turns PyYAML's nodes into ours. `fixed` is the origin of everything in an override."""

    def __init__(self, source: str, mistakes: list[Mistake], fixed: Origin | None = None) -> None:
        self.source = source
        self.mistakes = mistakes
        self.fixed = fixed
        self.open: set[int] = set()

    def node(self, node: yaml.Node, path: SettingPath, origin: Origin) -> Node:
        if id(node) in self.open:
            self.mistakes.append(Mistake(origin, path, "is an alias of a value that holds it; write the value out"))
            return ScalarNode("", True, origin)
        if isinstance(node, yaml.ScalarNode):
            return ScalarNode(node.value, node.style is None, origin)
        self.open.add(id(node))
        result: Node
        if isinstance(node, yaml.SequenceNode):
            items = [self.node(item, (*path, i), self.place(item)) for i, item in enumerate(node.value)]
            result = ListNode(items, origin)
        else:
            assert isinstance(node, yaml.MappingNode)
            result = self.section(node, path, origin)
        self.open.discard(id(node))
        return result

    def section(self, node: yaml.MappingNode, path: SettingPath, origin: Origin) -> SectionNode:
        entries: dict[str, Node] = {}
        for key_node, value in node.value:
            origin_of_key = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.append(Mistake(origin_of_key, path, "a setting's name must be a single word"))
                continue
            key = key_node.value
            if key in entries:
                text = f"is set twice, first at {entries[key].origin}; remove one"
                self.mistakes.append(Mistake(origin_of_key, (*path, key), text))
                continue
            entries[key] = self.node(value, (*path, key), origin_of_key)
        return SectionNode(entries, origin)

    def place(self, node: yaml.Node) -> Origin:
        return self.fixed or Origin(self.source, node.start_mark.line + 1)


def _put(root: SectionNode, keys: list[str], value: ScalarNode) -> str | None:
    """Set the value at `keys`, or say why it cannot be set."""
    node: Node = root
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        if isinstance(node, SectionNode):
            if is_last:
                node.entries[key] = value
                return None
            below = node.entries.get(key)
            if below is None or is_null(below):
                below = node.entries[key] = SectionNode({}, value.origin)
            node = below
        elif isinstance(node, ListNode):
            if not key.isdigit() or int(key) >= len(node.items):
                return f"'{key}' is no item of {'.'.join(keys[:depth])}, which has items 0 to {len(node.items) - 1}"
            if is_last:
                node.items[int(key)] = value
                return None
            node = node.items[int(key)]
        else:
            return f"{'.'.join(keys[:depth])} is a single value, so it has no setting '{key}'"
    return None
