"""Momentum networks, predictors, queues, and which view predicts which."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightly.models.utils import update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor

from ddp_ssl import optim
from ddp_ssl.comm import ONE_PROCESS
from ddp_ssl.config import ConfigError
from ddp_ssl.losses.common import unit_rows
from ddp_ssl.methods._momentum import follow
from ddp_ssl.methods._queue import Queue
from ddp_ssl.methods._registry import make_method
from ddp_ssl.methods.base import Method, Progress
from ddp_ssl.optim import cosine
from ddp_ssl.run.identity import identity
from ddp_ssl.training.state import changed_since
from tests.helpers import VIT, batch_of, config_of, images, method_of, relative
from tests.losses import oracles

MOMENTUM = ("byol", "mocov3", "mocov2plus", "ressl")
PREDICTOR = ("byol", "simsiam", "mocov3", "nnclr")
QUEUE = ("mocov2plus", "nnclr", "ressl")
SMALL = ("byol", "simsiam", "mocov3", "mocov2plus", "nnclr")


def built(name: str, *settings: str) -> Method[Any]:
    return method_of(config_of(f"method.name={name}", *settings))


def state_of(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the momentum network ----------------------------------------------------------------------


def test_the_momentum_is_a_cosine_of_the_step_alone() -> None:
    assert cosine(0.99, 1.0, 0, 100) == pytest.approx(0.99)
    assert cosine(0.99, 1.0, 50, 100) == pytest.approx(0.995)
    assert cosine(0.99, 1.0, 100, 100) == 1
    for step in range(11):  # lightly reaches the end at the last step, not after it
        assert cosine(0.9, 0.999, step, 10) == pytest.approx(cosine_schedule(step, 11, 0.9, 0.999))


@pytest.mark.parametrize("name", MOMENTUM)
def test_the_momentum_network_is_a_copy_that_no_optimiser_sees(name: str) -> None:
    method = built(name)
    for part in ("backbone", "projector"):
        network, copy = getattr(method, part).state_dict(), method.momentum[part].state_dict()
        assert network.keys() == copy.keys()
        assert all(torch.equal(copy[key], network[key]) for key in network)
    assert not any(p.requires_grad for p in method.momentum.parameters())
    assert all(p.requires_grad for p in method.backbone.parameters())
    trained = {n for group in method.parameter_groups() for n, _ in group["params"]}
    assert not any(n.startswith("momentum.") for n in trained)
    assert any(n.startswith("momentum.") for n in method.state_dict())
    assert len(method.state_dict()) > len(trained)


@pytest.mark.parametrize("name", MOMENTUM)
def test_parameters_follow_and_norms_keep_averages_of_their_own(name: str) -> None:
    method = built(name, "method.momentum=0.9")
    before = state_of(method.momentum)
    method(batch_of(images(2, 12))).loss.backward()
    running = state_of(method.momentum)
    with torch.no_grad():
        for _, p in method.parameter_groups()[0]["params"]:
            p.add_(torch.randn_like(p))
    method.after_step(Progress(0, 10, 0, 1))
    after = state_of(method.momentum)
    parameters = {n for n, _ in method.momentum.named_parameters()}
    network = {
        f"{part}.{n}": v
        for part in ("backbone", "projector")
        for n, v in getattr(method, part).state_dict().items()
    }
    moved = 0
    for key, value in after.items():
        if key in parameters:
            assert torch.equal(running[key], before[key])  # not by the forward
            expected = 0.9 * before[key] + 0.1 * network[key]
            assert torch.allclose(value, expected, rtol=1e-12, atol=1e-14)
        else:
            assert torch.equal(value, running[key])  # only by the forward
            moved += not torch.equal(running[key], before[key])
    assert moved > 20


def test_following_is_lightlys() -> None:
    ours, theirs, network = (torch.nn.Linear(5, 4).double() for _ in range(3))
    theirs.load_state_dict(ours.state_dict())
    follow(ours, network, 0.97)
    update_momentum(network, theirs, 0.97)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative(a.detach(), b.detach()) < 1e-14


# --- queues ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 5, 7, 8])
def test_a_queue_holds_the_newest_rows(size: int) -> None:
    queue = Queue(size, 3, count=2).double()
    assert torch.allclose(queue.rows.norm(dim=2), torch.ones(2, size).double())
    newest = [list(rows) for rows in queue.rows.clone()]
    for step in range(6):
        torch.manual_seed(step)
        rows = torch.randn(2, 4, 3, dtype=torch.float64)
        queue.append(rows)
        for held, new in zip(newest, unit_rows(rows), strict=True):
            held += list(new)
            del held[:4]
        for held, ours in zip(newest, queue.rows, strict=True):
            in_order = ours.roll(-int(queue.oldest), 0)
            assert torch.equal(in_order, torch.stack(held))


@pytest.mark.parametrize("name", QUEUE)
def test_the_batch_enters_the_queue_after_the_step(name: str) -> None:
    method = built(name, "method.queue_size=31")
    before = method.queue.rows.clone()
    out = method(batch_of(images(2, 12)))
    assert torch.equal(method.queue.rows, before)
    method.after_step(Progress(0, 10, 0, 1))
    assert int(method.queue.oldest) == 12
    assert torch.equal(method.queue.rows[:, 12:], before[:, 12:])
    if name == "nnclr":
        assert torch.allclose(method.queue.rows[0, :12], unit_rows(out.embeddings[0]))
    else:  # as at the first step the momentum network is the network
        expected = unit_rows(out.embeddings[[0, 1] if name == "mocov2plus" else [1]])
        assert torch.allclose(method.queue.rows[:, :12], expected)


@pytest.mark.parametrize("name", QUEUE)
def test_a_queue_smaller_than_a_batch_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.queue_size: 11 rows cannot take the 12 images"):
        config_of(f"method.name={name}", "method.queue_size=11")
    config_of(f"method.name={name}", "method.queue_size=12")


def test_a_queue_beyond_the_memory_is_one_line() -> None:
    large = ("method.queue_size=2000000000", "model.projector=[24, 65536]")  # 500 TB
    config = config_of("method.name=mocov2plus", *large)
    with pytest.raises(ValueError, match=r"^method\.name: mocov2plus does not fit into .* memory"):
        make_method(config, ONE_PROCESS)


# --- which view predicts which -----------------------------------------------------------------


def pairs(name: str, p: list[Tensor], z: list[Tensor], t: list[Tensor], queue: Any) -> float:
    """The loss of all pairs, from predictions, embeddings and momentum embeddings of each view."""
    each = {
        "byol": lambda a, b: oracles.byol(p[a], t[b]),
        "simsiam": lambda a, b: oracles.simsiam(p[a], z[b]),
        "mocov3": lambda a, b: oracles.mocov3(p[a], t[b], 0.2),
        "mocov2plus": lambda a, b: oracles.moco(z[a], t[b], queue[b], 0.2),
        "nnclr": lambda a, b: oracles.nnclr(neighbours(z[b], queue[0]), p[a], 0.2),
        "ressl": lambda a, b: oracles.ressl(z[a], t[b], queue[0], 0.1, 0.04),
    }[name]
    if name == "ressl":
        chosen = [(a, b) for a in range(0, len(z), 2) for b in range(1, len(z), 2)]
    else:
        chosen = [(a, b) for a in range(len(z)) for b in range(len(t)) if a != b]
    losses = [float(each(a, b)) for a, b in chosen]
    return sum(losses) if name in ("byol", "mocov3") else sum(losses) / len(losses)


def neighbours(z: Tensor, queue: Tensor) -> Tensor:
    cosines = [[float(oracles.cosine(row, other)) for other in queue] for row in z]
    return torch.stack([queue[c.index(max(c))] for c in cosines])


@pytest.mark.parametrize(
    ("name", "large", "small"),
    [(name, large, 0) for name in (*SMALL, "ressl") for large in (2, 3)]
    + [(name, 2, 3) for name in SMALL],
)
def test_every_view_predicts_every_large_one_but_itself(name: str, large: int, small: int) -> None:
    groups = [f"{{count: {large}, size: 16}}"] + [f"{{count: {small}, size: 8}}"] * (small > 0)
    queue = ["method.queue_size=13"] if name in QUEUE else []
    views = f"data.views=[{', '.join(groups)}]"
    method = built(name, views, "model.views_forward=separate", "method.name=" + name, *queue)
    if name in MOMENTUM:  # so that the two networks differ
        with torch.no_grad():
            for p in method.momentum.parameters():
                p.add_(0.1 * torch.randn_like(p))
    if name in QUEUE:  # its float32 rows of length one are not that in float64
        method.queue.rows.copy_(unit_rows(method.queue.rows))
    batch = batch_of(images(large, 12))
    batch.views += list(images(small, 12, 8)) if small else []
    with torch.no_grad():
        out = method(batch)
        z = [method.projector(method.backbone(x)) for x in batch.views]
        p = [method.predictor(x) for x in z] if name in PREDICTOR else z
        teacher = method.momentum if name in MOMENTUM else None
        t = [
            teacher["projector"](teacher["backbone"](x)) if teacher else z[index]
            for index, x in enumerate(batch.views[:large])
        ]
    assert out.embeddings.shape == (large + small, 12, 12)
    rows = method.queue.rows if name in QUEUE else None
    assert float(out.loss) == pytest.approx(pairs(name, p, z, t, rows), rel=1e-10)


def test_views_that_play_parts_may_not_be_small() -> None:
    crops = "data.views=[{count: 2, size: 16}, {count: 2, size: 8}]"
    with pytest.raises(ConfigError, match="ressl takes views of one size only"):
        config_of("method.name=ressl", crops)


@pytest.mark.parametrize("name", PREDICTOR)
def test_no_gradient_flows_into_targets(name: str) -> None:
    """With a predictor that gives a constant, nothing but the predictor's bias is trained."""
    method = built(name)
    last = list(method.predictor.parameters())
    with torch.no_grad():
        for p in last:
            p.zero_()
        last[-1].copy_(torch.randn_like(last[-1]))
    method(batch_of(images(2, 12))).loss.backward()
    assert all(float(p.grad.norm()) < 1e-12 for p in method.backbone.parameters())
    assert all(float(p.grad.norm()) < 1e-12 for p in method.projector.parameters())


# --- heads -------------------------------------------------------------------------------------


def test_simsiams_predictor_has_a_constant_learning_rate() -> None:
    config = config_of("method.name=simsiam", "optim.lr=0.8", "optim.epochs=4")
    method = method_of(config)
    optimizer = optim.build(config.optim, method.parameter_groups())
    rates = []
    for step in (0, 2, 5, 7):
        optim.set_learning_rates(optimizer, config.optim, 128, step, 2)
        rates.append([group["lr"] for group in optimizer.param_groups])
    network, predictor = zip(*rates, strict=True)
    assert len(set(network)) == 4
    assert predictor == (0.4,) * 4
    names = {name for group in method.parameter_groups() for name, _ in group["params"]}
    assert names == {name for name, p in method.named_parameters() if p.requires_grad}


def test_the_norm_that_ends_a_head() -> None:
    for name, affine in {"simsiam": False, "mocov3": False, "nnclr": True}.items():
        method = built(name)
        last = list(method.projector.children())[-1]
        assert (last.affine, last.num_features) == (affine, 12)
        z = method(batch_of(images(2, 12))).embeddings
        assert torch.allclose(z.var(1, unbiased=False), torch.ones(2, 12).double(), rtol=0.1)
    assert list(built("mocov3", "method.predictor_last_norm=true").predictor.children())[-1].eps
    assert isinstance(list(built("mocov3").predictor.children())[-1], torch.nn.Linear)


@pytest.mark.parametrize("name", [*SMALL, "ressl"])
def test_vits_train(name: str) -> None:
    crops = () if name == "ressl" else ("data.views=[{count: 2, size: 16}, {count: 2, size: 8}]",)
    method = built(name, *VIT, *crops)
    batch = batch_of(images(2, 12))
    batch.views += list(images(2, 12, 8)) if crops else []
    method(batch).loss.backward()
    gradients = [p.grad for p in method.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    method.after_step(Progress(0, 10, 0, 1))


def test_momentum_networks_drop_no_paths() -> None:
    args = VIT[1].replace("depth: 1", "depth: 2, drop_path_rate: 0.5")
    method = built("dino", "method.prototypes=7", VIT[0], args)
    view = [images(2, 12)[0]]
    assert torch.equal(method.targets(view), method.targets(view))
    assert not torch.equal(method.encode(view)[1], method.encode(view)[1])


def test_what_changes_for_a_checkpoint_of_an_earlier_version() -> None:
    drops = VIT[1].replace("depth: 1", "depth: 2, drop_path_rate: 0.5")
    decay, paths = "tokens and position embeddings are not", "the momentum network drops no paths"

    def changes(*settings: str, older: bool = True) -> list[str]:
        config = config_of(*settings)
        saved = {k: v for k, v in identity(config).items() if k != "optim.layer_decay"}
        return changed_since(saved if older else identity(config), method_of(config), config)

    byol, adamw = ("method.name=byol", VIT[0], drops), "optim.name=adamw"
    assert changes(*byol, adamw) == [f"{decay} decayed", paths]
    assert changes(*byol, adamw, older=False) == []
    assert changes(*byol, "optim.name=sgd") == [paths]
    assert changes(*byol, adamw, "optim.weight_decay=0") == [paths]
    assert changes("method.name=simclr", VIT[0], drops, adamw) == [f"{decay} decayed"]
    assert changes("method.name=byol", adamw) == []


def test_mocov3_may_keep_the_patch_projection() -> None:
    method = built("mocov3", *VIT, "method.freeze_patch_embed=true")
    assert not any(p.requires_grad for p in method.backbone.patch_embed.parameters())
    method(batch_of(images(2, 12))).loss.backward()
    assert method.backbone.patch_embed.proj.weight.grad is None
    with pytest.raises(ValueError, match=r"freeze_patch_embed: only for backbones with a patch pr"):
        built("mocov3", "method.freeze_patch_embed=true")
