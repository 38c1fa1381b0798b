"""The bad images of all processes: listed in a file, and bounded by `data.max_bad_fraction`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, cast

from ddp_ssl.data.loading.bad_images import BadImages, write_list
from ddp_ssl.distributed import World
from ddp_ssl.errors import BadDataError, printable
from ddp_ssl.utils.files import replaced

logger = logging.getLogger("ddp_ssl")


class BadImageList:
    """The bad images among `images` images; rank 0 lists them in the file `path`.

    `found`: those that this process finds.
    """

    def __init__(
        self, found: BadImages, images: int, max_fraction: float, world: World, path: Path
    ) -> None:
        self.found, self.count = found, 0
        self._images, self._max_fraction, self._world, self._path = (
            images, max_fraction, world, path,
        )  # fmt: skip
        self._listed: dict[str, str] = {}  # on rank 0: path and reason, of all processes
        self._new: set[str] = set()  # those found since this process started
        self._whole = True  # whether the file has all that are listed

    def check(self) -> None:
        """Share; raises `BadDataError` on all processes together if there are too many."""
        too_many = self.share()
        if too_many:
            raise BadDataError(too_many)

    def share(self) -> str | None:
        """Count and list the bad images of all processes; a reason if there are too many."""
        parts = self._world.gather_objects(self.found.take_unreported())
        told: tuple[int, str | None] | None = None
        if parts is not None:
            found: dict[str, str] = {}
            for part in parts:
                found |= part
            self._add({where: why for where, why in found.items() if where not in self._listed})
            self._new |= found.keys()
            told = len(self._listed), self._too_many()
        self.count, problem = self._world.broadcast_object(told)
        return cast("str | None", problem)

    def state(self) -> dict[str, str]:
        """Paths and reasons, for the checkpoint."""
        return dict(self._listed)

    def restore(self, listed: dict[str, str]) -> None:
        """Put back the list of a checkpoint, on rank 0; later ones will be found again."""
        self._listed, self.count = dict(listed), len(listed)
        self._write(listed, "w")

    def _too_many(self) -> str | None:
        """Images found by an earlier process do not count: they may be mended."""
        bound, count = self._max_fraction, len(self._new)
        if count <= bound * self._images:
            return None
        first = next(where for where in self._listed if where in self._new)
        return (
            f"data.max_bad_fraction: {count} of {self._images} images cannot be used, more than "
            f"{bound:g} of them; the first is {printable(first)} ({self._listed[first]}), all are "
            f"in {self._path}. Mend them or raise data.max_bad_fraction, and go on with "
            "run.resume=auto; ddp-ssl check-data finds all there are, data.skip leaves them out "
            "of a new run"
        )

    def _add(self, new: dict[str, str]) -> None:
        self._listed |= new
        if new:
            self._write(new, "a")
            where, why = next(iter(new.items()))
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            logger.info(
                "bad image: %s (%s)%s; %d so far", printable(where), why, more, len(self._listed)
            )

    def _write(self, new: dict[str, str], mode: Literal["w", "a"]) -> None:
        """Write these to the file; after a failure, which is said once, the whole list."""
        before = self._whole
        try:
            if mode == "a" and before:
                write_list(self._path, new, mode)
            elif self._listed:
                with replaced(self._path) as temporary:
                    write_list(temporary, self._listed, "w")
            else:
                self._path.unlink(missing_ok=True)
            self._whole = True
        except OSError as error:
            self._whole = False
            if before:
                logger.warning(
                    "%s cannot be written, the list waits in memory and in the checkpoints: %s",
                    self._path, error.strerror,
                )  # fmt: skip
