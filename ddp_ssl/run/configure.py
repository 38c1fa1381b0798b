"""The config of a run, from the command line.

Layers, later wins: the schema's defaults, the method's recipe, the YAML file, `key=value`. Where no
YAML is given, a preset and the choices for the images take its place, or the embedded default.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_ssl.config import schema
from ddp_ssl.config.files import name_of, with_places
from ddp_ssl.config.reader import (
    Layer,
    Resolved,
    check_sections,
    merge,
    read_text,
    read_yaml,
    split_arguments,
    tree_of,
    validate,
    with_overrides,
)
from ddp_ssl.config.rules import check
from ddp_ssl.config.schema import Config, MethodConfig, with_method
from ddp_ssl.config.text import flow
from ddp_ssl.errors import ConfigError
from ddp_ssl.methods._registry import load_method
from ddp_ssl.run import arrays
from ddp_ssl.run.method import adapted, named, sibling
from ddp_ssl.utils.text import one_line

if TYPE_CHECKING:
    from ddp_ssl.run.preset import Preset

# The embedded default: AdaDim on 1,797 handwritten digits, and each method's settings for them.
DIGITS = Path(schema.__file__).parent / "digits"
EMBEDDED = "embedded default"


def load(arguments: Sequence[str], trusted: str = "*") -> Resolved:
    """Resolve `[CONFIG.yaml] [key=value ...]` into a validated tree.

    The keys of `method` are validated last, since the method's file has to be imported for them,
    and torch with it. `trusted`: the method (`module:Class`) that may be imported from outside the
    package, `*` for any. Raises `ConfigError`.
    """
    path, overrides = split_arguments(with_places(arguments))
    notes: list[str] = []
    preset = _preset(overrides) if path is None else None
    if preset is not None:
        path = preset.path
        notes.append(preset.headline)
    if path is None:
        layers: list[Layer] = [(EMBEDDED, _embedded_default(overrides))]
    else:
        text = read_text(path)
        layers = [(str(path), tree_of(path, text, Config))]
    name = _method_name(*merge(with_overrides(layers, overrides, Config)))
    check_trust(name, trusted)
    method = load_method(name).config_class
    typed = with_method(method)
    if path is None:
        layers = _for_method(layers[0][1], method)
    else:
        # Again, now that the types of the method's own keys are known.
        own = layers[0][1].get("method")  # without this section it is for any method
        another = bool(own) and named(layers[0][1]) != name
        if another and (other := sibling(path, named(layers[0][1]), name)):
            notes.append(f"method.name={name}: takes {name_of(other)} in place of {name_of(path)}")
            path, text, another = other, read_text(other), False
        tree = tree_of(path, text, typed)
        if another:
            tree, dropped = adapted(tree, path, method)
            given = {override.partition("=")[0] for override in overrides}
            if left := [key for key in dropped if key not in given]:
                notes.append(
                    f"method.name={name}: not taken from {name_of(path)}: {', '.join(left)}"
                )
        layers = [(str(path), tree)]
        if preset is not None:
            made, lines = preset.layers(tree, method)
            notes += lines
            layers += made
    recipe = (f"recipe of {name}", method.recipe)
    merged, origins = merge(with_overrides([recipe, *layers], overrides, typed))
    merged["method"] = {**merged.get("method", {}), "name": name}
    config = validate(merged, typed, origins)
    check_recipes([group.recipe for group in config.data.views], trusted)
    config, origins, said = arrays.completed(config, origins)
    notes += [said] if said else []
    try:
        check(config)
        config.method.check(config)
    except ValueError as error:
        raise ConfigError(one_line(error)) from None
    return Resolved(config, origins, tuple(notes), for_this_machine=preset is not None)


def check_trust(method: str, trusted: str) -> None:
    """Raise `ConfigError` for a method from outside the package that is not `trusted`.

    Another method that is `trusted` by its name is a mistake.
    """
    if trusted not in (method, "*"):
        check_inside("method.name", [method], f"method.name={method}")
    if trusted not in ("", "*", method):
        raise ConfigError(f"method.name: the run's is {method}, not {trusted}")


def check_recipes(names: Sequence[str], trusted: str) -> None:
    """Raise `ConfigError` if views are made by a function from outside that is not `trusted`."""
    if trusted != "*":
        check_inside("data.views", names)


def check_inside(key: str, names: Iterable[str], consent: str = "") -> None:
    """Raise `ConfigError` if what a name stands for would come from outside the package.

    `consent`: the argument that permits it.
    """
    if outside := next((name for name in names if ":" in name), None):
        raise ConfigError(
            f"{key}: {outside} would be imported from outside this package; if you trust it, "
            f"{consent}{' or ' if consent else ''}--trust is accepted"
        )


def _preset(overrides: Sequence[str]) -> Preset | None:
    """The preset for the images that the user names; None for the embedded digits."""
    typed, _ = merge(with_overrides([], overrides, Config))
    data = typed.get("data") or {}
    if not {"root", "files"} & data.keys() and data.get("name", "digits") == "digits":
        return None
    from ddp_ssl.run.preset import Preset  # here, since it brings numpy

    _method_name(typed, {})  # a mistake in any key is told before images are looked for
    config = validate({"data": data, "run": typed.get("run", {})}, Config, {})
    return None if config.data.name == "digits" else Preset(typed, config.data, config.run.device)


def _method_name(tree: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    """`method.name`, after everything but the other keys of `method` has been validated."""
    check_sections(tree, Config, origins)
    method = tree.get("method", {})
    if not isinstance(method, dict):
        raise ConfigError(f"method: expected keys such as `name:`, got {flow(method)}")
    name = named(tree)
    validate({**tree, "method": {"name": name}}, Config, origins)
    return name


def _embedded_default(overrides: Sequence[str]) -> dict[str, Any]:
    """The embedded default; another backbone does not take its backbone's arguments."""
    tree = read_yaml(DIGITS / "default.yaml")
    if any(override.startswith("model.backbone=") for override in overrides):
        del tree["model"]["backbone_args"]
    return tree


def _for_method(default: dict[str, Any], method: type[MethodConfig]) -> list[Layer]:
    """The embedded default with the keys that the method has, and the method's own settings."""
    own = {key: value for key, value in default["method"].items() if key in method.model_fields}
    return [(EMBEDDED, {**default, "method": own}), (EMBEDDED, _settings_of(method))]


def _settings_of(method: type[MethodConfig]) -> dict[str, Any]:
    """The settings for the embedded default, or those of the class that the method derives from.

    A method of the package has them in `digits/NAME.yaml`, one from outside in `embedded`.
    """
    for kind in method.mro():
        package, _, name = kind.__module__.rpartition(".")
        file = DIGITS / f"{name}.yaml"
        if package == "ddp_ssl.methods" and file.is_file():
            return read_yaml(file)
        if "embedded" in vars(kind):
            break
    return method.embedded
