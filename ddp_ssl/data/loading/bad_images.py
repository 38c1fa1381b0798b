"""Images of a run that cannot be used, and the file that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ddp_ssl.data.datasets.split import Split


class BadImages:
    """The images of a run that cannot be used, each with the reason.

    Readers look them up by id within a split (`of`); people and other processes see names.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        """All bad images, by `Split.where`."""
        self.unreported: dict[str, str] = {}
        """Bad images that the other processes have not been told of."""
        self._by_split: dict[str, dict[int, str]] = {}

    def of(self, split: Split) -> Mapping[int, str]:
        """The bad images of a split by id, a view that also shows later additions."""
        return self._of(split.digest)

    def add(self, split: Split, i: int, reason: str) -> None:
        """Record that image `i` of `split` cannot be used; the first reason given stays."""
        self._of(split.digest).setdefault(i, reason)
        if split.shards is not None:
            reason += f" (in {split.shards.path_of(i)})"
        self._add_name(split.where(i), reason)

    def take_unreported(self) -> dict[str, str]:
        """Return the unreported images and count them as reported."""
        taken, self.unreported = self.unreported, {}
        return taken

    def copy(self) -> BadImages:
        """A copy for a reader in another thread, without unreported images."""
        made = BadImages()
        made.known = dict(self.known)
        made._by_split = {digest: dict(found) for digest, found in self._by_split.items()}
        return made

    def merge(self, other: BadImages) -> None:
        """Add the images that a reader found with a copy of this."""
        for where, reason in other.unreported.items():
            self._add_name(where, reason)
        for digest, found in other._by_split.items():
            self._of(digest).update(found)

    def _of(self, digest: str) -> dict[int, str]:
        return self._by_split.setdefault(digest, {})

    def _add_name(self, where: str, reason: str) -> None:
        if where not in self.known:
            self.known[where] = self.unreported[where] = reason


def write_list(path: Path, listed: dict[str, str], mode: Literal["w", "a"] = "w") -> None:
    """Write bad images and reasons as a file that `data.skip` takes; names may be any bytes."""
    with path.open(mode, encoding="utf-8", errors="surrogateescape") as file:
        for where, reason in listed.items():
            file.write(" ".join(where.splitlines()) + f"\t{reason}\n")
