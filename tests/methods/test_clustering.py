"""Prototypes, queues, Sinkhorn, k-means and the memory by sample id, in whole methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp_ssl import optim
from ddp_ssl.comm import Comm
from ddp_ssl.config import ConfigError
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.losses.common import unit_rows
from ddp_ssl.methods.base import Context, Method, Progress
from ddp_ssl.run.configure import load
from tests.helpers import batch_of, config_of, images, method_of, relative
from tests.ranks import Ranks

SWAV = (
    "method.name=swav",
    "method.prototypes=7",
    "method.epsilon=0.05",
    "method.freeze_epochs=1",
    "method.queue_size=17",
    "method.queue_epoch=1",
)
DEEPCLUSTER = ("method.name=deepclusterv2", "method.prototypes=[5, 3, 4]")
DINO = (
    "method.name=dino",
    "method.prototypes=9",
    "method.warmup_teacher_temperature=0.04",
    "method.teacher_temperature=0.07",
    "method.warmup_teacher_epochs=4",
)
SOLO = (*SWAV, "method.variant=solo")
METHODS = {"swav": SWAV, "deepclusterv2": DEEPCLUSTER, "dino": DINO}
RUNS = METHODS | {"swav_solo": SOLO}
STEPS = 3  # an epoch, of 12 of the 40 images each


def data(view: int, epoch: int) -> Tensor:
    """40 images of one view, other ones each epoch."""
    generator = torch.Generator().manual_seed(100 * epoch + view)
    return torch.randn(40, 3, 16, 16, generator=generator, dtype=torch.float64)


def order(epoch: int) -> Tensor:
    return torch.randperm(40, generator=torch.Generator().manual_seed(epoch))


def part(ids: Tensor, views: list[int], epoch: int, comm: Comm) -> Batch:
    """What this process holds of a batch."""
    mine = ids[comm.rows(len(ids) // comm.data_shards)]
    return Batch([data(view, epoch)[mine] for view in views], mine, mine % 3)


def context_at(comm: Comm, epoch: int, epochs: int, reports: list[dict[str, float]]) -> Context:
    def batches(count: int, purpose: str) -> Iterator[Batch]:
        for step in range(min(count, STEPS)):
            ids = order(99 + epoch)[12 * step : 12 * step + 12]
            yield part(ids, [0], 99, comm)

    return Context(comm, 5, epoch, epochs, batches, reports.append, lambda text: None)


def run(
    world: World,
    view_shards: int,
    settings: tuple[str, ...],
    epochs: int,
    stop_after: int | None = None,
    state: dict[str, Any] | None = None,
) -> Any:
    """Train whole epochs as the engine does; losses, state, and what was reported.

    `stop_after` steps it ends, and `state` goes on from there.
    """
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    config = config_of(
        "data.views.0.count=2", "optim.lr=0.3", "optim.warmup_epochs=0", f"optim.epochs={epochs}",
        *settings,
    )  # fmt: skip
    method = method_of(config, comm)
    module = DDP(method, broadcast_buffers=False) if world.size > 1 else method
    optimizer = optim.build(config.optim, method.parameter_groups())
    losses: list[float] = []
    reports: list[dict[str, float]] = []
    first = 0
    if state is None:
        method.on_start(context_at(comm, 0, epochs, reports))
    else:
        method.load_state_dict(state["method"])
        optim.load_state_by_name(optimizer, state["optimizer"])
        first = state["step"]
    held = list(range(2)[comm.views])
    for step in range(first, epochs * STEPS):
        if step == stop_after:
            break
        epoch, t = divmod(step, STEPS)
        optim.set_learning_rates(optimizer, config.optim, 12, step, STEPS)
        out = module(part(order(epoch)[12 * t : 12 * t + 12], held, epoch, comm))
        out.loss.backward()
        progress = Progress(step, epochs * STEPS, epoch, epochs)
        method.before_optimizer(progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(progress)
        losses.append(float(out.loss.detach()))
        if t == STEPS - 1:
            method.after_epoch(context_at(comm, epoch, epochs, reports))
    saved = {
        "method": method.state_dict(),
        "optimizer": optim.state_by_name(optimizer),
        "step": first + len(losses),
    }
    return losses, saved, reports


def assert_same_state(ours: Any, theirs: Any, tolerance: float) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same_state(ours[key], value, tolerance)
    elif isinstance(theirs, Tensor) and theirs.is_floating_point():
        assert relative(ours, theirs) <= tolerance or float(theirs.norm()) < 1e-12
    elif isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("size", "view_shards"), [(3, 1), (4, 2)])
@pytest.mark.parametrize("name", ["swav", "swav_solo", "deepclusterv2"])
def test_epochs_are_the_same_at_any_world_size(
    ranks: Ranks, name: str, size: int, view_shards: int
) -> None:
    """Loss, parameters, queue, centroids, memory and assignments after two epochs in which some
    images are left out (tests/methods/test_state.py has the other methods and sizes)."""
    ((losses, state, reports),) = ranks.run(run, 1, 1, RUNS[name], 2)
    assert len(losses) == 6
    results = ranks.run(run, size, view_shards, RUNS[name], 2)
    means = [sum(values) / size for values in zip(*(r[0] for r in results), strict=True)]
    assert means == pytest.approx(losses, rel=1e-9)
    # Rank 0's is what a checkpoint holds, and all there is.
    assert_same_state(results[0][1]["method"], state["method"], 1e-9)
    for _, other, told in results:
        assert told == reports
        own = {k: v for k, v in other["method"].items() if k != "_extra_state"}
        assert_same_state(own, {k: state["method"][k] for k in own}, 1e-9)


@pytest.mark.parametrize("name", ["swav", "swav_solo", "deepclusterv2"])
def test_going_on_from_a_state_changes_nothing(ranks: Ranks, name: str) -> None:
    """In the middle of the second epoch, at another number of processes too."""
    whole = ranks.run(run, 3, 1, RUNS[name], 2)
    stopped = ranks.run(run, 3, 1, RUNS[name], 2, 4)
    state = stopped[0][1]  # rank 0's, as from a checkpoint
    again = ranks.run(run, 3, 1, RUNS[name], 2, None, state)
    for before, after, expected in zip(stopped, again, whole, strict=True):
        # DDP's sums may differ in the last bit, since its buckets are rebuilt after one step.
        assert before[0] + after[0] == pytest.approx(expected[0], rel=1e-12)
        assert_same_state(after[1]["method"], expected[1]["method"], 1e-9)
    ((losses, _, _),) = ranks.run(run, 1, 1, RUNS[name], 2, None, state)
    mean = [sum(values) / 3 for values in zip(*(r[0] for r in again), strict=True)]
    assert losses == pytest.approx(mean, rel=1e-9)


# --- SwAV ------------------------------------------------------------------------------------


def one_step(method: Method, epoch: int) -> Any:
    """A step of plain descent at some epoch; the loss before it."""
    out = method(batch_of(images(2, 12)))
    out.loss.backward()
    progress = Progress(epoch, 10, epoch, 10)
    method.before_optimizer(progress)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    method.after_step(progress)
    return float(out.loss.detach())


def test_prototypes_have_length_one_and_wait_for_their_epoch() -> None:
    method = method_of(config_of(*SWAV))
    start = method.prototypes.detach().clone()
    one_step(method, 0)
    assert torch.allclose(method.prototypes, start, atol=1e-15)
    one_step(method, 1)
    assert relative(method.prototypes.detach(), start) > 1e-3
    assert torch.allclose(method.prototypes.norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_the_queue_is_used_once_it_is_full() -> None:
    """17 images of 12 a step: from the third step of its epoch on."""
    method = method_of(config_of(*SWAV))
    plain = method_of(config_of(*SWAV[:4], "method.queue_size=0"))
    seen = []
    for epoch in (0, 1, 1, 1):
        plain.load_state_dict(
            {n: v for n, v in method.state_dict().items() if not n.startswith("queue.")}
        )
        seen.append(one_step(method, epoch) == pytest.approx(one_step(plain, 0), rel=1e-12))
    assert seen == [True, True, True, False]


def test_solos_prototypes_are_weight_normed() -> None:
    """Against PyTorch's weight norm, whose gradient is divided by a row's length."""
    method = method_of(config_of(*SOLO))
    start = method.prototypes.detach().clone()
    assert float(start.norm(dim=1).mean()) == pytest.approx(3**-0.5, rel=0.1)
    linear = torch.nn.Linear(start.shape[1], len(start), bias=False, dtype=torch.float64)
    theirs = torch.nn.utils.parametrizations.weight_norm(linear)
    theirs.parametrizations.weight.original0.data.fill_(1)
    theirs.parametrizations.weight.original1.data.copy_(start)
    rows = unit_rows(torch.randn(6, start.shape[1], dtype=torch.float64))
    for weight in (method._directions(), theirs.weight):
        (rows @ weight.T).square().sum().backward()
    assert torch.allclose(method._directions(), theirs.weight, rtol=1e-12)
    assert relative(method.prototypes.grad, theirs.parametrizations.weight.original1.grad) < 1e-12
    official = method_of(config_of(*SWAV))
    official.prototypes.data.copy_(unit_rows(start))
    (rows @ official._directions().T).square().sum().backward()
    # The tangential part; the official form's radial part is undone after the step.
    ours, directions = official.prototypes.grad, unit_rows(start)
    tangent = ours - (ours * directions).sum(1, keepdim=True) * directions
    assert relative(method.prototypes.grad, tangent / start.norm(dim=1, keepdim=True)) < 1e-12
    one_step(method, 1)
    assert not torch.allclose(method.prototypes.norm(dim=1), torch.ones(7, dtype=torch.float64))


def test_solos_queue_is_filled_from_the_first_step() -> None:
    """Two steps fill it in epoch 0; it is used from epoch 1 on, at once."""
    method = method_of(config_of(*SOLO))
    plain = method_of(config_of(*SOLO, "method.queue_size=0"))
    seen = []
    for epoch in (0, 0, 0, 1):
        if epoch == 1:
            method.after_epoch(context_at(Comm(), 0, 2, []))
        plain.load_state_dict(
            {n: v for n, v in method.state_dict().items() if not n.startswith("queue.")}
        )
        seen.append(one_step(method, epoch) == pytest.approx(one_step(plain, 0), rel=1e-12))
    assert method.queued == 48
    assert seen == [True, True, True, False]


def test_swav_predicts_every_large_view_from_every_other_view() -> None:
    from ddp_ssl.losses import sinkhorn, swav

    views = "data.views=[{count: 2, size: 16}, {count: 3, size: 8}]"
    method = method_of(config_of(*SWAV, views))
    batch = batch_of(images(2, 12))
    batch.views += list(images(3, 12, size=8))
    out = method(batch)
    scores = unit_rows(out.embeddings) @ method.prototypes.T
    q = [sinkhorn(scores[a].detach(), 0.05, 3) for a in range(2)]
    pairs = [swav(scores[v], q[a], 0.1) for a in range(2) for v in range(5) if v != a]
    assert len(pairs) == 8
    assert float(out.loss.detach()) == pytest.approx(float(sum(pairs).detach() / 8), rel=1e-12)


# --- DINO ------------------------------------------------------------------------------------


def test_the_teacher_sees_the_large_views_only_and_the_centre_follows() -> None:
    from ddp_ssl.losses import dino

    views = "data.views=[{count: 2, size: 16}, {count: 2, size: 8}]"
    method = method_of(config_of(*DINO, views))
    batch = batch_of(images(2, 12))
    batch.views += list(images(2, 12, size=8))
    with torch.no_grad():
        method.momentum["prototypes"].weight.mul_(torch.linspace(-1, 2, 9).double()[:, None])
        teacher = method.momentum["prototypes"](unit_rows(method.targets(batch.views)))
    assert teacher.shape == (2, 12, 9)
    method.center.copy_(torch.linspace(-1, 1, 9))
    before = method.center.clone()
    out = method(batch)
    student = method.prototypes(unit_rows(out.embeddings))
    expected = dino(student, teacher, before, 0.1, 0.04)
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    method.after_step(Progress(0, 10, 0, 10))
    mean = teacher.mean((0, 1))
    assert relative(method.center, 0.9 * before + 0.1 * mean) < 1e-12


def test_the_teachers_temperature_grows_from_epoch_to_epoch() -> None:
    method = method_of(config_of(*DINO))
    seen = []
    for epoch in range(6):
        seen.append(method.teacher_temperature)
        method.after_epoch(context_at(method.comm, epoch, 6, []))
    assert seen == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    other = method_of(config_of(*DINO))
    other.load_state_dict(method.state_dict())
    assert other.teacher_temperature == method.teacher_temperature


def test_the_last_layer_waits_for_its_epoch_and_keeps_its_length() -> None:
    for norm in ("true", "false"):
        method = method_of(config_of(*DINO, f"method.norm_last_layer={norm}"))
        method.momentum["prototypes"].weight.data.add_(1)  # else student and teacher agree
        start = {n: p.detach().clone() for n, p in method.prototypes.named_parameters()}
        assert len(start) == (1 if norm == "true" else 2)
        one_step(method, 0)
        assert all(torch.equal(p, start[n]) for n, p in method.prototypes.named_parameters())
        one_step(method, 1)
        moved = {n: relative(p.detach(), start[n]) for n, p in method.prototypes.named_parameters()}
        assert min(moved.values()) > 1e-6


# --- DeepCluster v2 --------------------------------------------------------------------------


def test_the_memory_holds_the_newest_embedding_of_every_image() -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"))
    _, state, reports = run(world, 1, DEEPCLUSTER, 1)
    extra = state["method"]["_extra_state"]
    # 3 steps of 12 of 40 images before the start, 3 in the epoch; some were in neither.
    seen = torch.zeros(len(extra["seen"]), dtype=torch.bool)
    seen[order(99)[:36]] = True
    assigned = seen.clone()
    seen[order(0)[:36]] = True
    assert torch.equal(extra["seen"], seen)
    assert len(extra["seen"]) >= 40
    assert extra["rows"].shape == (2, len(seen), 12)
    norms = extra["rows"].norm(dim=2)
    assert torch.allclose(norms, seen.double().expand(2, -1))
    # Of the images of the epoch, the two views differ; of the others both are view 0's.
    new = torch.zeros_like(seen)
    new[order(0)[:36]] = True
    differ = (extra["rows"][0] != extra["rows"][1]).any(1)
    assert torch.equal(differ, new)
    # The last epoch is not followed by another clustering, so these are from the start.
    assert extra["assignments"].shape == (3, len(seen))
    for head, count in zip(extra["assignments"], (5, 3, 4), strict=True):
        assert torch.equal(head >= 0, assigned)
        assert int(head.max()) < count
    assert len(reports) == 1
    assert 0.5 < reports[0]["rep/clusters_used"] <= 1


def test_each_process_holds_its_part_of_the_memory(ranks: Ranks) -> None:
    results = ranks.run(run, 4, 2, DEEPCLUSTER, 1)
    held = [r[1]["method"]["_extra_state"]["rows"] for r in results]
    whole = held[0]
    for rank in (1, 2, 3):
        assert torch.equal(held[rank], whole[:, rank::4])


def test_the_clustering_leaves_no_trace_in_the_running_averages() -> None:
    method = method_of(config_of(*DEEPCLUSTER))
    before = {n: b.clone() for n, b in method.named_buffers() if "prototypes" not in n}
    method.on_start(context_at(method.comm, 0, 3, []))
    assert method.training
    for name, value in before.items():
        assert torch.equal(dict(method.named_buffers())[name], value), name
    for head in range(3):
        norms = method.centroids(head).norm(dim=1)
        assert torch.allclose(norms, torch.ones_like(norms))
        assert not method.centroids(head).requires_grad


def test_an_image_without_a_cluster_is_left_out() -> None:
    method = method_of(config_of(*DEEPCLUSTER))
    assert float(method(batch_of(images(2, 12))).loss.detach()) == 0  # before the first clustering
    method.on_start(context_at(method.comm, 0, 3, []))
    missing = order(99)[36:]  # dropped as the incomplete batch
    assert bool((method.assignments[:, missing] == -1).all())
    ids = torch.cat([missing, order(99)[:8]])
    batch = Batch([data(0, 1)[ids], data(1, 1)[ids]], ids, ids % 3)
    method.train()
    out = method(batch)
    logits = [unit_rows(out.embeddings[:, 4:]) @ method.centroids(h).T / 0.1 for h in range(3)]
    terms = [
        torch.nn.functional.cross_entropy(x.flatten(0, 1), method.assignments[h][ids[4:]].repeat(2))
        for h, x in enumerate(logits)
    ]
    expected = float(torch.stack(terms).mean().detach())
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-10)


def test_more_clusters_than_images_are_refused() -> None:
    method = method_of(config_of("method.name=deepclusterv2", "method.prototypes=[37]"))
    with pytest.raises(ConfigError, match="37 clusters of 36 training images; at most 36"):
        method.on_start(context_at(method.comm, 0, 3, []))


# --- options ---------------------------------------------------------------------------------


def test_auto_is_three_over_the_width() -> None:
    auto = config_of("method.name=barlow_twins", "method.off_diagonal=auto")
    fixed = config_of("method.name=barlow_twins", "method.off_diagonal=0.25")  # 3 / 12
    batch = batch_of(images(2, 12))
    losses = [float(method_of(c)(batch).loss.detach()) for c in (auto, fixed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    auto = config_of("method.name=vicreg", "method.covariance=auto", "method.invariance=8")
    fixed = config_of("method.name=vicreg", "method.covariance=2", "method.invariance=8")
    losses = [float(method_of(c)(batch).loss.detach()) for c in (auto, fixed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_multiview_is_another_loss_than_the_mean_over_pairs() -> None:
    from ddp_ssl.losses import barlow_twins, barlow_twins_multiview, vicreg_multiview

    batch = batch_of(images(4, 12))
    views = "data.views.0.count=4"
    settings = ("method.multiview=fastssl", "method.off_diagonal=0.0051")
    method = method_of(config_of("method.name=barlow_twins", views, *settings))
    out = method(batch)
    ours = float(out.loss.detach())
    expected = barlow_twins_multiview(out.embeddings, 0.0051)  # fastssl's scale is 1
    assert ours == pytest.approx(float(expected.detach()), rel=1e-12)
    assert ours != pytest.approx(float(barlow_twins(out.embeddings)), rel=1e-2)
    scaled = method_of(config_of("method.name=barlow_twins", views, *settings, "method.scale=0.5"))
    assert float(scaled(batch).loss.detach()) == pytest.approx(0.5 * ours, rel=1e-10)
    pairs = method_of(config_of("method.name=barlow_twins", "method.off_diagonal=0.0051", views))
    out = pairs(batch)
    expected = barlow_twins(out.embeddings, 0.0051, 0.1)
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    method = method_of(config_of("method.name=vicreg", views, "method.multiview=fastssl"))
    out = method(batch)
    assert float(out.loss) == pytest.approx(float(vicreg_multiview(out.embeddings).loss), rel=1e-12)


def test_what_cannot_run_is_refused_before_anything_starts() -> None:
    for name in METHODS:
        with pytest.raises(ConfigError, match="needs at least 2, got 1"):
            config_of(f"method.name={name}", "data.views.0.count=1")
    with pytest.raises(ConfigError, match="cannot take the 12 images of a batch"):
        config_of("method.name=swav", "method.queue_size=11")
    with pytest.raises(ConfigError, match="variance over 2 images"):
        config_of("method.name=barlow_twins", "data.batch_size=1", "model.batch_norm=local")
    with pytest.raises(ConfigError, match=r"method\.off_diagonal"):
        config_of("method.name=barlow_twins", "method.off_diagonal=-1")


@pytest.mark.parametrize("name", ["barlow_twins", "mmcr", *METHODS])
def test_the_embedded_default_scales_state_to_the_digits(name: str) -> None:
    config = load([f"method.name={name}"]).config
    for key in ("prototypes", "queue_size"):
        sizes = getattr(config.method, key, 2)
        assert all(2 <= size < 1437 for size in (sizes if isinstance(sizes, list) else [sizes]))


@pytest.mark.parametrize("name", ["barlow_twins", "mmcr", *METHODS])
def test_vits_and_small_crops_train(name: str) -> None:
    vit = (
        "model.backbone=vit_tiny_patch16_224",
        "model.backbone_args={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2, "
        "dynamic_img_size: true}",
        "data.views=[{count: 2, size: 16}, {count: 2, size: 8}]",
    )
    method = method_of(config_of(*METHODS.get(name, (f"method.name={name}",)), *vit))
    method.on_start(context_at(method.comm, 0, 3, []))
    batch = batch_of(images(2, 12))
    batch.views += list(images(2, 12, size=8))
    out = method(batch)
    assert out.embeddings.shape == (4, 12, 12)
    out.loss.backward()
    gradients = [p.grad for p in method.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert float(out.loss.detach()) != 0
