"""What the plotting tools share."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save(figure: Any, path: Path) -> list[Path]:
    """The picture as PNG and as SVG, whatever the suffix of `path`; the files written."""
    import matplotlib

    # The same bytes for the same figures: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "ddp_ssl", "svg.fonttype": "none"})
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    figure.savefig(png, dpi=110)
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]
