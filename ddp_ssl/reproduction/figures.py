"""matplotlib, which is an extra of the package, and pictures as files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddp_ssl.config import ConfigError


def pyplot() -> Any:
    """`matplotlib.pyplot`, which draws into files. Raises `ConfigError` if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is needed: pip install 'ddp_ssl[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path, dpi: int = 110) -> list[Path]:
    """Write the picture as PNG and as SVG, whatever the suffix of `path`; returns both paths."""
    import matplotlib

    # The same bytes for the same values: no date, no random ids.
    matplotlib.rcParams.update({"svg.hashsalt": "ddp_ssl", "svg.fonttype": "none"})
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    figure.savefig(png, dpi=dpi)
    figure.savefig(svg, metadata={"Date": None})
    return [png, svg]


@contextmanager
def canvas(path: Path, rows: int, columns: int, size: tuple[float, float], dpi: int,
           **options: Any) -> Iterator[Any]:  # fmt: skip
    """Axes `[rows, columns]` to draw on; the figure is written to `path` when the block ends."""
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, **options)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)
