"""Write docs/config.md from the schema: `make docs`, or `python tools/config_reference.py`."""

import textwrap

from ddp_ssl.config import Config, ViewGroup, describe_fields, reference
from ddp_ssl.methods._registry import builtin_methods, load_method
from ddp_ssl.run.identity import FREE_ON_RESUME, NOT_FREE

HEAD = """# Configuration reference

Generated from the schema by `make docs`; a test keeps it true. Every key can stand in a YAML file
or on the command line as `section.key=value` (items of a list by index: `data.views.0.size=96`).
Later wins: the defaults below, the method's own recipe, the YAML file (where none is given, a
preset for your images or the embedded default), the command line. `--print-config` shows the tree
and where each value came from; the run folder keeps it as `config.yaml`.

A key of type `str` takes its text as given, from both: `run.dir=007` is the folder `007`. On the
command line quotes are a part of the text; a bare `null` unsets the key. `~` is expanded in every
path. All other values are YAML; `010` is ten.
"""


def table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    """A Markdown table of (key, type, default, description)."""
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for key, kind, default, text in rows:
        cells = [f"`{key}`", f"`{kind}`", f"`{default}`", text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def resuming() -> str:
    """The paragraph about the keys that may change on resume."""
    free = ", ".join(f"`{key}`" for key in FREE_ON_RESUME)
    fixed = ", ".join(f"`{key}`" for key in NOT_FREE)
    text = (
        "A resumed run must have the settings and the images of its checkpoint. Only these keys "
        f"may change: {free}; but not {fixed}."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def first_line(thing: type) -> str:
    """The summary of a docstring."""
    return (thing.__doc__ or "").partition("\n")[0]


def main() -> str:
    lines = [HEAD, resuming(), ""]
    rows = list(reference())
    for section, field in Config.model_fields.items():
        if section == "method":
            continue
        assert isinstance(field.annotation, type)
        lines += [f"## {section}", "", first_line(field.annotation), ""]
        lines += [*table([row for row in rows if row[0].rpartition(".")[0] == section]), ""]
        if section == "data":
            group = list(describe_fields("data.views.N", ViewGroup))
            lines += ["### data.views", "", first_line(ViewGroup), "", *table(group), ""]
    lines += ["## method", "", "`method.name` chooses the file; its own keys follow.", ""]
    for name in builtin_methods():
        config = load_method(name).config_class
        own = [row for row in reference(config) if row[0].startswith("method.")]
        lines += [f"### {name}", "", first_line(config), "", *table(own), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(main(), end="")
