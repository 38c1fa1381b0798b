"""Seconds that the metrics of one measurement take: `python tools/bench/metrics.py [--rows 10000]`.

R and Z are random, `rows` x `width` in float32; one process, one thread unless told otherwise.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch

from ddp_ssl import metrics

OF_SPECTRUM: list[Callable[[metrics.Spectrum], object]] = [
    metrics.effective_rank, metrics.rankme, metrics.alpha_req, metrics.von_neumann_entropy,
    metrics.eigenvalue_count, metrics.cumulative_explained_variance,
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    decay = torch.arange(1, options.width + 1, device=options.device) ** -0.5
    r = torch.randn(options.rows, options.width, device=options.device) * decay
    z = torch.randn(options.rows, options.width, device=options.device)
    views = torch.randn(10, min(options.rows, 1000), options.width, device=options.device)

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = action()
        if options.device != "cpu":
            torch.cuda.synchronize()
        print(f"{name:<40} {time.perf_counter() - start:7.2f} s")
        return found

    timed("I(R;Z), entropies, uniformity: pairs", lambda: metrics.pair_means(r, z))
    spectrum = timed("one spectrum (four are taken)", lambda: metrics.Spectrum.of(r))
    timed("all metrics of a spectrum", lambda: [metric(spectrum) for metric in OF_SPECTRUM])
    timed("alignment, 10 views of 1000 images", lambda: metrics.alignment(views))
    timed("LiDAR, 10 views of 1000 images", lambda: metrics.lidar(views))
    print(f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
