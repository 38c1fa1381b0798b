"""Parquet files in the schema that `datasets` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddp_ssl.config import Data
from ddp_ssl.data.datasets import registry

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
Cell = dict[str, Any] | None


def table_of(
    cells: Sequence[Cell], labels: Sequence[int | None], names: Sequence[str] | None, **more: Any
) -> pa.Table:
    """A table as `datasets` makes it: images with paths, labels with the names of the classes."""
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    features["label"] = {"dtype": "int64", "_type": "Value"}
    if names is not None:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    columns = {"image": pa.array(cells, IMAGE), "label": pa.array(labels, pa.int64()), **more}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(about)


def write_table(path: Path, table: pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **{"row_group_size": 7} | options)
    return path


def as_parquet(folder: Path, out: Path, files: int = 2, named: bool = True, **options: Any) -> Path:
    """The images of `folder`, of `train/` and `val/` or all, as a snapshot of the hub has them."""
    data = Data(name="folder", root=str(folder))
    made = registry.definition_of(data).load(data)
    for split, name in ((made.train, "train"), (made.val, "validation")):
        if split is None:
            continue
        cells: list[Cell] = []
        for i in range(len(split)):
            path = Path(split.where(i))
            cells.append({"bytes": path.read_bytes(), "path": path.name if named else None})
        for k in range(files):
            part = slice(k * len(split) // files, (k + 1) * len(split) // files)
            table = table_of(cells[part], split.labels[part].tolist(), made.class_names)
            write_table(out / "data" / f"{name}-{k:05d}-of-{files:05d}.parquet", table, **options)
    return out
