"""Fetch a data set where that is allowed, and check that all of it is there.

    ddp-ssl prepare-data cifar100 /data/cifar --download
    ddp-ssl prepare-data imagenet /data/imagenet

Prints images and classes of each split. Ends with 0 only if the numbers are the published ones.
Downloads come from the publisher and are checked by MD5. docs/data.md shows each folder's layout.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddp_ssl.commands import common
from ddp_ssl.config import ConfigError, Data
from ddp_ssl.data.datasets import registry
from ddp_ssl.data.datasets.base import prepare
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.errors import reason, refused
from ddp_ssl.utils.text import summary


class Counts(NamedTuple):
    train: int
    val: int
    classes: int


# As published: for MedMNIST version 3 (2024), then version 2 where that differs.
EXPECTED: dict[str, tuple[Counts, ...]] = {
    "digits": (Counts(1438, 359, 10),),
    "cifar10": (Counts(50_000, 10_000, 10),),
    "cifar100": (Counts(50_000, 10_000, 100),),
    "stl10": (Counts(105_000, 8_000, 10),),
    "tiny_imagenet": (Counts(100_000, 10_000, 200),),
    "cinic10": (Counts(90_000, 90_000, 10),),
    "imagenet": (Counts(1_281_167, 50_000, 1000),),
    "imagenet100": (Counts(126_689, 5_000, 100),),
    "inat21": (Counts(2_686_843, 100_000, 10_000),),
    "inat21_mini": (Counts(500_000, 100_000, 10_000),),
    "blood": (Counts(11_959, 3_421, 8),),
    "organa": (Counts(34_561, 17_778, 11), Counts(34_581, 17_778, 11)),
    "organc": (Counts(12_975, 8_216, 11), Counts(13_000, 8_268, 11)),
    "organs": (Counts(13_932, 8_827, 11), Counts(13_940, 8_829, 11)),
}

BY_HAND = {
    "imagenet": (
        "ImageNet needs a login: get ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from "
        "https://image-net.org/download-images.php and unpack them to train/WNID/ and val/WNID/ "
        "(torchvision.datasets.ImageNet does both, with the devkit beside them)"
    ),
    "imagenet100": "ImageNet-100 is a part of ImageNet: give the folder of data.name=imagenet",
    "digits": "the digits are a part of scikit-learn: pip install scikit-learn",
}

FETCH = "--download fetches it"

# Address and MD5 of archives to unpack and of MedMNIST's files, version 3.
ZENODO = "https://zenodo.org/records/10519652/files"
FILES = {
    "tiny_imagenet": (
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
    ),
    "cinic10": (
        "https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
        "6ee4d0c996905fe93221de577967a372",
    ),
    "blood": (f"{ZENODO}/bloodmnist.npz?download=1", "7053d0359d879ad8a5505303e11de1dc"),
    "organa": (f"{ZENODO}/organamnist.npz?download=1", "68e3f8846a6bd62f0c9bf841c0d9eacc"),
    "organc": (f"{ZENODO}/organcmnist.npz?download=1", "b9ceb9546e10131b32923c5bbeaea2b1"),
    "organs": (f"{ZENODO}/organsmnist.npz?download=1", "9ab87b696fb54e2a387ebe992d6ed5f1"),
}


def download(name: str, root: str) -> None:
    """Fetch into `root` what is not there; raises `ValueError` where it cannot be."""
    if name in BY_HAND:
        raise ValueError(f"--download: {BY_HAND[name]}")
    import torchvision.datasets as known
    from torchvision.datasets import inaturalist
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    Path(root).mkdir(parents=True, exist_ok=True)
    if name in ("cifar10", "cifar100", "stl10"):
        kind = getattr(known, name.upper())
        with fetching(kind.url, kind.tgz_md5, f"unpack it in {root}"):
            kind(root, download=True)
    elif name in ("inat21", "inat21_mini"):
        train = "2021_train" if name == "inat21" else "2021_train_mini"
        for version in (train, "2021_valid"):
            url, md5 = inaturalist.DATASET_URLS[version], inaturalist.DATASET_MD5[version]
            with fetching(url, md5, f"unpack it to {Path(root) / version}"):
                known.INaturalist(root, version, download=True)
    else:
        url, md5 = FILES[name]
        file = Path(url.partition("?")[0]).name
        if not file.endswith(".npz"):
            with fetching(url, md5, f"unpack it in {root}"):
                download_and_extract_archive(url, root, md5=md5)
            return
        with fetching(url, md5, f"save it as {Path(root) / file}"):
            download_url(url, root, file, md5)


@contextlib.contextmanager
def fetching(url: str, md5: str, then: str) -> Iterator[None]:
    """An error becomes a `ConfigError` with the address, for a download by hand."""
    with refused(
        f"--download: {url} cannot be fetched (MD5 {md5})", f"fetch it another way and {then}"
    ):
        yield


def check(name: str, root: str | None) -> list[str]:
    """Load the data set, print what it holds, and return what is wrong with it."""
    made = registry.load(Data(name=name, root=root), seed=0)
    assert made.val is not None
    wrong = []
    for split, images in (("train", made.train), ("val", made.val)):
        used = np.unique(images.labels[images.labels >= 0])
        unlabelled = int((images.labels < 0).sum())
        print(
            f"{name} {split}: {len(images):,} images in {len(used):,} classes"
            + (f", {unlabelled:,} of them unlabelled" if unlabelled else "")
        )
        if len(used) < made.num_classes:
            wrong.append(f"{split} has images of {len(used):,} of {made.num_classes:,} classes")
        wrong += empty_files(split, images)
    found = Counts(len(made.train), len(made.val), made.num_classes)
    if found not in EXPECTED[name]:
        expected = " or ".join(describe(counts) for counts in EXPECTED[name])
        wrong.append(f"found {describe(found)}, expected {expected}")
    return wrong


def empty_files(split: str, images: Split) -> list[str]:
    """Look at a hundred files; `ddp-ssl check-data` looks at all."""
    if images.names is None:
        return []
    some = np.unique(np.linspace(0, len(images) - 1, min(len(images), 100)).astype(np.int64))
    empty = []
    for i in some:
        try:
            good = len(images.read(int(i))) > 0
        except OSError:
            good = False
        if not good:
            empty.append(images.where(int(i)))
    text = f"{split}: {len(empty)} of {len(some)} files looked at are empty"
    return [f"{text}, first {empty[0]}"] if empty else []


def describe(counts: Counts) -> str:
    train, val, classes = (f"{number:,}" for number in counts)
    return f"{train} training and {val} validation images, {classes} classes"


def with_remedy(message: str, name: str, root: str | None) -> str:
    """An error of the loaders, which may name this tool, with what it can do about it."""
    data = Data(name=name, root=root)
    told = prepare(data)
    for end in ("says where from", "checks what is there"):
        message = message.replace(f"; {told} {end}", "")
    message = message.replace(f"{told} --download", "--download")
    if not message.startswith("data.root: ") or "cannot be read" in message or name == "digits":
        return message
    remedy = BY_HAND.get(name, FETCH)
    return message if message.endswith(remedy) else f"{message}; {remedy}"


def main(arguments: list[str] | None = None) -> int:
    parser = common.Parser("ddp-ssl prepare-data", summary(__doc__))
    parser.add_argument("name", choices=sorted(EXPECTED), metavar="NAME", help=", ".join(EXPECTED))
    parser.add_argument("root", metavar="ROOT", nargs="?", help="its folder, data.root of a run")
    parser.add_argument("--download", action="store_true", help="fetch it first, where allowed")
    return common.exit_code(lambda: run(parser.parse_args(arguments)))


def run(given: argparse.Namespace) -> int:
    """Fetch and check what the command line says; returns the exit code."""
    if given.root is None and given.name != "digits":
        raise ConfigError("ROOT is missing: the folder of the data set")
    try:
        if given.download:
            download(given.name, given.root)
        wrong = check(given.name, given.root)
    except Exception as error:  # whatever the files cause in torchvision's readers
        message = (
            reason(error) if given.download else with_remedy(reason(error), given.name, given.root)
        )
        return common.refuse(message, 1)
    for line in wrong:
        print(f"ddp_ssl: error: {line}", file=sys.stderr)
    if not wrong:
        print(f"{given.name}: complete")
    return 1 if wrong else 0
