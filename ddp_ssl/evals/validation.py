"""One pass over the validation split, and every metric computed from it."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl import metrics
from ddp_ssl.comm import Comm
from ddp_ssl.config import Config, ConfigError
from ddp_ssl.config.views import views_of
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.bad_images import BadImages
from ddp_ssl.data.loading.loader import EvalLoader, TrainLoader
from ddp_ssl.data.loading.order import Order
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings
from ddp_ssl.evals.features import some_of
from ddp_ssl.evals.nearest import knn_predict
from ddp_ssl.losses.common import at_least_float32
from ddp_ssl.methods.base import Method
from ddp_ssl.utils.seeds import hashed

Ids = npt.NDArray[np.int64]
Embed = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Features:
    """Representations `r` `[m, d_R]`, embeddings `z` `[m, d]`, labels and ids `[m]`."""

    r: Tensor
    z: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def known(self) -> "Features":
        """The images that have a label."""
        known = self.labels >= 0
        return Features(self.r[known], self.z[known], self.labels[known], self.ids[known])


def central_crops(
    split: Split, ids: Ids, config: Config, comm: Comm, device: torch.device, bad: BadImages
) -> EvalLoader:
    """This process's share of `split[ids]`, in batches of at most `eval.batch_size` images."""
    return EvalLoader(
        split,
        ids,
        config.data.central_crop,
        LoaderSettings.of(config.data, device),
        batch_size=min(config.eval.batch_size, -(-len(ids) // comm.world_size)),
        shard=comm.rank,
        num_shards=comm.world_size,
        bad=bad,
    )


class Validation:
    """Evaluates a method on a data set, on all processes together.

    Each process extracts the features of its share of the images, in float32 and eval mode. They
    are gathered, so that every process holds all of them. Each computes a share of the metrics.
    """

    def __init__(
        self,
        data: Dataset,
        config: Config,
        comm: Comm,
        device: torch.device,
        bad: BadImages | None = None,
    ) -> None:
        assert data.val is not None
        self.config, self.comm, self.device = config, comm, device
        self.bad = BadImages() if bad is None else bad
        self.bank, self.val = data.labelled, data.val
        self.labelled = self.bank is not None and bool((data.val.labels >= 0).any())
        chooser = np.random.default_rng(config.run.seed)
        bank = 0 if self.bank is None else len(self.bank)
        self.bank_ids = some_of(np.arange(bank), config.eval.knn_bank, chooser)
        self.measured_ids = some_of(np.arange(len(data.val)), config.measure.max_images, chooser)
        drawn = min(config.measure.view_images, len(self.measured_ids))
        if config.measure.views and drawn < max(2, comm.world_size):
            raise ConfigError(
                f"measure.views: the views of {drawn} validation images cannot be compared by "
                f"{comm.world_size} process(es), which need two images or more and one each; 0 is "
                "accepted"
            )
        self.measure_s = 0.0  # seconds of the last measurement, without the pass over the split
        self.spectra: dict[str, Tensor] = {}  # the last measurement's shares of the eigenvalues

    def metrics(
        self,
        method: Method[Any],
        probe: nn.Module | None,
        evaluate: bool,
        measure: bool,
        average: nn.Module | None = None,
    ) -> dict[str, float]:
        """`eval/*` if `evaluate`, and `rep/*` if `measure`; restores the method's mode.

        `average`: another backbone in eval mode, whose accuracies are `eval/*_ema`.
        """
        training = method.training
        method.eval()
        ids = np.arange(len(self.val)) if evaluate else self.measured_ids
        val = self._extract(method.embed, self.val, ids)
        values: dict[str, float] = {}
        if evaluate and self.labelled:
            values |= self._accuracies(method.embed, probe, val)
            if average is not None:
                other = self._accuracies(_only_features(average), probe)
                values |= {f"{n}_ema": value for n, value in other.items() if n.endswith("_top1")}
        if measure:
            keep = torch.isin(val.ids, torch.from_numpy(self.measured_ids).to(val.ids.device))
            start = time.perf_counter()
            if keep.any():  # at least one image can be read
                values |= self._representation(val.r[keep], val.z[keep])
            if self.config.measure.views:
                values |= self._compare_views(method.embed)
            self.measure_s = time.perf_counter() - start
        method.train(training)
        return values

    def raw_pixels(self) -> float | None:
        """k-NN top-1 of the raw pixels, averaged down to 32 x 32 if larger; None without images."""

        def pixels(x: Tensor) -> Tensor:
            return F.interpolate(x, size=(32, 32), mode="area") if x.shape[-1] > 32 else x

        assert self.bank is not None
        embed = _only_features(pixels)
        bank = self._extract(embed, self.bank, self.bank_ids)
        val = self._extract(embed, self.val, np.arange(len(self.val))).known()
        return self._knn(bank, val) if len(bank) and len(val) else None

    @torch.no_grad()
    def _extract(self, embed: Embed, split: Split, ids: Ids) -> Features:
        """Features of `split[ids]` without bad images, in the order of `ids`, on every process."""
        loader = central_crops(split, ids, self.config, self.comm, self.device, self.bad)
        parts = [(*embed(b.views[0]), b.labels, b.ids.to(b.labels.device)) for b in loader]
        r, z, labels, at = (
            self.comm.gather(torch.cat(part)[None]).flatten(0, 1)
            for part in zip(*parts, strict=True)
        )
        # Put the shares back in order by position, since ids need not be sorted. Padding has no id.
        position = torch.full((len(split),), -1, dtype=torch.long, device=at.device)
        position[torch.from_numpy(ids).to(at.device)] = torch.arange(len(ids), device=at.device)
        real = at >= 0
        order = position[at[real]].argsort()
        r, z, labels, at = (x[real][order] for x in (r, z, labels, at))
        return Features(r, z, labels, at)

    def _accuracies(
        self, embed: Embed, probe: nn.Module | None, val: Features | None = None
    ) -> dict[str, float]:
        values: dict[str, float] = {}
        if val is None:
            val = self._extract(embed, self.val, np.arange(len(self.val)))
        val = val.known()
        if not len(val):
            return values
        if probe is not None:
            with torch.no_grad():
                correct = probe(val.r).argmax(1) == val.labels
            values["eval/probe_top1"] = float(correct.double().mean())
        if self.config.eval.knn:
            assert self.bank is not None
            bank = self._extract(embed, self.bank, self.bank_ids)
            if len(bank):
                values["eval/knn_top1"] = self._knn(bank, val)
                values["eval/knn_bank"] = len(bank)
        return values

    def _knn(self, bank: Features, val: Features) -> float:
        """Top-1, each process classifying its share of the validation images."""
        share = slice(self.comm.rank, None, self.comm.world_size)
        settings = self.config.eval
        predicted = knn_predict(
            bank.r, bank.labels, val.r[share], settings.knn_k, settings.knn_temperature
        )
        correct = (predicted == val.labels[share]).sum().double()
        return float(self.comm.sum(correct)) / len(val)

    def _representation(self, r: Tensor, z: Tensor) -> dict[str, float]:
        """Metrics of `r` `[m, d_R]` and `z` `[m, d]`, whole on every process; `docs/metrics.md`."""
        pairs = metrics.pair_means(r, z, self.comm)
        values = {
            "rep/mutual_information": pairs.mutual_information,
            "rep/embedding_std": float(F.normalize(z, dim=1).std(0).mean()),
        }
        if r.shape[1] == z.shape[1]:
            values["rep/mutual_information_cov"] = metrics.mutual_information(
                r, z, "cov", self.comm
            )
        for owner, (name, x) in enumerate({"r": r, "z": z}.items()):
            spectrum = metrics.Spectrum.of(x, comm=self.comm, owner=2 * owner)
            centred = metrics.Spectrum.of(x, center=True, comm=self.comm, owner=2 * owner + 1)
            self.spectra[name] = spectrum.shares
            found = {
                "effective_rank": float(metrics.effective_rank(spectrum)),
                "rankme": metrics.rankme(spectrum),
                "von_neumann_entropy": metrics.von_neumann_entropy(spectrum),
                "renyi_entropy": getattr(pairs, f"renyi_entropy_{name}"),
                "eigenvalue_count": metrics.eigenvalue_count(spectrum),
                "eigenvalue_count_centred": metrics.eigenvalue_count(centred),
                "cev": metrics.cumulative_explained_variance(spectrum),
                "cev_centred": metrics.cumulative_explained_variance(centred),
            }
            if len(x) > 1:
                found["uniformity"] = getattr(pairs, f"uniformity_{name}")
            with contextlib.suppress(ValueError):  # too few dimensions left for a line
                found["alpha_req"], found["alpha_req_r2"] = metrics.alpha_req(centred)
            values |= {f"rep/{metric}_{name}": value for metric, value in found.items()}
        return values

    def _compare_views(self, embed: Embed) -> dict[str, float]:
        """Alignment and LiDAR of `measure.views` random views of validation images."""
        r, z = self._extract_views(embed)
        values = {}
        for name, x in (("r", r), ("z", z)):
            values[f"rep/alignment_{name}"] = metrics.alignment(x, self.comm)
            values[f"rep/lidar_{name}"] = metrics.lidar(x, self.comm)
        return values

    @torch.no_grad()
    def _extract_views(self, embed: Embed) -> tuple[Tensor, Tensor]:
        """`r` `[q, n, d_R]` and `z` `[q, n, d]` of this process's share of the images."""
        parts: list[tuple[Tensor, Tensor]] = []
        loader, rounds = self.view_loader()
        for _ in range(rounds):
            outputs = [embed(view) for view in next(loader).views]
            r, z = (torch.stack(part) for part in zip(*outputs, strict=True))
            parts.append((r, z))
        loader.close()
        all_r, all_z = zip(*parts, strict=True)
        return torch.cat(all_r, 1), torch.cat(all_z, 1)

    def view_loader(self) -> tuple[TrainLoader, int]:
        """`measure.views` views of this process's share of the images, and the number of batches.

        The views are the run's large ones in turn. They are the same at each measurement, and so
        are the images. The views depend on the number of processes, as in training.
        """
        data, settings, shares = self.config.data, self.config.measure, self.comm.world_size
        images = min(settings.view_images, len(self.measured_ids))
        large = [v for v in views_of(data.views) if v.size == max(g.size for g in data.views)]
        rounds = -(-images // (self.config.eval.batch_size * shares))
        split = self.val.subset(self.measured_ids)
        views = [large[k % len(large)] for k in range(settings.views)]
        batch = images // (rounds * shares) * shares  # leaves out as few images as possible
        seed = hashed(self.config.run.seed, "measured views")
        loader = TrainLoader(
            split,
            Order(len(split), batch, self.comm.rank, shares, seed),
            Augmentation(views, data.color_jitter, self.comm.rank),
            LoaderSettings.of(data, self.device),
            bad=self.bad,
        )
        return loader, rounds


def _only_features(network: Callable[[Tensor], Tensor]) -> Embed:
    """A network without embeddings: `r` is its output, and `z` a column of it."""

    def embed(x: Tensor) -> tuple[Tensor, Tensor]:
        r = at_least_float32(network(at_least_float32(x))).flatten(1)
        return r, r[:, :1]

    return embed
