"""Shared by the theory examples: claims that are checked, a text, a picture, an exit code."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddp_ssl.utils.files import path_of

Claim = tuple[str, str, bool]


def report(title: str, told: list[Claim]) -> str:
    """Markdown: a claim, what was found, whether it agrees."""
    lines = [f"## {title}", ""]
    for claim, what, agrees in told:
        lines.append(f"* {'agrees' if agrees else 'DOES NOT AGREE'}: {claim}: {what}.")
    return "\n".join(lines) + "\n"


def run(
    name: str,
    title: str,
    option: tuple[str, int],
    measure: Callable[[int], Any],
    checks: Callable[[Any], list[Claim]],
    draw: Callable[[Any, Path], None],
) -> int:
    """From the command line; `option` is the argument of `measure`. 1 if something disagrees."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--out", type=path_of, default=Path("runs/reproduce") / name)
    parser.add_argument(f"--{option[0]}", type=int, default=option[1])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = measure(getattr(options, option[0]))
    told = checks(found)
    text = report(title, told)
    print(text)
    (options.out / f"{name}.md").write_text(text)
    rows = [{"claim": c, "found": w, "agrees": a} for c, w, a in told]
    (options.out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(found, options.out / f"{name}.png")
    print(f"picture: {options.out / name}.png")
    return int(not all(agrees for _, _, agrees in told))
