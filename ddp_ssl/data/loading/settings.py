"""The groups of settings that loaders are made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ddp_ssl.config.views import View
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.formats import Decoding, PixelFormat
from ddp_ssl.errors import ConfigError
from ddp_ssl.utils.launcher import cpu_share

if TYPE_CHECKING:
    from ddp_ssl.config import Data


@dataclass(frozen=True)
class LoaderSettings:
    """How images are read and decoded, and the form and device of the views."""

    form: PixelFormat
    device: torch.device
    threads: int = 0
    """DALI's threads; 0 is this process's share of the cores."""
    prefetch: int = 2
    """Batches that DALI makes ahead."""
    decoding: Decoding = Decoding()  # noqa: RUF009 (a tuple)
    read_threads: int = 16
    max_pixels: int = 150_000_000
    """Of an image; a larger one is bad."""

    @staticmethod
    def of(data: Data, device: torch.device, half: bool = False) -> LoaderSettings:
        """The config's settings; `half` makes float16 views."""
        return LoaderSettings(
            PixelFormat(*data.normalisation, half=half),
            device,
            data.threads,
            data.prefetch,
            Decoding(data.hw_decoder_load, data.preallocate),
            data.readers,
            data.max_pixels,
        )

    def of_split(self, split: Split) -> LoaderSettings:
        """The same for the pixels of a split; raises `ConfigError` for other channels."""
        if len(self.form.mean) != split.channels:
            raise ConfigError(
                f"data.mean: {len(self.form.mean)} numbers, and the images have {split.channels} "
                "channels; images with the model's channels are accepted"
            )
        return self if split.dtype == np.uint8 else replace(self, form=self.form._replace(unit=1.0))

    @property
    def cpu_threads(self) -> int:
        """The number of DALI's threads."""
        return self.threads or cpu_share()

    @property
    def device_id(self) -> int | None:
        """The index of the GPU, None for the CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.current_device() if self.device.index is None else self.device.index


@dataclass(frozen=True)
class Augmentation:
    """The random views of an image, and what their random numbers depend on beside the seed.

    `view_ids` are the indices of `views` among the run's views; the default is 0, 1, ... Loaders
    that differ only in `salt` give the same images in the same order with other random views.
    """

    views: Sequence[View]
    color_jitter: str
    salt: int = 0
    view_ids: Sequence[int] | None = None

    @property
    def keyed(self) -> list[tuple[int, View]]:
        """Every view with its id."""
        ids = range(len(self.views)) if self.view_ids is None else self.view_ids
        return list(zip(ids, self.views, strict=True))
