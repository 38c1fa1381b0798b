"""Methods on whole networks: the same loss and gradient at any world size; alpha."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from ddp_ssl.comm import Comm
from ddp_ssl.config import ConfigError
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.methods._registry import builtin_methods
from ddp_ssl.methods.base import Context, joined
from ddp_ssl.metrics.effective_rank import Matrix
from tests.helpers import (
    SHALLOW,
    assert_same_gradients,
    batch_of,
    config_of,
    graphs_run_one_by_one,
    images,
    method_of,
    relative,
)
from tests.losses import oracles
from tests.ranks import Ranks

ADADIM = (
    "method.alpha=fixed",
    "method.alpha_value=0.3",
    "method.beta=fixed",
    "method.beta_scale=0.1",
)
CASES = {
    "simclr": ("method.name=simclr",),
    "vicreg": ("method.name=vicreg",),
    "vicreg moments": ("method.name=vicreg", "method.route=moments"),
    "vicreg fastssl": ("method.name=vicreg", "method.multiview=fastssl", "method.covariance=auto"),
    "barlow_twins": ("method.name=barlow_twins",),
    "barlow_twins moments": ("method.name=barlow_twins", "method.route=moments"),
    "barlow_twins fastssl": (
        "method.name=barlow_twins",
        "method.multiview=fastssl",
        "method.off_diagonal=auto",
    ),
    "byol": ("method.name=byol",),
    "simsiam": ("method.name=simsiam",),
    "mocov3": ("method.name=mocov3", "method.predictor_last_norm=true"),
    "mocov2plus": ("method.name=mocov2plus", "method.queue_size=31"),
    "nnclr": ("method.name=nnclr", "method.queue_size=31"),
    "ressl": ("method.name=ressl", "method.queue_size=31"),
    "mmcr": ("method.name=mmcr", "method.weight=0.3"),
    "swav": ("method.name=swav", "method.prototypes=7"),
    "deepclusterv2": ("method.name=deepclusterv2", "method.prototypes=[5, 3, 4]"),
    "dino": ("method.name=dino", "method.prototypes=9", "method.norm_last_layer=false"),
    "adadim": ADADIM,
    "adadim cov": (*ADADIM, "method.mi_form=cov", "model.projector=[24, 16]"),
    "adadim moments": (*ADADIM, "method.route=moments"),
}


# More clusterings than views, so that every large view is remembered.
FOR_TWELVE_IMAGES = {"deepclusterv2": ("method.prototypes=[5, 3, 4, 6, 2]",)}


def starting(comm: Comm, views: int) -> Context:
    """Before the first step. Each view shard sees a crop of its own, as from its own pipeline."""

    def batches(count: int, purpose: str) -> Iterator[Batch]:
        crop = images(views, 12)[comm.view_rank][None, comm.rows(12 // comm.data_shards)]
        ids = torch.arange(12)[comm.rows(12 // comm.data_shards)]
        yield Batch(list(crop), ids, ids % 3)

    return Context(comm, 0, 0, 4, batches, lambda figures: None, lambda text: None)


def step(world: World, view_shards: int, views: int, settings: tuple[str, ...]) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    config = config_of(SHALLOW, f"data.views.0.count={views}", *settings)
    method = method_of(config, comm)
    module = DDP(method, broadcast_buffers=False) if world.size > 1 else method
    method.on_start(starting(comm, views))
    out = module(batch_of(images(views, 12), comm))
    out.loss.backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    terms = {n: float(v) for n, v in out.terms.items()}
    return float(out.loss), terms, gradients, dict(method.named_buffers())


def compiled_step(world: World, view_shards: int, views: int, settings: tuple[str, ...]) -> Any:
    """Without breaks in the graphs."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with graphs_run_one_by_one():
        result = step(world, view_shards, views, (*settings, "model.compile=true"))
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    return result


def compare(
    ranks: Ranks, sizes: Any, views: int, settings: tuple[str, ...], how: Any = step
) -> None:
    ((loss, terms, gradients, buffers),) = ranks.run(step, 1, 1, views, settings)
    assert max(float(gradient.norm()) for gradient in gradients.values()) > 1e-6
    for size, view_shards in sizes:
        results = ranks.run(how, size, view_shards, views, settings)
        assert sum(r[0] for r in results) / size == pytest.approx(loss, rel=1e-10)
        for name, value in terms.items():
            mean = sum(r[1][name] for r in results) / size
            assert mean == pytest.approx(value, rel=1e-10), name
        for _, _, grads, stats in results:
            assert grads.keys() == gradients.keys()
            assert_same_gradients([grads[name] for name in gradients], list(gradients.values()))
            for name, value in buffers.items():
                # A mean that is zero but for rounding has no relative error of its own.
                error = (stats[name].double() - value.double()).norm()
                assert float(error) < 1e-10 * max(float(value.double().norm()), 1e-3), name


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_at_any_world_size(ranks: Ranks, case: str) -> None:
    compare(ranks, [(2, 1), (3, 1), (4, 1)], 2, CASES[case])


@pytest.mark.parametrize("forward", ["separate", "stacked"])
@pytest.mark.parametrize("name", builtin_methods())
def test_views_may_be_spread_over_processes(ranks: Ranks, name: str, forward: str) -> None:
    settings = (f"method.name={name}", f"model.views_forward={forward}")
    settings += FOR_TWELVE_IMAGES.get(name, ())
    compare(ranks, [(4, 1), (4, 2), (4, 4)], 4, settings)


@pytest.mark.parametrize(("name", "views", "mesh"), [("byol", 2, (2, 1)), ("adadim", 4, (4, 2))])
def test_compiled_networks_take_the_same_step(
    ranks: Ranks, name: str, views: int, mesh: tuple[int, int]
) -> None:
    """With predictor and momentum network, and with view shards; under DDP."""
    compare(ranks, [mesh], views, (f"method.name={name}",), compiled_step)


def test_the_memory_of_every_view_starts_from_view_zero(ranks: Ranks) -> None:
    """With more large views than shards, and where each shard has another crop."""
    settings = ("method.name=deepclusterv2", *FOR_TWELVE_IMAGES["deepclusterv2"])
    ((_, whole),) = ranks.run(first_memory, 1, 1, settings)
    assert whole.shape[0] == 4
    assert all(torch.equal(rows, whole[0]) for rows in whole)
    for view_shards in (1, 2, 4):
        (rank, rows), *_ = ranks.run(first_memory, 4, view_shards, settings)
        assert rank == 0
        assert relative(rows, whole) < 1e-10


def first_memory(world: World, view_shards: int, settings: tuple[str, ...]) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    method = method_of(config_of(SHALLOW, "data.views.0.count=4", *settings), comm)
    method.on_start(starting(comm, 4))
    return comm.rank, method.get_extra_state()["rows"]


def test_separate_and_stacked_are_different_gradients(ranks: Ranks) -> None:
    (a,) = ranks.run(step, 1, 1, 2, ("model.views_forward=separate",))
    (b,) = ranks.run(step, 1, 1, 2, ("model.views_forward=stacked",))
    name = "backbone.conv1.weight"
    assert relative(a[2][name], b[2][name]) > 0.01


def test_local_batch_norm_is_not_the_large_batch(ranks: Ranks) -> None:
    """The comparison above can fail: with local statistics it does."""
    settings = ("model.batch_norm=local",)
    ((loss, *_),) = ranks.run(step, 1, 1, 2, settings)
    results = ranks.run(step, 4, 1, 2, settings)
    assert sum(r[0] for r in results) / 4 != pytest.approx(loss, rel=1e-3)


def test_adadim_is_its_formula_on_the_networks_outputs() -> None:
    method = method_of(config_of(*ADADIM, "method.temperature=0.2"))
    out = method(batch_of(images(2, 12)))
    r, z = out.features.detach(), out.embeddings.detach()
    invariance, variance, covariance = oracles.vicreg(z)
    vic = 25 * invariance + 25 * variance + covariance
    expected = 0.3 * oracles.info_nce(z, 0.2) + 0.7 * vic
    expected += 0.1 * oracles.mutual_information(r, z)
    assert float(out.loss.detach()) == pytest.approx(expected, rel=1e-10)


def test_alpha_zero_is_vicreg_and_alpha_one_is_simclr() -> None:
    batch = batch_of(images(2, 12))

    def loss_and_gradient(*settings: str) -> tuple[float, torch.Tensor]:
        method = method_of(config_of("model.projector_norm=batch", *settings))
        out = method(batch)
        out.loss.backward()
        return float(out.loss), method.backbone.conv1.weight.grad

    fixed = ("method.alpha=fixed", "method.beta=off", "method.temperature=0.2")
    ends = {
        0: loss_and_gradient("method.name=vicreg"),
        1: loss_and_gradient("method.name=simclr"),
    }
    for alpha, (loss, gradient) in ends.items():
        ours, grad = loss_and_gradient(*fixed, f"method.alpha_value={alpha}")
        assert ours == pytest.approx(loss, rel=1e-12)
        assert relative(grad, gradient) < 1e-12
    middle, grad = loss_and_gradient(*fixed, "method.alpha_value=0.25")
    assert middle == pytest.approx(0.75 * ends[0][0] + 0.25 * ends[1][0])
    assert relative(grad, 0.75 * ends[0][1] + 0.25 * ends[1][1]) < 1e-10


@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_joined_in_their_order(
    kind: torch.dtype, precision: torch.dtype | None, layout: torch.memory_format, channels: int
) -> None:
    """As torch joins them, in the precision that the first convolution would cast them to."""
    views = [
        torch.randn(2, channels, 5, 5).to(kind).contiguous(memory_format=layout) for _ in range(3)
    ]
    right = torch.cat(views)
    if precision is not None and kind != torch.float64:
        right = right.to(precision)
    batch = joined(views, precision)
    assert torch.equal(batch, right)
    assert (batch.dtype, batch.stride()) == (right.dtype, right.stride())
    single = joined(views[:1], precision)
    assert torch.equal(single, right[:2])
    assert single.dtype == right.dtype
    assert (single is views[0]) == (right.dtype == kind)
    views[1].requires_grad_()
    joined(views, precision).sum().backward()
    assert views[1].grad is not None


def test_a_small_view_group_goes_through_its_own_forward() -> None:
    views = "data.views=[{count: 2, size: 16}, {count: 2, size: 8}]"
    method = method_of(config_of(views))
    large, small = images(2, 12), images(2, 12, size=8)
    batch = batch_of(large)
    batch.views += list(small)
    out = method(batch)
    assert out.embeddings.shape == (4, 12, 12)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters())


# --- alpha -----------------------------------------------------------------------------------


def measure(world: World, settings: tuple[str, ...], batches: int, view_shards: int = 1) -> Any:
    comm = comm_of(world, view_shards)
    method = method_of(config_of("method.alpha_every=2", *settings), comm)
    data = [images(1, 12, seed_shift(i)) for i in range(batches)]
    told: list[str] = []
    reported: list[dict[str, float]] = []
    decomposed: list[int] = []
    work = Matrix.effective_rank

    def counted(self: Matrix) -> float:
        decomposed.append(world.rank)
        return work(self)

    before = {n: b.clone() for n, b in method.named_buffers()}

    def source(count: int, purpose: str) -> Any:
        assert purpose == "alpha"
        return (first_view(x, comm) for x in data[:count])

    alphas = []
    with patch.object(Matrix, "effective_rank", counted):
        for epoch in range(4):
            context = Context(comm, 0, epoch, 4, source, reported.append, told.append)
            method.after_epoch(context)
            alphas.append(method.alpha.value)
    unchanged = all(torch.equal(before[n], b) for n, b in method.named_buffers())
    z = torch.cat([torch.zeros(0, 12, dtype=torch.float64)])
    if world.size == 1:
        method.eval()
        z = torch.stack([method.embed(x[0])[1].detach() for x in data])
    state = method.state_dict()["_extra_state"]
    return alphas, told, reported, unchanged, z, method.training, state, decomposed


def first_view(x: Tensor, comm: Comm) -> Batch:
    """This process's images; other members of a view group have others, which must not count."""
    mine = x[0, comm.rows(x.shape[1] // comm.data_shards)] + comm.view_rank
    ids = torch.arange(len(mine))
    return Batch([mine], ids, ids)


def seed_shift(index: int) -> int:
    return 16 + index  # another image size gives other images; the network takes any


@pytest.mark.parametrize("settings", [(), ("method.alpha_route=gram",)])
def test_alpha_is_the_same_at_any_world_size(ranks: Ranks, settings: tuple[str, ...]) -> None:
    from ddp_ssl.metrics import effective_rank

    ((alphas, told, reported, unchanged, z, training, state, _),) = ranks.run(
        measure, 1, settings, 3
    )
    expected = sum(float(effective_rank(batch)) for batch in z) / 3 / 12
    assert alphas == [0, alphas[1], alphas[1], alphas[3]]  # from the epoch after a measurement
    assert alphas[1] == pytest.approx(expected, rel=1e-10)
    assert 0 < alphas[1] < 1
    assert unchanged
    assert training is False  # this test's own eval, after the last measurement
    assert "over 3 global batches, all there are of 10 asked for" in told[0]
    assert reported[0]["rep/effective_rank_z_train"] == pytest.approx(alphas[1] * 12)
    assert state["alpha"] == alphas[3]
    assert [entry["epoch"] for entry in state["history"]] == [2, 4]
    for size, view_shards in ((2, 1), (3, 1), (4, 1), (2, 2), (4, 2)):
        results = ranks.run(measure, size, settings, 3, view_shards)
        assert [r[7] for r in results] == [[0] * 6] + [[]] * (size - 1)  # rank 0 alone
        assert all(r[6] == results[0][6] for r in results)
        assert all(r[0] == results[0][0] for r in results)  # bit-identical on all ranks
        assert results[0][0] == pytest.approx(alphas, rel=1e-10)
        assert all(r[5] for r in results)  # back in training mode


def test_alpha_with_batch_statistics_leaves_the_running_averages_alone(ranks: Ranks) -> None:
    for settings in (("method.alpha_mode=train_stats",), ("method.alpha_space=r",)):
        for result in ranks.run(measure, 2, settings, 2):
            assert result[3]


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [("linear", [0, 0.25, 0.5, 0.75]), ("cosine", [0, 0.1464466, 0.5, 0.8535534])],
)
def test_scheduled_alpha_grows_from_zero(alpha: str, expected: list[float]) -> None:
    method = method_of(config_of(f"method.alpha={alpha}"))
    seen = []
    for epoch in range(4):
        seen.append(method.alpha.value)
        method.after_epoch(Context(method.comm, 0, epoch, 4, None, None, None))  # type: ignore[arg-type]
    assert seen == pytest.approx(expected)


@pytest.mark.parametrize(("beta", "expected"), [("off", 0), ("fixed", -0.01), ("adaptive", -0.004)])
def test_beta_keeps_its_sign(beta: str, expected: float) -> None:
    settings = ("method.alpha=fixed", "method.alpha_value=0.4", "method.beta_scale=-0.01")
    method = method_of(config_of(*settings, f"method.beta={beta}"))
    assert method.beta == pytest.approx(expected)


def test_alpha_and_history_survive_a_state_dict() -> None:
    method = method_of(config_of())
    method.alpha.value, method.alpha.history = 0.123456789012345678, [{"epoch": 2, "alpha": 0.5}]
    other = method_of(config_of())
    other.load_state_dict(method.state_dict())
    assert other.alpha.state() == method.alpha.state()


def test_cov_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match="as wide as the representation"):
        method_of(config_of("method.mi_form=cov"))


def test_one_image_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch_size: vicreg needs the variance over 2"):
        config_of("method.name=vicreg", "data.batch_size=1", "model.batch_norm=local")
