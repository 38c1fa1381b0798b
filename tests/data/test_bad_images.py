"""Bad images in the middle of an epoch: replaced, listed, and every other sample as it was."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddp_ssl.commands import check_data
from ddp_ssl.config import Data
from ddp_ssl.data.batch import Batch
from ddp_ssl.data.datasets.remote import StoreError
from ddp_ssl.data.datasets.shards import open_shards
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading import reader
from ddp_ssl.data.loading.bad_images import BadImages, write_list
from ddp_ssl.data.loading.loader import EvalLoader, TrainLoader
from ddp_ssl.data.loading.order import permutation
from ddp_ssl.data.loading.reader import Reader, TrainBatches, UnreadableError
from ddp_ssl.data.loading.settings import LoaderSettings
from ddp_ssl.distributed import MeshComm, World
from tests.data.bad import BAD, IMAGES, broken_tables, empty, garbage, victim
from tests.data.images import (
    Pixels,
    array_of,
    eval_of,
    folder_of,
    loader_of,
    pack,
    picture,
    through_a_file,
)
from tests.ranks import Ranks


def cmyk(path: Path) -> None:
    Image.open(path).convert("CMYK").save(path, "JPEG")


def sixteen_bits(path: Path) -> None:
    gray = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(path, "PNG")


def trailing(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more" * 50)


ODD = {"cmyk": cmyk, "16 bits": sixteen_bits, "trailing bytes": trailing}


def compare(ours: Batch, theirs: Batch, bad: set[int]) -> None:
    """Equal to the bit but for bad images, which are replaced by others not in the batch."""
    hit = torch.tensor([int(i) in bad for i in theirs.ids])
    assert torch.equal(ours.ids[~hit], theirs.ids[~hit])
    for a, b in zip(ours.views, theirs.views, strict=True):
        assert torch.equal(a[~hit], b[~hit])
    others = ours.ids[hit].tolist()
    assert not set(others) & (bad | set(theirs.ids.tolist()))
    assert torch.equal(ours.labels, ours.ids)  # labels are ids here


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_replaced_and_listed(tmp_path: Path, kind: str, prefetch: int) -> None:
    spoil, reason = BAD[kind]
    good, _ = (folder_of(tmp_path / name, IMAGES) for name in ("good", "bad"))
    split = Split.of_files(str(tmp_path / "bad"), [good.name(i) for i in range(24)], good.labels)
    hit = {victim(1, 2), victim(1, 5), victim(3, 0)}
    for i in hit:
        spoil(Path(split.where(i)))
    bad = BadImages()
    ours, theirs = loader_of(split, prefetch=prefetch, bad=bad), loader_of(good)
    for _ in range(9):
        compare(next(ours), next(theirs), hit)
    assert set(bad.known) == {split.where(i) for i in hit}
    assert all(reason in why and why and "\n" not in why for why in bad.known.values())


def webp_with_exif(pixels: Pixels, path: Path) -> None:
    about = Image.Exif()
    about[0x010E] = "a camera's"
    Image.fromarray(pixels).save(path, "WEBP", lossless=True, exif=about)


def text_ppm(pixels: Pixels, path: Path) -> None:
    height, width, _ = pixels.shape
    path.write_text(f"P3\n{width} {height}\n255\n{' '.join(map(str, pixels.ravel()))}\n")


def jpeg_2000(pixels: Pixels, path: Path) -> None:
    Image.fromarray(pixels).save(path, "JPEG2000")


def sixteen_bit_jpeg_2000(pixels: Pixels, path: Path) -> None:
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path, "JPEG2000")


@pytest.mark.parametrize(
    "save", [webp_with_exif, text_ppm, jpeg_2000, sixteen_bit_jpeg_2000], ids=lambda f: f.__name__
)
def test_pil_decodes_what_dali_does_not(
    tmp_path: Path, save: Callable[[Pixels, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """As the same images in PNG, which DALI decodes."""
    splits, ids = [], np.arange(6)
    for kind in ("plain", "odd"):
        (tmp_path / kind).mkdir()
        names = [f"{i}.png" for i in ids]
        splits.append(Split.of_files(str(tmp_path / kind), [n.encode() for n in names], ids))
    for i in ids:
        pixels = picture(i, 20, 24)
        gray = save is sixteen_bit_jpeg_2000
        Image.fromarray(pixels[..., 0] if gray else pixels).save(splits[0].where(i))
        (save if i % 2 else jpeg_2000)(pixels, Path(splits[1].where(i)))
    odd = [i for i in ids if i % 2]
    bad = BadImages()
    with caplog.at_level("INFO", "ddp_ssl"):
        ours, theirs = (list(eval_of(split, odd, bad=bad)) for split in reversed(splits))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.views[0], b.views[0])
    assert not bad.known
    assert "images that PIL decodes, one at a time and not DALI: 1, the last " in caplog.text
    loader = loader_of(splits[1], global_batch=3, bad=bad)
    trained = torch.cat([next(loader).ids for _ in range(2)])
    assert trained.tolist() == permutation(3, 0, 6).tolist()
    assert not bad.known


def test_what_other_threads_read_explains_nothing(tmp_path: Path) -> None:
    """`examine` says whether one of its own images is for PIL."""
    split = folder_of(tmp_path, 3)
    for i in (1, 2):
        jpeg_2000(picture(i), Path(split.where(i)))
    how = LoaderSettings.of(Data(name="folder", root=str(tmp_path)), torch.device("cpu"))
    reader = Reader(split, lambda step: np.arange(3), how, BadImages())
    usable = reader.usable

    def meanwhile(encoded: Any, i: int) -> Any:
        reader.load([1])
        return usable(encoded, i)

    reader.usable = meanwhile  # type: ignore[method-assign]
    assert not reader.examine([0])
    assert not reader.examine([1])  # known, and read as a PNG
    assert reader.examine([0, 2])
    reader.close()


def test_shards_hold_images_that_dali_decodes(tmp_path: Path) -> None:
    """A stream has no PIL; shards of earlier versions may need it, and are found."""
    root = tmp_path / "files" / "a"
    root.mkdir(parents=True)
    for i, save in enumerate((jpeg_2000, webp_with_exif, text_ppm)):
        save(picture(i), root / f"{i}.{('jp2', 'webp', 'ppm')[i]}")
    assert pack(root.parent, tmp_path / "out") == 0
    packed = open_shards(tmp_path / "out").train
    split = Split.of_files(str(root), [b"0.jp2", b"1.webp", b"2.ppm"], np.zeros(3))
    for i in range(3):
        png = Image.open(io.BytesIO(packed.read(i).tobytes()))
        assert png.format == "PNG"
        assert np.array_equal(
            np.asarray(png), np.asarray(Image.open(split.where(i)).convert("RGB"))
        )
    assert check_data.Checker({"train": split}, True, 10**6).check("train", 0, 3) == []


def test_no_damaged_jpeg_2000_ends_the_process(tmp_path: Path) -> None:
    split = folder_of(tmp_path, 24)
    rng = np.random.default_rng(0)
    for i in range(0, 24, 2):
        path = Path(split.where(i))
        jpeg_2000(picture(i), path)
        content = bytearray(path.read_bytes())
        if i % 4:
            content = content[: len(content) // 2]
        for place in rng.integers(100, len(content), 8):
            content[place] ^= 1 << rng.integers(8)
        path.write_bytes(content)
    bad, seen = BadImages(), []
    loader = loader_of(split, bad=bad)
    for _ in range(8):
        seen += next(loader).ids.tolist()
    cut = {split.where(i) for i in range(0, 24, 2) if i % 4}
    assert cut <= set(bad.known)
    assert not {split.where(i) for i in seen} & set(bad.known)


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_are_used(tmp_path: Path, kind: str) -> None:
    split, bad = folder_of(tmp_path, IMAGES), BadImages()
    for i in range(0, IMAGES, 2):
        ODD[kind](Path(split.where(i)))
    loader = loader_of(split, bad=bad)
    ids = torch.cat([next(loader).ids for _ in range(4)])
    assert ids.tolist() == permutation(3, 0, IMAGES).tolist()
    assert not bad.known


@pytest.mark.parametrize("kind", ["truncated", "broken tables"])
def test_resuming_beside_a_bad_file_is_exact(tmp_path: Path, kind: str) -> None:
    split = folder_of(tmp_path, IMAGES)
    BAD[kind][0](Path(split.where(victim(2, 1))))
    going = loader_of(split)
    for step in range(4):
        resumed = loader_of(split, prefetch=3)
        assert resumed.load_state(through_a_file(going.state()), step) is None
        batch, again = next(going), next(resumed)
        assert torch.equal(batch.ids, again.ids)
        assert all(torch.equal(a, b) for a, b in zip(batch.views, again.views, strict=True))


def test_replacements_are_the_same_however_they_are_found(tmp_path: Path) -> None:
    """By the markers or by the decoder, early or late, in this epoch or known from the last."""
    ids = []
    for kind in ("deleted", "broken tables"):
        split = folder_of(tmp_path / kind, IMAGES)
        for step in range(4):
            BAD[kind][0](Path(split.where(victim(step, step))))
        for start in (0, 4):
            loader = loader_of(split, prefetch=1 + start)
            loader.load_state({}, start)
            ids.append([next(loader).ids.tolist() for _ in range(8 - start)])
    assert ids[0] == ids[2]
    assert ids[1] == ids[3] == ids[0][4:]


def test_a_read_that_fails_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, failed, bad = folder_of(tmp_path, IMAGES), [], BadImages()
    read = Split.read

    def stale(self: Split, i: int) -> Any:
        if i == 7 and not failed:
            failed.append(i)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(self, i)

    monkeypatch.setattr(reader, "RETRIES", (0.0,))
    monkeypatch.setattr(Split, "read", stale)
    ids = [i for _ in range(4) for i in next(loader_of(split, bad=bad, global_batch=24)).ids]
    assert failed
    assert 7 in ids
    assert not bad.known


@pytest.mark.parametrize("prefetch", [1, 2])
def test_when_nothing_is_left_it_is_known_some_steps_ahead(tmp_path: Path, prefetch: int) -> None:
    split = folder_of(tmp_path, IMAGES)
    loader = loader_of(split, prefetch=prefetch)
    next(loader)
    assert loader.failing is None
    for i in range(IMAGES):
        garbage(Path(split.where(i)))
    early = 0
    for _ in range(20):
        next(loader)
        early += loader.failing is not None
        if early == prefetch:  # enough for all processes to stop together
            break
    assert early == prefetch
    for _ in range(2):  # and it stays so
        with pytest.raises(UnreadableError, match="none can be used") as caught:
            _ = [next(loader) for _ in range(20)]
        assert "\n" not in str(caught.value)


def test_another_error_of_dali_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddp_ssl.data.loading.decodable import dali_message

    error = RuntimeError("Error in operator `x`,\ntraceback:\nError in thread 0: no memory\n\nBye.")
    assert dali_message(error) == "DALI stopped: Error in thread 0: no memory"
    assert dali_message(StopIteration()) == "DALI stopped: StopIteration"

    def fails(self: TrainLoader, info: Any) -> Any:
        raise RuntimeError("Error: something else")

    monkeypatch.setattr(TrainLoader, "_fetch", fails)
    loader = loader_of(array_of(12))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^DALI stopped: .*something else"):
            next(loader)


def test_the_list_of_a_run_can_be_skipped(tmp_path: Path) -> None:
    """Names of any bytes, files and shards: what the loader lists is what `data.skip` takes."""
    from ddp_ssl.commands import pack_shards
    from ddp_ssl.config import Data
    from ddp_ssl.data.datasets import registry

    for i in range(IMAGES):
        name = os.fsencode(f"{i:02d}").replace(b"7", b"\xff\xe9") + b".jpg"
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / "a"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(i)).save(folder / "x.jpg")
            os.rename(folder / "x.jpg", os.path.join(os.fsencode(folder), name))
    root = tmp_path / "data"
    for path in (root / "train" / "a").iterdir():
        if b"\xff" in os.fsencode(path):
            broken_tables(path)
    packing = ["--out", str(tmp_path / "shards"), "data.name=folder", f"data.root={root}"]
    assert pack_shards.main(packing) == 0
    for place in ("data", "shards"):
        data, bad = Data(name="folder", root=str(tmp_path / place)), BadImages()
        split = registry.load(data, 0).train
        loader = loader_of(split, bad=bad)
        _ = [next(loader) for _ in range(4)]
        assert len(bad.known) == 2
        write_list(tmp_path / "bad.txt", bad.known)
        skipping = data.model_copy(update={"skip": str(tmp_path / "bad.txt")})
        kept = registry.load(skipping, 0).train
        assert len(kept) == IMAGES - 2
        assert not any(b"\xff" in kept.name(i) for i in range(len(kept)))


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BAD)
def test_evaluation_leaves_bad_images_out(tmp_path: Path, kind: str) -> None:
    split = folder_of(tmp_path / "a", 20)
    before = list(eval_of(split, np.arange(20)))
    for i in (3, 4, 17):
        BAD[kind][0](Path(split.where(i)))
    bad = BadImages()
    after = list(eval_of(split, np.arange(20), bad=bad))
    assert len(bad.known) == 3
    for a, b in zip(after, before, strict=True):
        hit = torch.tensor([int(i) in (3, 4, 17) for i in b.ids])
        assert torch.equal(a.ids, torch.where(hit, -1, b.ids))
        assert a.labels[hit].tolist() == [-1] * int(hit.sum())
        assert torch.equal(a.views[0][~hit], b.views[0][~hit])


def test_an_evaluation_of_bad_images_only_is_all_padding(tmp_path: Path) -> None:
    split = folder_of(tmp_path, 5)
    for i in range(5):
        empty(Path(split.where(i)))
    loader: EvalLoader = eval_of(split, np.arange(5))
    assert [batch.ids.tolist() for batch in loader] == [[-1] * 4] * 2


@pytest.mark.parametrize("away", [2, 3])
def test_a_store_that_goes_while_bad_images_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: int
) -> None:
    """DALI refuses an image of step 2; those of step `away` cannot be read again."""
    split = folder_of(tmp_path, IMAGES)
    broken_tables(Path(split.where(victim(2, 0))))
    loader = loader_of(split)
    source, read, lost = loader._source, Split.read, set[int]()

    def reads(self: Split, i: int) -> Any:
        if i in lost:
            raise StoreError("data.root: no answer")
        return read(self, i)

    def mend(steps: Any) -> bool:
        lost.update(loader.order.ids(away).tolist())
        return TrainBatches.mend(source, steps)

    monkeypatch.setattr(Split, "read", reads)
    monkeypatch.setattr(source, "mend", mend)
    got = [next(loader).ids.tolist() for _ in range(away)]
    assert (loader.failing is not None) == (away > 2)  # in time for a checkpoint
    assert all(len(ids) == 6 and -1 not in ids for ids in got)
    assert [victim(2, 0) in ids for ids in got] == [False] * away
    with pytest.raises(UnreadableError, match=r"^data\.root: no answer$"):
        next(loader)
    assert lost


# --- view groups ---------------------------------------------------------------------------------


def groups(world: World, root: str, broken: list[int], ahead: bool = False) -> Any:
    """Two views of every image on two ranks; images `broken` fail on the last rank alone.

    With `ahead` that rank finds out about bad images before the others, as after an error.
    """
    comm = MeshComm(world, 2)
    names = [f"{i:03d}.jpg".encode() for i in range(IMAGES)]
    split, bad = Split.of_files(root, names, np.arange(IMAGES)), BadImages()
    if world.rank == world.size - 1:
        read = Split.read

        def fails(self: Split, i: int) -> Any:
            if i in broken:
                raise OSError(errno.EACCES, "not for you")
            return read(self, i)

        Split.read = fails  # type: ignore[method-assign]
    view = loader_of(split).views[0]
    try:
        loader = loader_of(
            split, [view], view_ids=[comm.view_rank], shard=comm.data_rank, bad=bad,
            num_shards=comm.data_shards, salt=world.rank, agree=comm.view_union,
        )  # fmt: skip
        batches = [next(loader)]
        if ahead and world.rank == world.size - 1:
            loader._source.reader.examine(range(IMAGES))
        batches += [next(loader) for _ in range(5)]
    finally:
        if world.rank == world.size - 1:
            Split.read = read  # type: ignore[method-assign]
    return [b.ids.tolist() for b in batches], [b.views[0] for b in batches], bad.known


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_a_view_group_replaces_alike(ranks: Ranks, tmp_path: Path, size: int, ahead: bool) -> None:
    """One file that nobody can read, one that only DALI refuses, and one that one rank cannot."""
    split = folder_of(tmp_path, IMAGES)
    clean = ranks.run(groups, size, str(tmp_path), [])
    here = 5 if size == 4 else 1  # a place that the last group has
    empty(Path(split.where(victim(0, 0))))
    broken_tables(Path(split.where(victim(1, 0))))
    hit = {victim(0, 0), victim(1, 0), victim(2, here)}
    results = ranks.run(groups, size, str(tmp_path), [victim(2, here)], ahead)
    for rank in range(0, size, 2):
        assert results[rank][0] == results[rank + 1][0]
        assert ahead or results[rank][2].keys() == results[rank + 1][2].keys()
    assert set.union(*(set(known) for *_, known in results)) == {split.where(i) for i in hit}
    for (ids, views, _), (ids_before, views_before, _) in zip(results, clean, strict=True):
        replaced = 0
        for now, then, x, y in zip(ids, ids_before, views, views_before, strict=True):
            same = torch.tensor([i not in hit for i in then])
            assert torch.equal(x[same], y[same])
            assert all(a == b for a, b in zip(now, then, strict=True) if b not in hit)
            assert not set(now) & hit
            replaced += int((~same).sum())
        assert replaced
    if size == 4:
        assert not set(results[0][0][0]) & set(results[2][0][0])


def test_a_replacement_that_one_process_cannot_read_is_none(ranks: Ranks, tmp_path: Path) -> None:
    split = folder_of(tmp_path, IMAGES)
    empty(Path(split.where(victim(1, 0))))
    first = ranks.run(groups, 2, str(tmp_path), [])
    taken = first[0][0][1][0]
    second = ranks.run(groups, 2, str(tmp_path), [taken])
    assert second[0][0] == second[1][0]
    assert second[0][0][1][0] not in (taken, victim(1, 0))
    assert second[0][0][1][1:] == first[0][0][1][1:]


def test_replacements_in_a_batch_differ(tmp_path: Path) -> None:
    split = folder_of(tmp_path, IMAGES)
    for place in range(6):
        empty(Path(split.where(victim(0, place))))
    ids = next(loader_of(split)).ids.tolist()
    assert len(set(ids)) == 6


def test_the_replacement_is_not_in_the_batch_of_another_shard(tmp_path: Path) -> None:
    split = folder_of(tmp_path, IMAGES)
    for step in range(4):
        for place in (0, 1, 2):
            empty(Path(split.where(victim(step, place))))
    loaders = [loader_of(split, shard=s, num_shards=2) for s in (0, 1)]
    for step in range(4):
        ids = np.concatenate([next(loader).ids.numpy() for loader in loaders])
        batch = permutation(3, 0, IMAGES)[step * 6 : step * 6 + 6]
        assert (ids[3:] == batch[3:]).all()
        assert not set(ids[:3].tolist()) & set(batch.tolist())


def test_pictures_differ() -> None:
    """What the comparisons rest on."""
    assert len({picture(i).tobytes() for i in range(IMAGES)}) == IMAGES
