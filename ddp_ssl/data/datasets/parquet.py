"""Data sets in parquet files, as Hugging Face's `datasets` writes them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_ssl.data.datasets import index
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.containers import Container, Table, damaged
from ddp_ssl.data.datasets.files import Files
from ddp_ssl.data.datasets.index import Columns
from ddp_ssl.utils.once import warn_once

if TYPE_CHECKING:
    from ddp_ssl.config import Data

NOT_IMAGES = "metadata.parquet"  # what `datasets` calls a table beside image files


class Parquet(Container[Columns]):
    """Files with a column of images."""

    name, suffix, what = "parquet", ".parquet", "parquet files"

    def is_one(self, name: str) -> bool:
        return super().is_one(name) and name != NOT_IMAGES

    def choose(self, data: Data, files: Files) -> Columns:
        return index.columns_of(files.path(files.train[0]), data.columns)

    def read(self, path: str, chosen: Columns, stop: threading.Event) -> Table:
        return index.read_table(path, chosen, stop)

    def look(self, data: Data, sample: int) -> tuple[int, list[bytes]]:
        files = self.files_of(data)
        paths = list(map(files.path, files.train))
        image = self.choose(data, files).image
        rows = sum(index.opened(path).metadata.num_rows for path in paths)
        cells: list[Any] = []
        for batch in index.opened(paths[0]).iter_batches(sample, columns=[image]):
            cells = batch.column(0).to_pylist()
            break
        found = [cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells]
        return rows, [content for content in found if content]

    def load(self, data: Data, files: Files | None = None) -> Dataset:
        made = super().load(data, files)
        where = made.train.shards
        assert where is not None
        if (where.offset < 0).all():
            files = self.files_of(data)
            columns = self.choose(data, files)
            why = "are damaged"
            if not damaged(made.train):
                paths = ", only paths" if columns.named else ""
                why = f"have no bytes in {columns.image!r}{paths}"
            raise ValueError(
                f"data.root: {files.base}: all {len(made.train)} images to train on {why}; "
                "accepted: files that hold the images' bytes, as the hub has them"
            )
        if where.part is not None and np.max(where.part[:, 0]) > 1:
            warn_once(
                f"{data.root}: compressed with another codec than snappy, so that a whole page is "
                "read for each image, which is slow; ddp-ssl pack-shards makes shards of them"
            )
        return made


CONTAINER = Parquet()
DEFINITIONS = {"parquet": CONTAINER.definition}
