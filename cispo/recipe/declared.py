"""What a settings class declares: the members of a union, the class that a tag selects, the type of a list's items."""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

SettingsClass = type[BaseModel]


def members(annotation: Any) -> tuple[list[Any], bool]:
    """The types that a value may have, without None, and whether null is allowed."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation], annotation is type(None)
    found: list[Any] = []
    allows_null = False
    for member in get_args(annotation):
        if member is type(None):
            allows_null = True
        else:
            inner, inner_null = members(member)
            found += inner
            allows_null |= inner_null
    return found, allows_null


def settings_classes(annotation: Any) -> list[SettingsClass]:
    return [member for member in members(annotation)[0] if isinstance(member, type) and issubclass(member, BaseModel)]


def is_section(annotation: Any) -> bool:
    return bool(settings_classes(annotation))


def tag_name(classes: Sequence[SettingsClass]) -> str:
    """The setting whose value selects one of several settings classes: the first that all declare as Literal."""
    for name in classes[0].model_fields:
        if all(_literals(settings, name) for settings in classes):
            return name
    raise TypeError(f"{[settings.__name__ for settings in classes]} share no Literal field to tell them apart by")


def tagged_classes(classes: Sequence[SettingsClass]) -> dict[str, SettingsClass]:
    """Settings classes by the value of their tag."""
    tag = tag_name(classes)
    return {str(value): settings for settings in classes for value in _literals(settings, tag)}


def item_type(annotation: Any, index: int) -> Any:
    """The declared type of item `index` of a list, a tuple or a sequence."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis):
        return arguments[index] if index < len(arguments) else Any
    return arguments[0] if arguments else Any


def value_type(annotation: Any) -> Any:
    """The declared type of a dict's values."""
    arguments = get_args(annotation)
    return arguments[1] if len(arguments) == 2 else Any


def _literals(settings: SettingsClass, name: str) -> tuple[Any, ...]:
    declared = settings.model_fields.get(name)
    if declared is None or get_origin(declared.annotation) is not Literal:
        return ()
    return get_args(declared.annotation)
