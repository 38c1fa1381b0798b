"""Reads YAML files and `key=value` into one frozen and validated tree of sections.

Values come in layers, the lowest first; a layer replaces single keys of those below it. A key of
type `str` takes its text as given: `run.dir=007` is the folder `007`. An error is a `ConfigError`
of one line with the key, its place, and the value that would be accepted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from ddp_ssl.config.files import find_config, unknown_config
from ddp_ssl.config.hints import did_you_mean, misplaced_word
from ddp_ssl.config.schema import Config
from ddp_ssl.config.section import S, Section
from ddp_ssl.config.text import flow, is_section, parse, takes_text
from ddp_ssl.config.views import ViewGroup
from ddp_ssl.errors import ConfigError, refused
from ddp_ssl.utils.files import if_readable
from ddp_ssl.utils.text import suggest

Layer = tuple[str, dict[str, Any]]
"""An origin, such as a file's path, and a tree of values."""

LARGEST = 1_000_000  # bytes of a YAML file
STREAM: dict[str, Any] = {"reader": "indexed", "url": None}  # older keys of `data`, and defaults
FEW_KEYS = 12  # of a section, that an error names


@dataclass(frozen=True)
class Resolved:
    """The frozen config, and the origin of each dotted key that is not a default.

    `notes`: lines for the user about what was chosen or left out on the way. `for_this_machine`:
    whether values were chosen for the machine and the number of processes, as a preset's are.
    """

    config: Config
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()
    for_this_machine: bool = False

    def to_yaml(self, origins: bool = True) -> str:
        """The whole tree as YAML: one key a line, with its origin as a comment."""
        lines = [f"# {note}" for note in self.notes] if origins else []
        for name, section in self.config.model_dump(mode="json").items():
            lines.append(f"{name}:")
            for key, value in section.items():
                text = f"  {key}: {flow(value)}"
                origin = self.origins.get(f"{name}.{key}", "default")
                lines.append(f"{text:<60}  # {origin}" if origins else text)
        return "\n".join(lines) + "\n"


def read_yaml(path: Path, schema: type[Section] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; a `ConfigError` of one line if there is none."""
    return tree_of(path, read_text(path), schema)


def read_text(path: Path) -> str:
    """The text of a YAML file; raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        text = content.decode()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror or error}; a YAML file or the name of a "
            "config such as imagenet100/adadim is accepted"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file; a YAML file would be accepted") from None
    if len(content) > LARGEST:
        raise ConfigError(f"{path}: longer than {LARGEST} bytes; a config would be accepted")
    return text


def tree_of(path: Path, text: str, schema: type[Section] | None = None) -> dict[str, Any]:
    """The mapping in the text of a YAML file; raises `ConfigError`.

    A key that has the type `str` in the schema keeps its text.
    """
    with refused(f"{path}: not valid YAML"):
        tree = parse(text, schema)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `optim:`, got {flow(tree)[:60]}")
    return _renamed(tree)


def _renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree in which `log.tensorboard`, an older key, is `log.to`, without `STREAM`'s keys."""
    if isinstance(data := tree.get("data"), dict):
        kept = {key: value for key, value in data.items() if not _is_of_stream(key, value)}
        tree = {**tree, "data": kept}
    log = tree.get("log")
    if not isinstance(log, dict) or "tensorboard" not in log:
        return tree
    if "to" in log:
        raise ConfigError("log.tensorboard: an older name of log.to; one of them is accepted")
    rest = {key: value for key, value in log.items() if key != "tensorboard"}
    return {**tree, "log": {**rest, "to": _loggers(log["tensorboard"])}}


def _is_of_stream(key: str, value: Any) -> bool:
    """Whether this is a key of `STREAM` with its default; raises `ConfigError` for others."""
    if key in STREAM and value != STREAM[key]:
        raise ConfigError(
            f"data.{key}: was removed with the reader that it was for; accepted: the place of the "
            "shards as data.root=s3://BUCKET/FOLDER (or gs://, https://), read in the run's own "
            "order"
        )
    return key in STREAM


def _loggers(tensorboard: Any) -> list[str]:
    """`log.to` for a value of `log.tensorboard`."""
    on = if_readable(lambda: TypeAdapter(bool).validate_python(tensorboard))
    if on is None:
        raise ConfigError(
            f"log.tensorboard: expected true or false, got {flow(tensorboard)}; "
            "log.to=[tensorboard] and log.to=[] are the same"
        )
    return ["tensorboard"] if on else []


def load_as(
    schema: type[S], arguments: Sequence[str], below: Sequence[Layer] = ()
) -> tuple[S, dict[str, str]]:
    """Resolve `[CONFIG.yaml] [key=value ...]` into another tree of sections than a run's.

    `below`: layers under the YAML. Returns the tree and the origin of each value that is not a
    default. Raises `ConfigError`.
    """
    path, overrides = split_arguments(arguments, schema)
    file = [] if path is None else [(str(path), read_yaml(path, schema))]
    merged, origins = merge(with_overrides([*below, *file], overrides, schema))
    check_sections(merged, schema, origins)
    return validate(merged, schema, origins), origins


def split_arguments(
    arguments: Sequence[str], schema: type[Section] = Config
) -> tuple[Path | None, list[str]]:
    """The YAML file, if one is given, and the `key=value` arguments."""
    path: Path | None = None
    overrides: list[str] = []
    for number, argument in enumerate(arguments):
        # A file's path may contain `=`: the folders of a sweep are called `seed=0`.
        if "=" in argument.lstrip("=") and not os.path.isfile(argument):
            overrides.append(argument)
            continue
        found = None if argument.startswith("-") else find_config(argument)
        if found is not None and path is None:
            path = found
        elif hint := misplaced_word(arguments, number, known_keys(schema)):
            raise ConfigError(f"{argument}: {hint}")
        elif argument.startswith("-"):
            raise ConfigError(
                f"{argument}: unknown option; --help and --print-config are the options, "
                "everything else is written key=value"
            )
        elif path is not None:
            raise ConfigError(f"{argument}: one config file is accepted, {path} is given already")
        else:
            raise ConfigError(unknown_config(argument))
    return path, overrides


def with_overrides(
    layers: Sequence[Layer], overrides: Sequence[str], schema: type[Section]
) -> list[Layer]:
    """The layers and, on top, one of the `key=value` arguments."""
    top = [("command line", _tree_of(overrides, layers, schema))] if overrides else []
    return [*layers, *top]


def _tree_of(
    overrides: Sequence[str], layers: Sequence[Layer], schema: type[Section]
) -> dict[str, Any]:
    """`["optim.lr=0.1", "data.views.0.size=96"]` as a nested dict.

    An item of a list replaces that item of the layers' list, or of the default.
    """
    below, _ = merge(layers)
    tree: dict[str, Any] = {}
    for override in overrides:
        dotted, _, text = override.partition("=")
        parts = dotted.split(".")
        kind = kind_of(parts, schema)
        value: Any
        if takes_text(kind):
            value = None if text in ("", "null") else text
        else:
            with refused(f"{dotted}: not a YAML value"):
                value = parse(text, kind)
        if len(parts) < 2 or not all(parts) or dotted.startswith("-"):
            hint = did_you_mean(dotted.strip("-."), known_keys(schema))
            hint = hint or f"; sections are {', '.join(schema.model_fields)}"
            raise ConfigError(f"{dotted}: expected section.key=value{hint}")
        if len(parts) > 2 and re.fullmatch("[0-9]{1,4}", parts[2]):
            value = _set_item(tree, below, parts, value, schema)
            parts = parts[:2]
        if parts == ["log", "tensorboard"]:
            parts, value = ["log", "to"], _loggers(value)
        if parts[0] == "data" and _is_of_stream(parts[1], value):
            continue
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{dotted}: {part} is not a section")
        node[parts[-1]] = value
    return tree


def kind_of(parts: Sequence[str], kind: Any) -> Any:
    """The type of the key at a dotted place below the type `kind`; None if there is no such key."""
    for part in parts:
        if is_section(kind):
            field = kind.model_fields.get(part)
            kind = None if field is None else field.annotation
        else:
            kind = get_args(kind)[0] if get_origin(kind) is list and part.isdigit() else None
    return kind


def _set_item(
    tree: dict[str, Any],
    below: dict[str, Any],
    parts: list[str],
    value: Any,
    schema: type[Section],
) -> Any:
    """The list at `parts[:2]`, with one item, or one key of it, replaced by the value."""
    section, key, index, *rest = parts
    default: Any = None
    if section in schema.model_fields:
        kind = schema.model_fields[section].annotation
        assert isinstance(kind, type)
        if key in kind.model_fields:
            default = kind().model_dump(mode="json", exclude_none=True).get(key)
    layers = (x[section] for x in (tree, below) if isinstance(x.get(section), dict))
    current = next((values[key] for values in layers if values.get(key)), default)
    if not isinstance(current, list) or int(index) >= len(current) or len(rest) > 1:
        length = len(current) if isinstance(current, list) else 0
        raise ConfigError(f"{'.'.join(parts)}: {section}.{key} has {length} items to set")
    items = list(current)
    if rest and not isinstance(items[int(index)], dict):
        raise ConfigError(f"{'.'.join(parts)}: {section}.{key}.{index} is {items[int(index)]}")
    items[int(index)] = {**items[int(index)], rest[0]: value} if rest else value
    return items


def merge(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """One tree of all layers, and the origin of each dotted key in it."""
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, tree in layers:
        for section, values in tree.items():
            if isinstance(values, dict) and isinstance(merged.get(section, {}), dict):
                merged[section] = {**merged.get(section, {}), **values}
                origins.update({f"{section}.{key}": source for key in values})
            elif values is not None:
                merged[section] = values
                origins[section] = source
    return merged, origins


def check_sections(
    tree: Mapping[str, Any], schema: type[Section], origins: Mapping[str, str]
) -> None:
    """Raise `ConfigError` for a section that the schema does not have."""
    for section, values in tree.items():
        if section not in schema.model_fields:
            sections = ", ".join(schema.model_fields)
            first = [f".{key}" for key in values][:1] if isinstance(values, dict) else []
            hint = (
                suggest(str(section), schema.model_fields, 0.8)
                or did_you_mean("".join([str(section), *first]), known_keys(schema))
                or f"; sections are {sections}"
            )
            raise ConfigError(f"{section}: unknown section{_where(section, origins)}{hint}")


def validate(tree: dict[str, Any], schema: type[S], origins: Mapping[str, str]) -> S:
    """The frozen tree. Raises `ConfigError` with the first problem and the number of others."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(dict(e), schema, origins) for e in error.errors()]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(problems[0] + more)


def _problem(error: dict[str, Any], schema: type[Section], origins: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known, section = known_keys(schema), key.partition(".")[0]
        its = [other for other in known if other.startswith(f"{section}.")]
        few = f"; accepted: {', '.join(its)}" if len(its) <= FEW_KEYS else ""
        hint = did_you_mean(key, known) or few or f"; --help {section} lists the keys"
        kind = schema.model_fields[section].annotation
        of = f" of {kind.model_fields['name'].default}" if section == "method" and kind else ""
        return f"{key}: unknown key{of}{_where(key, origins)}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    got = "" if error["type"] in ("value_error", "missing") else f", got {flow(error['input'])}"
    if len(got) > 80:
        got = got[:77] + "..."
    return f"{key}: {message}{got}{_where(key, origins)}{_as_written(key, error)}"


def _as_written(key: str, error: dict[str, Any]) -> str:
    """How a list or a mapping is written, where a word or a number was given for one."""
    given = error["input"]
    if error["type"] in ("list_type", "tuple_type") and isinstance(given, str | int | float):
        return f"; a list is written '{key}=[{given}]'"
    if error["type"] == "list_type" and isinstance(given, dict) and given:
        return f"; an entry of the list goes by its number: {key}.0.{next(iter(given))}"
    if error["type"] == "float_parsing" and given.count(",") == 1:
        return f"; a decimal point is accepted: {key}={given.replace(',', '.')}"
    if error["type"] in ("model_type", "dict_type") and isinstance(given, str):
        return "; braces need quotes in a shell, as in 'data.views=[{count: 2, size: 32}]'"
    return ""


def known_keys(schema: type[Section]) -> list[str]:
    """The dotted keys of a tree of sections, those of a group of views included."""
    keys: list[str] = []
    for section, field in schema.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        keys += [f"{section}.{key}" for key in kind.model_fields]
    keys += [f"data.views.0.{key}" for key in ViewGroup.model_fields]
    return keys


def _where(key: str, origins: Mapping[str, str]) -> str:
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        origin = origins.get(".".join(parts[:end]))
        if origin and origin != "command line":
            return f" ({origin})"
        if origin:
            return ""
    return ""
