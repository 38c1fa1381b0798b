"""Seeds: a random stream of its own for each purpose."""

import hashlib

import numpy as np


def hashed(*key: object, bits: int = 31) -> int:
    """A number of `bits` bits from the key's `repr`.

    The same on every machine and in every process, unlike Python's `hash`.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest, "little") & ((1 << bits) - 1)


def generator(*key: object) -> np.random.Generator:
    """A counter-based generator (Philox) keyed by `key`."""
    return np.random.Generator(np.random.Philox(key=hashed(*key, bits=128)))


def derive(seed: int, *names: object) -> int:
    """A seed of 31 bits for the purpose in `names`."""
    return hashed(seed, *names, bits=32) >> 1
