"""The classes of ImageNet under their other names: a number, or words instead of a WNID."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NAMES = ("imagenet", "imagenet100")  # the data sets
FOLDER = Path(__file__).parent.parent
SHOWN = 3  # classes in a message

Ints = NDArray[np.int64]


def _lines(file: str) -> tuple[str, ...]:
    text = (FOLDER / file).read_text()
    return tuple(line for line in text.split("\n") if line and not line.startswith("#"))


@functools.cache
def table() -> dict[str, str]:
    """The words of each class by WNID, in the order of the class's index."""
    return dict(line.split(" ", 1) for line in _lines("imagenet_classes.txt"))


def imagenet100() -> tuple[str, ...]:
    """The WNIDs of ImageNet-100: CMC (Tian et al. 2020)."""
    return _lines("imagenet100_classes.txt")


def is_wnid(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None


def classes_of(
    name: str, given: tuple[str, ...], largest: int, where: str
) -> tuple[tuple[str, ...], Ints]:
    """The classes of `imagenet` or `imagenet100` as their folders are called, sorted.

    `given` are the names that the data have for them, empty where labels are only numbers up to
    `largest`. Also returns the number of each label, int64, -1 for images to leave out. Raises
    `ValueError` (key `data.root`) for classes that are not known or that are missing.
    """
    wnids = _wnids(name, given, largest, where)
    twice = sorted({wnid for wnid in wnids if wnids.count(wnid) > 1})
    if twice:
        raise ValueError(
            f"data.root: {where} has {twice[0]} ({table()[twice[0]]}) as two of its classes"
        )
    if name == "imagenet100":
        wanted = imagenet100()
        lacking = [wnid for wnid in wanted if wnid not in wnids]
        if lacking:
            others = [wnid for wnid in wnids if wnid not in wanted]
            has = f", and has others instead, {_shown(others)}" if len(wnids) <= 100 else ""
            raise ValueError(
                f"data.root: {where} lacks {len(lacking)} of the 100 classes of ImageNet-100, "
                f"{_shown(lacking)}{has}; accepted: the classes of CMC, as docs/data.md says; "
                "data.name=parquet takes any"
            )
    else:
        wanted = tuple(sorted(wnids))
    number = {wnid: i for i, wnid in enumerate(wanted)}
    return wanted, np.array([number.get(wnid, -1) for wnid in wnids], np.int64)


def _wnids(name: str, given: tuple[str, ...], largest: int, where: str) -> list[str]:
    """The WNID of each label."""
    every = list(table())
    if not given:
        if largest != len(every) - 1:
            raise ValueError(
                f"data.root: {where} has labels up to {largest} without names of the classes; "
                f"data.name={name} looks for names, or for ImageNet-1k's numbers 0 to 999"
            )
        return every
    if len(given) == len(every):
        agreeing = sum(wnid in _candidates(word) for wnid, word in zip(every, given, strict=True))
        if agreeing > len(every) / 2:  # ImageNet's own order, whatever words some classes have
            pairs = zip(every, given, strict=True)
            return [word if word in table() else wnid for wnid, word in pairs]
    preferred = set(imagenet100()) if name == "imagenet100" else set()
    found, unknown = [], []
    for word in given:
        candidates = _candidates(word)
        one = [wnid for wnid in candidates if wnid in preferred] or candidates
        if len(one) == 1:
            found.append(one[0])
        else:
            unknown.append(word)
    if unknown:
        words = ", ".join(repr(word) for word in unknown[:SHOWN])
        raise ValueError(
            f"data.root: {where}: {len(unknown)} of its {len(given)} classes are not known as one "
            f"of ImageNet's, {words}; accepted: WNIDs, or names such as "
            "'bonnet, poke bonnet'; data.name=parquet takes any"
        )
    return found


@functools.cache
def _by_words() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The classes by all of their words, and by the first of them."""
    whole: dict[str, list[str]] = {}
    first: dict[str, list[str]] = {}
    for wnid, words in table().items():
        whole.setdefault(_plain(words), []).append(wnid)
        first.setdefault(_plain(words.partition(",")[0]), []).append(wnid)
    return whole, first


def _candidates(word: str) -> list[str]:
    """The classes that may be meant."""
    if word in table():
        return [word]
    whole, first = _by_words()
    return whole.get(_plain(word)) or first.get(_plain(word), [])


def _plain(words: str) -> str:
    return re.sub(r"[\s_]+", " ", words.casefold()).strip()


def _shown(wnids: list[str]) -> str:
    more = ", ..." if len(wnids) > SHOWN else ""
    return ", ".join(f"{wnid} ({table()[wnid]})" for wnid in wnids[:SHOWN]) + more
