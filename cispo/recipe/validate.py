"""From a document to a recipe: all of its mistakes at once, each with the line it was written on."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from cispo.errors import RecipeError
from cispo.recipe import declared
from cispo.recipe.convert import REFUSED, convert_section
from cispo.recipe.document import COMMAND_LINE, Document, ListNode, Mistake, Node, Origin, SectionNode, SettingPath

Settings = TypeVar("Settings", bound=BaseModel)

COMPARISONS = {
    "greater_than": ("must be > {}", "gt"),
    "greater_than_equal": ("must be >= {}", "ge"),
    "less_than": ("must be < {}", "lt"),
    "less_than_equal": ("must be <= {}", "le"),
    "multiple_of": ("must be a multiple of {}", "multiple_of"),
    "too_short": ("needs at least {} item(s)", "min_length"),
    "too_long": ("may have at most {} item(s)", "max_length"),
    "string_too_short": ("needs at least {} character(s)", "min_length"),
    "string_too_long": ("may have at most {} character(s)", "max_length"),
    "string_pattern_mismatch": ("must match {}", "pattern"),
}


def validate(document: Document, settings: type[Settings]) -> Settings:
    """The settings that a document holds. Raises RecipeError with one line for each mistake."""
    mistakes = document.mistakes
    values = convert_section(document.root, settings, (), mistakes)
    try:
        recipe = settings.model_validate(values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            if details["input"] is not REFUSED:
                path = _setting_path(details["loc"], settings)
                mistakes.append(_mistake(document.root, settings, path, details))
        raise_mistakes(mistakes)
    if mistakes:
        raise_mistakes(mistakes)
    return recipe


def raise_mistakes(mistakes: list[Mistake]) -> None:
    """Raise RecipeError with one line a mistake, in the order of the file, the command line last."""
    ordered = sorted(mistakes, key=lambda mistake: (mistake.origin.source == COMMAND_LINE, mistake.origin))
    raise RecipeError("\n".join(dict.fromkeys(str(mistake) for mistake in ordered)))


def origin_of(root: SectionNode, path: SettingPath) -> Origin:
    """Where the value at `path` was written, or else the innermost section or list around it that was."""
    node: Node = root
    for part in path:
        below: Node | None = None
        if isinstance(node, SectionNode):
            below = node.entries.get(str(part))
        elif isinstance(node, ListNode) and isinstance(part, int) and part < len(node.items):
            below = node.items[part]
        if below is None:
            break
        node = below
    return node.origin


def is_written(root: SectionNode, path: SettingPath) -> bool:
    """Whether the value at `path` was written by a person; otherwise it is a default."""
    node: Node = root
    for part in path:
        if isinstance(node, SectionNode) and str(part) in node.entries:
            node = node.entries[str(part)]
        elif isinstance(node, ListNode) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
        else:
            # A value written as a whole on the command line, such as betas=[0.9,0.99], has no node for its parts.
            return not isinstance(node, SectionNode | ListNode)
    return True


def _mistake(root: SectionNode, settings: type[BaseModel], path: SettingPath, details: ErrorDetails) -> Mistake:
    text = _text(settings, path, details)
    first, _, rest = text.partition(" ")
    named = (*path, *first.split("."))
    if rest and _is_setting(settings, named):
        # A rule between several settings belongs to no one of them; its text begins with the one to mend.
        path, text = named, rest
    return Mistake(origin_of(root, path), path, text)


def _text(settings: type[BaseModel], path: SettingPath, details: ErrorDetails) -> str:
    kind = details["type"]
    if kind == "missing":
        return f"is not set and has no default{_description(settings, path)}"
    if kind in ("value_error", "assertion_error"):
        return details["msg"].split(", ", 1)[1]
    context = details.get("ctx", {})
    if kind in COMPARISONS:
        text, key = COMPARISONS[kind]
        return f"{text.format(_shown(context[key]))}, got {_shown(details['input'])}"
    return f"{details['msg'][:1].lower()}{details['msg'][1:]}, got {_shown(details['input'])}"


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return str(len(value))
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _description(settings: type[BaseModel], path: SettingPath) -> str:
    declaration = _field_at(settings, path)
    text = declaration.description if declaration else None
    return f": {' '.join(text.split()).rstrip('.')}" if text else ""


def _setting_path(location: tuple[int | str, ...], settings: type[BaseModel]) -> SettingPath:
    """Pydantic's location without the tags that it adds where several settings classes are possible."""
    path: list[int | str] = []
    annotation: Any = settings
    for part in location:
        classes = declared.settings_classes(annotation)
        if len(classes) > 1:
            annotation = declared.tagged_classes(classes)[str(part)]
            continue
        path.append(part)
        annotation = _below(annotation, part)
    return tuple(path)


def _is_setting(settings: type[BaseModel], path: SettingPath) -> bool:
    return _field_at(settings, path) is not None


def _field_at(settings: type[BaseModel], path: SettingPath) -> FieldInfo | None:
    """The declaration of the setting at `path`; where several classes are possible, the first that has it."""
    annotation: Any = settings
    for part in path[:-1]:
        annotation = _below(annotation, part)
    classes = declared.settings_classes(annotation) if path else []
    return next((found for kind in classes if (found := kind.model_fields.get(str(path[-1])))), None)


def _below(annotation: Any, part: int | str) -> Any:
    classes = declared.settings_classes(annotation)
    if classes:
        found = next((found for kind in classes if (found := kind.model_fields.get(str(part)))), None)
        return found.annotation if found else Any
    kind = next(iter(declared.members(annotation)[0]), Any)
    return declared.item_type(kind, part) if isinstance(part, int) else declared.value_type(kind)
