"""The parts of a run that the loop and its surroundings share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_ssl.config import Config
from ddp_ssl.data.datasets.base import Dataset
from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.distributed import World
from ddp_ssl.evals.validation import Validation
from ddp_ssl.methods._learner import Learner
from ddp_ssl.methods.base import Method
from ddp_ssl.run.status import RunStatus
from ddp_ssl.run.watchdog import Watchdog
from ddp_ssl.training.checkpointer import Checkpointer
from ddp_ssl.training.measurement import Measurement
from ddp_ssl.training.recorder import Recorder


@dataclass(frozen=True)
class Setting:
    """The config of a run and where it runs; none of it changes."""

    config: Config
    world: World
    folder: Path
    watch: Watchdog
    status: RunStatus


@dataclass(frozen=True)
class Network:
    """The network and its optimiser. `module` is the learner under DDP."""

    learner: Learner
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def method(self) -> Method[Any]:
        """The method itself, outside DDP."""
        return self.learner.method


@dataclass
class TrainingState:
    """How far a run is: `step` steps and `epoch` epochs are done."""

    step: int = 0
    epoch: int = 0
    best: float | None = None
    """The best score of `checkpoint.best` so far."""
    first: dict[str, float] = field(default_factory=dict)
    """The metrics of the first validation."""
    latest: dict[str, float] = field(default_factory=dict)
    """The last value of each metric that is measured between epochs."""


@dataclass
class Job:
    """A run: its setting, the parts that work in it, and how far it is."""

    setting: Setting
    data: Dataset
    network: Network
    loader: TrainLoader
    validation: Validation | None
    recorder: Recorder
    measurement: Measurement
    checkpointer: Checkpointer
    state: TrainingState = field(default_factory=TrainingState)

    @property
    def config(self) -> Config:
        """The run's config."""
        return self.setting.config

    @property
    def world(self) -> World:
        """This process among the others."""
        return self.setting.world
