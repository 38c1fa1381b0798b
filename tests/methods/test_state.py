"""Every method and every piece of its state: five steps at any world size, and resumed to the bit.

A method that keeps state needs nothing here: what is compared is the whole state dict, parameters,
buffers and extra state.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from ddp_ssl import optim
from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import MeshComm, World, comm_of, data_parallel
from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.methods.base import Context, Method, Progress
from tests.helpers import config_of, images, method_of
from tests.methods.settings import SETTINGS
from tests.ranks import Ranks

STEPS, EPOCH = 5, 3
COMMON = (
    "optim.name=sgd",
    "optim.lr=1",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
    "model.backbone_args={channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}",
)

SHARDED = ("deepclusterv2",)  # whose extra state is in parts; test_clustering.py looks at these
LARGE = "data.views=[{count: 2, size: 16, recipe: sym}]"
CROPS = "data.views=[{count: 2, size: 16, recipe: sym}, {count: 2, size: 8, recipe: sym}]"


def config_for(name: str, views: str = LARGE) -> Any:
    return config_of(f"method.name={name}", views, *COMMON, *SETTINGS.get(name, ()))


def takes_small_crops(name: str) -> bool:
    method = config_for(name).method
    return method.small_crops and (method.max_views or 4) >= 4


def batch_at(step: int, small: bool, comm: Comm) -> Batch:
    """The part held here of a step's batch: other images at every step."""
    torch.manual_seed(100 + step)
    views: list[Tensor] = []
    ids = torch.randperm(12)
    n = 12 // comm.data_shards
    for size in (16, 8) if small else (16,):
        x = images(2, 12, size) + 0.3 * torch.randn(2, 12, 3, size, size, dtype=torch.float64)
        views += list(x[comm.views, comm.rows(n)])
    return Batch(views, ids[comm.rows(n)], ids[comm.rows(n)] % 3)


def context(comm: Comm, epoch: int) -> Context:
    def batches(count: int, purpose: str) -> Any:
        for index in range(min(count, 2)):
            batch = batch_at(50 + index, False, comm)
            n = 12 // comm.data_shards
            x = images(1, 12, 16 + index)
            yield Batch([x[0, comm.rows(n)]], batch.ids, batch.labels)

    return Context(comm, 0, epoch, 2, batches, lambda figures: None, lambda text: None)


class Training:
    """What the engine does, without data, logging and files."""

    def __init__(self, name: str, views: str = LARGE, comm: Comm = ONE_PROCESS) -> None:
        self.config = config_for(name, views)
        self.small, self.comm = views == CROPS, comm
        self.method: Method[Any] = method_of(self.config, comm)
        mesh = isinstance(comm, MeshComm)
        self.module = data_parallel(self.method, comm.world) if mesh else self.method
        self.optimizer = optim.build(self.config.optim, self.method.parameter_groups())

    def start(self) -> None:
        self.method.on_start(context(self.comm, 0))
        self.method.train()

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            epoch = step // EPOCH
            out = self.module(batch_at(step, self.small, self.comm))
            optim.set_learning_rates(self.optimizer, self.config.optim, 12, step, EPOCH)
            out.loss.backward()
            progress = Progress(step, 2 * EPOCH, epoch, 2)
            self.method.before_optimizer(progress)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.method.after_step(progress)
            losses.append(float(out.loss.detach()))
            if (step + 1) % EPOCH == 0:
                self.method.after_epoch(context(self.comm, epoch))
                self.method.train()
        return losses

    def save(self) -> bytes:
        buffer = io.BytesIO()
        state = {"model": self.method.state_dict(), "sgd": optim.state_by_name(self.optimizer)}
        torch.save(state, buffer)
        return buffer.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.method.load_state_dict(state["model"])
        optim.load_state_by_name(self.optimizer, state["sgd"])


def five_steps(world: World, view_shards: int, name: str, views: str) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    training = Training(name, views, comm)
    training.start()
    return training.steps(0, STEPS), dict(training.method.state_dict())


@pytest.mark.parametrize("name", builtin_methods())
@pytest.mark.parametrize(
    "grids",
    [
        [(2, 1), (4, 2)],
        pytest.param([(2, 2), (4, 1)], marks=[pytest.mark.faults, pytest.mark.long]),
    ],
)
def test_five_steps_are_the_same_at_any_world_size(
    ranks: Ranks, name: str, grids: list[tuple[int, int]]
) -> None:
    """With small crops where the method takes them, which pools the views' batch statistics."""
    views = CROPS if takes_small_crops(name) else LARGE
    ((losses, state),) = ranks.run(five_steps, 1, 1, name, views)
    assert len(set(losses)) == STEPS
    for size, view_shards in grids:
        results = ranks.run(five_steps, size, view_shards, name, views)
        for step, loss in enumerate(losses):
            mean = sum(theirs[step] for theirs, _ in results) / size
            assert mean == pytest.approx(loss, rel=1e-9), (size, view_shards, step)
        for rank, (_, theirs) in enumerate(results):
            assert theirs.keys() == state.keys()
            if rank and name in SHARDED:  # rank 0 has all of it, which is what a checkpoint holds
                theirs["_extra_state"] = state["_extra_state"]
            difference = largest_difference(theirs, state)
            assert difference[0] <= 1e-9, (size, view_shards, rank, *difference)


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """The largest relative difference of two state dicts, and whose it is.

    Relative to at least 1e-3: a bias before a norm has gradient zero, and only its rounding errors.
    """
    found = [(0.0, "")]
    for name, a, b in ((n, ours[n], theirs[n]) for n in theirs):
        for index, (x, y) in enumerate(zip(numbers(a), numbers(b), strict=True)):
            assert x.shape == y.shape, name
            scale = max(float(y.norm()), 1e-3)
            found.append((float((x - y).norm()) / scale, f"{name} {index}"))
    return max(found)


def numbers(value: Any) -> list[Tensor]:
    """All numbers in a tensor or in nested extra state."""
    if isinstance(value, dict):
        return [t for key in sorted(value) for t in numbers(value[key])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in numbers(item)]
    if isinstance(value, str) or value is None:
        return []
    return [torch.as_tensor(value).double()]


def test_other_data_are_another_state() -> None:
    """The comparison above can fail: one step more, and it does."""
    training = Training("mocov2plus")
    training.start()
    training.steps(0, 2)
    before = {name: value.clone() for name, value in training.method.state_dict().items()}
    training.steps(2, 3)
    difference, _ = largest_difference(training.method.state_dict(), before)
    assert difference > 1e-3
    assert not torch.equal(training.method.state_dict()["queue.rows"], before["queue.rows"])


@pytest.mark.parametrize("name", builtin_methods())
def test_every_method_resumes_to_the_last_bit(name: str) -> None:
    """Saved after step 2 and again between two epochs, loaded by a new process's objects."""
    whole = Training(name)
    whole.start()
    losses = whole.steps(0, STEPS)
    first = Training(name)
    first.start()
    resumed = first.steps(0, 2)
    saved = first.save()
    for begin, end in ((2, 3), (3, STEPS)):
        later = Training(name)
        for value in [*later.method.parameters(), *later.method.buffers()]:
            value.data.fill_(3)  # nothing may come from the initial state
        later.load(saved)
        later.method.train()
        resumed += later.steps(begin, end)
        saved = later.save()
    assert resumed == losses
    expected = whole.method.state_dict()
    ours = later.method.state_dict()
    assert ours.keys() == expected.keys()
    for key in expected:
        for a, b in zip(numbers(ours[key]), numbers(expected[key]), strict=True):
            assert torch.equal(a, b), key
    ours_sgd, expected_sgd = (optim.state_by_name(t.optimizer) for t in (later, whole))
    for key, state in expected_sgd.items():
        assert torch.equal(ours_sgd[key]["momentum_buffer"], state["momentum_buffer"]), key
