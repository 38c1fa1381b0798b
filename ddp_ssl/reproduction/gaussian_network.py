"""AdaDim's simulation with a network in place of PCA: I(R;Z) over training (Figure 11)."""

import copy
import itertools
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch import nn

from ddp_ssl.losses import info_nce, vicreg
from ddp_ssl.reproduction.gaussian import SAMPLES, Array, blobs, information

EPOCHS, BATCH, TEMPERATURE, NOISE = 1000, 256, 0.1, 0.5
LOSSES = ("simclr", "vicreg")


def network() -> nn.Sequential:
    """Five layers of 20 units with ReLU, then the projector: 5 units, ReLU, 5 outputs."""
    widths = [25, 20, 20, 20, 20, 20, 5]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(5, 5))


def train_network(loss: str, seed: int, epochs: int = EPOCHS) -> list[float]:
    """I(R;Z) of the clean data and the network's output, before training and after each epoch.

    NaN where it is infinite.
    """
    torch.set_num_threads(1)
    clean = blobs(25, 0.01, seed)
    torch.manual_seed(seed)
    model, x = network(), torch.from_numpy(clean).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.999))

    def measured() -> float:
        exact = copy.deepcopy(model).double()  # float32's rounding would be noise in Z
        with torch.no_grad():
            z = exact(torch.from_numpy(clean)).numpy()
        value = information(clean, z, delta=0)  # Z is no linear map of R, so no floor is needed
        return value if np.isfinite(value) else float("nan")

    curve = [measured()]
    for _ in range(epochs):
        for images in torch.split(torch.randperm(SAMPLES), BATCH):
            views = x[images] + NOISE * torch.randn(2, len(images), x.shape[1])
            z = model(views)
            value = info_nce(z, TEMPERATURE) if loss == "simclr" else vicreg(z).loss
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        curve.append(measured())
    return curve


def train_networks(
    seeds: Sequence[int], epochs: int = EPOCHS, processes: int = 2
) -> dict[str, list[list[float]]]:
    """`train_network` for both losses and every seed, some at a time."""
    jobs = [(loss, seed) for loss in LOSSES for seed in seeds]
    found: dict[str, list[list[float]]] = {loss: [] for loss in LOSSES}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(train_network, *job, epochs) for job in jobs]
        for (loss, seed), future in zip(jobs, futures, strict=True):
            curve = future.result()
            found[loss].append(curve)
            told = (f"{curve[epoch]:6.2f} @{epoch}" for epoch in checkpoints(epochs))
            print(f"{loss} seed {seed}: {'  '.join(told)}", flush=True)
    return found


def checkpoints(epochs: int) -> tuple[int, ...]:
    """The epochs that are compared: start, a tenth, half, end."""
    return 0, epochs // 10, epochs // 2, epochs


def gains(curves: Sequence[Sequence[float]]) -> tuple[Array, Array]:
    """The gain of I(R;Z) of each seed in the first tenth and in the second half."""
    values = np.array(curves)
    start, tenth, half, end = checkpoints(values.shape[1] - 1)
    return values[:, tenth] - values[:, start], values[:, end] - values[:, half]


def missed_in_training(found: dict[str, list[list[float]]]) -> list[str]:
    """Whether the mean rises at first and then levels off, one line for each loss that does not."""
    missed = []
    for loss, curves in found.items():
        first, second = (float(np.nanmean(gain)) for gain in gains(curves))
        if not (first > 0 and abs(second) < first / 2):
            missed.append(
                f"{loss}: I(R;Z) should rise, then level off; it gains {first:.2f} in the first "
                f"tenth and {second:.2f} in the second half"
            )
    return missed
