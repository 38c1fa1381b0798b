"""Whether a run has collapsed, from the metrics of its validations. docs/troubleshooting.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

Metrics = Mapping[str, float]

FEWEST = 50
"""With fewer validation images ranks and spreads are mostly chance."""
LOST = 1 / 3
"""A rank or a spread below this share of the untrained network's is low. Methods that train raise
the spread manyfold, at times after a dip to two thirds of the rank; the rank of Z of one that needs
few directions may fall below it, SimCLR's on pictures from 53 to 17, DINO's from 46 to 8."""
FEW_DIMENSIONS = 3
"""Z has few dimensions below this rank. Collapses of all methods on the digits reach at most 2.6;
DINO and ReSSL train with a low spread and at least 3.2."""
GONE = 1 / 10
"""A spread of Z below this share counts whatever the rank, since the rank of noise is high. ReSSL,
DINO and DeepCluster v2 on a tiny network keep at least a seventh of it and learn."""
GAIN = 0.02
"""k-NN accuracy that is higher by this shows that the representation has learned."""
FALL = 0.05
"""k-NN accuracy that is lower by this at the end, and by three standard errors, has fallen."""
ADVICE = (
    "what usually helps: a lower optim.lr, a longer optim.warmup_epochs, a larger data.batch_size, "
    "the method's own weights and temperature at their defaults; see docs/troubleshooting.md"
)
FINE = "no sign of a collapse"


def verdict(first: Metrics, now: Metrics, images: int, ended: bool) -> str | None:
    """`FINE`, or what collapsed in a line; None where too little is measured to say.

    `first`: the metrics at step 0; `now`: the latest; `images`: validation images.
    k-NN alone counts when the run has ended: it may dip while the ranks rise.
    """
    ranks = {"rep/effective_rank_r", "rep/effective_rank_z"}
    if images < FEWEST or not ranks <= first.keys() & now.keys():
        return None
    before, after = (metrics.get("eval/knn_top1", math.nan) for metrics in (first, now))
    learned = after > before + GAIN
    found = [*_lost(first, now, "z", learned, ended), *_lost(first, now, "r", learned, ended)]
    error = math.sqrt(max(before * (1 - before), 0) / images)
    fell = after < before - max(FALL, 3 * error)
    kind = "collapsed" if found else "worse than at step 0"
    if fell and (found or ended):
        found.append(f"k-NN top-1 fell from {before:.3f} to {after:.3f}")
    return f"{kind}: {'; '.join(found)}" if found else FINE


def _lost(first: Metrics, now: Metrics, space: str, learned: bool, ended: bool) -> Iterator[str]:
    """What the representations (`r`) or the embeddings (`z`) have lost.

    A representation that classifies better has learned, whatever its figures. If it does not, a low
    rank or spread of Z counts where both are low or Z has few dimensions. If it does, Z may pass
    through few dimensions, but not end there.
    """
    rank, spread = f"rep/effective_rank_{space}", f"rep/uniformity_{space}"
    # Uniformity is 0 if all vectors point the same way, and below 0 the more they are spread.
    wide, left = -first.get(spread, math.nan), -now.get(spread, math.nan)
    low_rank, low_spread = now[rank] < LOST * first[rank], left < LOST * wide
    counts, gone = not learned, False
    if space == "z":
        few = now[rank] < FEW_DIMENSIONS
        counts = (few and (ended or not learned)) or (low_rank and low_spread and not learned)
        gone = left < GONE * wide
    name = space.upper()
    if not math.isfinite(now[rank]):
        yield f"effective rank of {name} is {now[rank]}"
    elif low_rank and counts:
        yield f"effective rank of {name} fell from {first[rank]:.1f} to {now[rank]:.1f}"
    if gone or (low_spread and counts):
        yield f"spread of {name} fell from {wide:.2g} to {left:.2g}"
