"""One pass over the validation split, and every figure that is made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl.comm import Comm
from ddp_ssl.config import Config
from ddp_ssl.data.augment import Decoding, PixelFormat
from ddp_ssl.data.datasets import Dataset, Split
from ddp_ssl.data.loader import EvalLoader
from ddp_ssl.data.source import BadImages
from ddp_ssl.evals.knn import knn_predict
from ddp_ssl.methods.base import Method
from ddp_ssl.metrics.effective_rank import rank_of_gram
from ddp_ssl.metrics.mutual_information import blocked_mutual_information

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

    def known(self) -> Features:
        """The images that have a label."""
        known = self.labels >= 0
        return Features(self.r[known], self.z[known], self.labels[known], self.ids[known])


class Validation:
    """Evaluates a method on a data set, on all processes together.

    Features are extracted in float32, eval mode, by each process for its share of the images, and
    gathered; every process then holds all of them and computes its share of the figures.
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
        self.bank_ids = _some(bank, config.eval.knn_bank, chooser)
        self.measured_ids = _some(len(data.val), config.measure.max_images, chooser)

    def figures(
        self, method: Method[Any], probe: nn.Module | None, evaluate: bool, measure: bool
    ) -> dict[str, float]:
        """`eval/*` and `rep/*` as asked for; the method's mode is as before afterwards."""
        training = method.training
        method.eval()
        ids = np.arange(len(self.val)) if evaluate else self.measured_ids
        val = self._extract(method.embed, self.val, ids)
        figures: dict[str, float] = {}
        if evaluate and self.labelled:
            figures |= self._accuracies(method, probe, val)
        if measure:
            keep = torch.isin(val.ids, torch.from_numpy(self.measured_ids).to(val.ids.device))
            if keep.any():  # not where all images are bad
                figures |= self._representation(val.r[keep], val.z[keep])
        method.train(training)
        return figures

    def raw_pixels(self) -> float | None:
        """k-NN top-1 of the raw pixels (over 32 px averaged down to 32); None without images."""

        def pixels(x: Tensor) -> tuple[Tensor, Tensor]:
            if x.shape[-1] > 32:
                x = F.interpolate(x, size=(32, 32), mode="area")
            flat = x.flatten(1)
            return flat, flat[:, :1]

        assert self.bank is not None
        bank = self._extract(pixels, self.bank, self.bank_ids)
        val = self._extract(pixels, self.val, np.arange(len(self.val))).known()
        return self._knn(bank, val) if len(bank) and len(val) else None

    @torch.no_grad()
    def _extract(self, embed: Embed, split: Split, ids: Ids) -> Features:
        """Features of `split[ids]`, but for bad images, in the order of `ids`, on every process."""
        data, evaluation = self.config.data, self.config.eval
        loader = EvalLoader(
            split,
            ids,
            batch_size=min(evaluation.batch_size, -(-len(ids) // self.comm.world_size)),
            shard=self.comm.rank,
            num_shards=self.comm.world_size,
            val_resize=data.val_resize,
            val_size=data.val_size or max(group.size for group in data.views),
            form=PixelFormat(*data.normalisation),
            decoding=Decoding(data.hw_decoder_load, data.preallocate),
            threads=data.threads,
            prefetch=data.prefetch,
            read_threads=data.read_threads,
            device=self.device,
            bad=self.bad,
        )
        parts = [(*embed(b.views[0]), b.labels, b.ids.to(b.labels.device)) for b in loader]
        r, z, labels, at = (
            self.comm.gather(torch.cat(part)[None]).flatten(0, 1)
            for part in zip(*parts, strict=True)
        )
        # Put the shares back in order; padding has no id. Positions, since ids need not be sorted.
        position = torch.full((len(split),), -1, dtype=torch.long, device=at.device)
        position[torch.from_numpy(ids).to(at.device)] = torch.arange(len(ids), device=at.device)
        real = at >= 0
        order = position[at[real]].argsort()
        r, z, labels, at = (x[real][order] for x in (r, z, labels, at))
        return Features(r, z, labels, at)

    def _accuracies(
        self, method: Method[Any], probe: nn.Module | None, val: Features
    ) -> dict[str, float]:
        figures: dict[str, float] = {}
        val = val.known()
        if not len(val):
            return figures
        if probe is not None:
            with torch.no_grad():
                correct = probe(val.r).argmax(1) == val.labels
            figures["eval/probe_top1"] = float(correct.double().mean())
        if self.config.eval.knn:
            assert self.bank is not None
            bank = self._extract(method.embed, self.bank, self.bank_ids)
            if len(bank):
                figures["eval/knn_top1"] = self._knn(bank, val)
                figures["eval/knn_bank"] = len(bank)
        return figures

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
        figures = {
            "rep/mutual_information": blocked_mutual_information(r, z, self.comm),
            "rep/embedding_std": float(F.normalize(z, dim=1).std(0).mean()),
        }
        for name, x in (("r", r), ("z", z)):
            rank = 0.0
            if self.comm.rank == 0:
                x = x.double()
                gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
                rank = float(rank_of_gram(gram, min(x.shape)))
            figures[f"rep/effective_rank_{name}"] = self.comm.broadcast(rank)
        return figures


def _some(total: int, at_most: int, chooser: np.random.Generator) -> Ids:
    """Sorted ids of all images, or of a seeded subset."""
    if total <= at_most:
        return np.arange(total)
    return np.sort(chooser.choice(total, at_most, replace=False))
