"""Where rows of metrics go besides `metrics.jsonl`: the loggers that `log.to` names."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ddp_ssl.errors import ConfigError, reason, refused

logger = logging.getLogger("ddp_ssl")

# The loggers that have a name, and how to install what they need.
BUILT_IN = {
    "tensorboard": ("ddp_ssl.logs.tensorboard:TensorBoard", "pip install tensorboard"),
    "wandb": ("ddp_ssl.logs.wandb:WandB", "pip install 'ddp_ssl[wandb]'"),
}


@dataclass(frozen=True)
class RunInfo:
    """What a logger is told about its run."""

    folder: Path
    config: Mapping[str, Any]
    """The whole config: section, key, value."""
    step: int | None
    """Rows up to this step were given at an earlier start and do not come again; None: none was."""


class Logger:
    """Base of a logger. Rank 0 makes one when a run starts, and gives it every row in order.

    A run that goes on computes the steps after its checkpoint again. It does not give rows of these
    steps again. So a logger gets each row once, whatever the number of restarts.

    Methods are called between two steps, and training waits for them. A logger that raises gets no
    more calls; a warning says so, and the run goes on.
    """

    rewinds: ClassVar[bool] = False
    """Whether the logger itself removes what it has of the steps after `run.step`. If so,
    `run.step` is the checkpoint's, and the rows after it are given again."""

    def __init__(self, run: RunInfo) -> None:
        self.run = run

    def row(self, row: dict[str, float | int]) -> None:
        """One row: `step`, `epoch` and figures by name, some of them not finite.

        A step has several rows if something is measured after it, each with other figures.
        """
        raise NotImplementedError

    def image(self, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """A picture `[H, W, 3]` of bytes."""

    def histogram(self, tag: str, values: npt.NDArray[np.float64], step: int) -> None:
        """The distribution of `values` `[m]`."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown, also where it was given before."""

    def flush(self) -> None:
        """Keep and show what was given so far: a checkpoint is about to be saved."""

    def close(self) -> None:
        """The run ends, or stops for now."""


@dataclass(frozen=True)
class Given:
    """The last step whose rows loggers were given, and the names of the figures in them."""

    step: int = -1
    names: frozenset[str] = frozenset()

    def has(self, step: int, *names: str) -> bool:
        """Whether a row of this step with these figures was given."""
        return step < self.step or (step == self.step and not self.names.isdisjoint(names))


def load_loggers(names: Sequence[str]) -> dict[str, type[Logger]]:
    """The classes of `log.to`, by their names there; imports them.

    Raises `ConfigError` for one that cannot be imported or is no `Logger`.
    """
    found: dict[str, type[Logger]] = {}
    for name in names:
        place, needs = BUILT_IN.get(name, (name, ""))
        module, _, kind = place.partition(":")
        with refused(f"log.to: cannot import {name}", needs and f"{needs} is accepted"):
            found[name] = getattr(importlib.import_module(module), kind)
        if not (isinstance(found[name], type) and issubclass(found[name], Logger)):
            raise ConfigError(f"log.to: {name} is not a subclass of ddp_ssl.logs.loggers.Logger")
    return found


class Loggers:
    """The loggers of a run as one."""

    def __init__(
        self,
        classes: Mapping[str, type[Logger]],
        folder: Path,
        config: Mapping[str, Any],
        resumed_step: int | None,
        given: Given,
    ) -> None:
        """`given`: the rows that all loggers but those that rewind were given before."""
        self._loggers: dict[str, Logger] = {}
        self._given = given
        for name, kind in classes.items():
            known = [resumed_step] if resumed_step is not None else []
            known += [given.step] if given.step >= 0 and not kind.rewinds else []
            with self._guarded(name):
                self._loggers[name] = kind(RunInfo(folder, config, max(known, default=None)))

    def row(self, row: Mapping[str, float | int]) -> None:
        """Give a row to each to which it is new."""
        figures = [name for name in row if name not in ("step", "epoch")]
        self._call("row", dict(row), at=(int(row["step"]), *figures))

    def image(self, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
        """A picture `[H, W, 3]` of bytes."""
        self._call("image", tag, image, step, at=(step, tag))

    def histogram(self, tag: str, values: npt.NDArray[np.float64], step: int) -> None:
        """The distribution of `values` `[m]`."""
        self._call("histogram", tag, values, step, at=(step, tag))

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""
        self._call("text", tag, text, step)

    def flush(self) -> None:
        """Let each keep and show what it has."""
        self._call("flush")

    def close(self) -> None:
        """Close each."""
        self._call("close")
        self._loggers = {}

    def _call(self, method: str, *args: Any, at: tuple[Any, ...] | None = None) -> None:
        """Call it on each; with the step and the figures `at`, where these are new."""
        new = at is None or not self._given.has(*at)
        for name, one in [*self._loggers.items()]:
            if new or one.rewinds:
                with self._guarded(name):
                    getattr(one, method)(*(copy.copy(value) for value in args))

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Drop a logger that raises, and say so. `train.log` gets the traceback."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # `sys.exit` too
            self._loggers.pop(name, None)
            logger.warning(
                "log.to: %s ends here, the run goes on without it: %s", name, reason(error)
            )
            logger.debug("%s", name, exc_info=error)
