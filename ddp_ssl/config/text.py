"""Values as YAML: read with the types of the schema, and written so that they read back.

The YAML is plain data. `1e-4` is a number; `off`, `20:23` and `2024-11-29` are words; a key is its
text; a key given twice and a tag are errors. Nesting and aliases are bounded.
"""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from ddp_ssl.config.section import Section

TAG = "tag:yaml.org,2002:"
DEEPEST = 32  # levels
MOST = 10_000  # values, those behind an alias counted each time


def parse(text: str, kind: Any = None) -> Any:
    """The value in a YAML text. Words under a key of type `str` of the type `kind` stay text.

    Raises whatever a text that is not YAML causes; where the place is known, `ValueError` with it.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, kind)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark, tabs = error.problem_mark, "; spaces indent, tabs do not" * ("\t" in text)
        if mark is None:
            raise
        place = f"line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{place}: {error.problem}{tabs}") from error


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10**6, sort_keys=False
    )
    return text.strip().removesuffix("...").strip()


def takes_text(kind: Any) -> bool:
    """Whether a key of this type is a text, or a text or null."""
    if get_origin(kind) is Annotated:
        return takes_text(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return all(part is NoneType or takes_text(part) for part in get_args(kind))
    return kind is str


def is_section(kind: Any) -> bool:
    """Whether a type is a class of `Section`. For Python 3.10 `list[str]` is a class too."""
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Section)


def _keep_text(node: yaml.Node, kind: Any) -> None:
    if isinstance(node, yaml.MappingNode):
        fields = kind.model_fields if is_section(kind) else {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in fields:
                _keep_text(value, fields[key.value].annotation)
    elif isinstance(node, yaml.SequenceNode):
        inner = get_args(kind)[0] if get_origin(kind) is list else kind
        for item in node.value if inner is not kind or takes_text(kind) else ():
            _keep_text(item, inner)
    elif takes_text(kind) and node.tag != f"{TAG}null":
        node.tag = f"{TAG}str"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (declared by the base class)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.count = 0
        self.sizes: dict[int, int] = {}
        """Values in a node, by its id."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        before = self.count
        if getattr(event, "tag", None) not in (None, "!", f"{TAG}str"):
            raise _error(f"the tag {event.tag} is not accepted", event)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _error(f"more than {DEEPEST} levels", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self.count += 1
            self.sizes[id(node)] = self.count - before
        elif id(node) in self.sizes:
            self.count += self.sizes[id(node)]
        else:
            raise _error(f"*{event.anchor} is inside of itself", event)
        if self.count > MOST:
            raise _error(f"more than {MOST} values", event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a list or a mapping is no key", key)
            if key.value in made:
                raise _error(f"key {key.value!r} is given twice", key)
            made[key.value] = self.construct_object(value, deep=True)
        return made


class _Dumper(yaml.SafeDumper):
    """Quotes all text that YAML 1.1, YAML 1.2 or `_Loader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _error(text: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, text, at.start_mark)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 10 if text.lstrip("+-").isdigit() else 0)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # In another style a line break would end the line.
    return dumper.represent_scalar(f"{TAG}str", text, None if text.isprintable() else '"')


SIGNED = list("-+0123456789.")
for _name, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    # A leading zero means nothing: no octal numbers. More digits are no number of any key.
    ("int", r"[-+]?(?:[0-9][0-9_]{0,99}|0b[01][01_]{0,99}|0x[0-9a-fA-F][0-9a-fA-F_]{0,99})$",
     SIGNED),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
     r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$", SIGNED),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"{TAG}{_name}", re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(f"{TAG}{_name}", re.compile(_pattern), _first)
_Loader.add_constructor(f"{TAG}int", _integer)
_Dumper.add_representer(str, _text)
