"""Rows of the reference, from the schema: for `--help` and docs/config.md."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ddp_ssl.config.schema import Config, MethodConfig, with_method
from ddp_ssl.config.section import Section
from ddp_ssl.config.text import flow
from ddp_ssl.config.views import ViewGroup
from ddp_ssl.utils.text import one_line


def reference(method: type[MethodConfig] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Rows (key, type, default, description) of the whole schema."""
    return reference_of(with_method(method) if method else Config)


def reference_of(tree: type[Section]) -> Iterator[tuple[str, str, str, str]]:
    """Rows (key, type, default, description) of a tree of sections."""
    for section, field in tree.model_fields.items():
        assert isinstance(field.annotation, type)
        yield from describe_fields(section, field.annotation)
        if section == "data":
            yield from describe_fields("data.views.N", ViewGroup)


def describe_fields(prefix: str, section: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Rows (key, type, default, description) of one section."""
    for key, item in section.model_fields.items():
        default = item.get_default(call_default_factory=True)
        if isinstance(default, list):
            default = [
                x.model_dump(exclude_none=True) if isinstance(x, BaseModel) else x for x in default
            ]
        # A subclass that only changes a default (a method's `name`) keeps the base's description.
        fields = (k.model_fields.get(key) for k in section.mro() if issubclass(k, BaseModel))
        described = (f.description for f in fields if f is not None and f.description)
        text = one_line(next(described, ""))
        yield f"{prefix}.{key}", _type_name(item.annotation), flow(default), text


def _type_name(annotation: Any) -> str:
    """A field's type as a reader would write it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(str(a) for a in arguments)
    if origin in (Union, UnionType):
        return " | ".join(_type_name(a) for a in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in arguments)}]"
    if annotation is Ellipsis:
        return "..."
    return "none" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))
