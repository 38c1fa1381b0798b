"""Labels that no classifier can use leave the images unlabelled, and one line says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddp_ssl.data.datasets import registry
from ddp_ssl.data.recognise import look_at
from ddp_ssl.run.configure import load
from tests.data.images import write

LAYOUTS = {
    "flat": ("images/{i}.png", "masks/{i}.png"),
    "split": ("train/images/{i}.png", "train/labels/{i}.png"),
    "ADE20K": ("images/training/{i}.png", "annotations/training/{i}.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_beside_images_are_no_images(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for i in range(4):
        for place in LAYOUTS[layout]:
            write(tmp_path / place.format(i=i), i)
    data = load(["folder/adadim", f"data.root={tmp_path}"]).config.data
    assert look_at(data, "folder").images == 3
    made = registry.load(data, 0)
    assert made.num_classes == 0
    wanted = tmp_path / LAYOUTS[layout][0].partition("{")[0]
    assert {Path(made.train.where(i)).parent for i in range(3)} == {wanted}
    assert sum("pretraining needs no masks" in record.message for record in caplog.records) == 1


def test_a_list_of_several_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    lines = ["path,edema,fracture"]
    for i in range(4):
        write(tmp_path / f"{i}.png", i)
        lines.append(f"{i}.png,{i % 2},{'' if i else '-1.0'}")
    (tmp_path / "a.csv").write_text("\n".join(lines))
    data = load(["list/adadim", f"data.files={tmp_path}/a.csv"]).config.data
    made = registry.load(data, 0)
    assert (len(made.train), made.num_classes) == (3, 0)
    assert sum("2 columns of labels" in record.message for record in caplog.records) == 1
