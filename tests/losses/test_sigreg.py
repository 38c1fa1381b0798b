"""SIGReg: the formula, closed forms, lightly, edges, several processes."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ddp_ssl.distributed import MeshComm, World, comm_of
from ddp_ssl.losses import sigreg
from ddp_ssl.losses.sigreg import directions
from ddp_ssl.methods.base import Progress
from tests.helpers import batch_of, config_of, images, method_of, relative
from tests.losses import oracles
from tests.losses.inputs import same, some
from tests.ranks import Ranks

FEW = {"seed": 3, "step": 5, "slices": 6}


@pytest.mark.parametrize(("t_max", "knots"), [(5.0, 17), (3.0, 33), (2.0, 3)])
def test_it_is_the_formula(t_max: float, knots: int) -> None:
    z = some(3, 7, 4)
    drawn = directions(4, 6, 3, 5, like=z)
    same(
        lambda z: sigreg(z, **FEW, t_max=t_max, knots=knots),
        lambda z: oracles.sigreg(z, drawn, t_max, knots),
        z,
    )


def test_it_is_lightlys() -> None:
    """lightly's knots are those of the positive half, from 0 to 3; its constants are float32."""
    from lightly.loss.lejepa_loss import SIGReg

    z, theirs = some(4, 9, 5), SIGReg(num_vectors=6).double()
    window = torch.exp(-theirs.t.square() / 2)
    assert torch.allclose(theirs.phi, window, atol=1e-7)
    theirs.weights *= window / theirs.phi
    theirs.phi.copy_(window)
    drawn = directions(5, 6, 3, 5, like=z)
    with patch.object(theirs, "_generate_unit_vectors", lambda *_: drawn):
        same(lambda z: sigreg(z, **FEW, t_max=3, knots=33), theirs, z)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.7, 1.0), (0.0, 2.0), (-1.0, 0.3)])
def test_normal_input_of_any_mean_and_deviation(mean: float, deviation: float) -> None:
    """Quantiles of N(mean, deviation^2) in one dimension against the integral's closed form."""
    n = 20_000
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x = mean + deviation * math.sqrt(2) * torch.erfinv(2 * level - 1)
    value = sigreg(x[None, :, None], seed=0, step=0, slices=2, t_max=12, knots=401) / n
    s = deviation**2

    def integral(a: float, b: float = 0.0) -> float:
        """Of exp(-a t^2 / 2) cos(b t)."""
        return math.sqrt(2 * math.pi / a) * math.exp(-(b**2) / (2 * a))

    expected = integral(2 * s + 1) + integral(3) - 2 * integral(s + 2, mean)
    assert float(value) == pytest.approx(expected, abs=2e-5)


def test_normal_samples_have_the_documented_mean_at_any_number() -> None:
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    for n in (8, 200):
        z = torch.randn(400, n, 3, generator=torch.Generator().manual_seed(n)).double()
        assert float(sigreg(z, seed=0, step=0, slices=16)) == pytest.approx(expected, rel=0.08)
    assert expected == pytest.approx(1.06, abs=0.005)


def test_directions_are_of_length_one_and_of_their_seed_and_step() -> None:
    z = some(1, 2, 9)
    drawn = directions(9, 500, 1, 2, like=z)
    assert torch.allclose(drawn.norm(dim=0), torch.ones(500, dtype=torch.float64))
    assert torch.equal(drawn, directions(9, 500, 1, 2, like=z))
    others = [directions(9, 500, seed, step, like=z) for seed, step in ((1, 3), (2, 2))]
    assert all(float((drawn - other).abs().max()) > 0.1 for other in others)
    assert float((drawn @ drawn.T / 500 * 9 - torch.eye(9)).abs().max()) < 0.4  # no direction first


def test_each_step_of_the_method_has_directions_of_its_own() -> None:
    method = method_of(config_of("method.name=lejepa", "method.slices=8"))
    batch, seen = batch_of(images(2, 12)), []
    for step in range(3):
        seen.append(float(method(batch).terms["sigreg"].detach()))
        method.after_step(Progress(step, 10, 0, 1))
    assert len(set(seen)) == 3
    state = method.get_extra_state()
    method.set_extra_state({"step": 0})
    assert float(method(batch).terms["sigreg"].detach()) == seen[0]
    method.set_extra_state(state)
    assert float(method(batch).terms["sigreg"].detach()) not in seen


def test_the_methods_terms_are_float32_under_autocast() -> None:
    method = method_of(config_of("method.name=lejepa", "optim.precision=bf16"), dtype=torch.float32)
    terms = method(batch_of(images(2, 12, dtype=torch.float32))).terms
    assert {value.dtype for value in terms.values()} == {torch.float32}


def test_a_constant_embedding_is_far_and_has_a_finite_gradient() -> None:
    z = torch.zeros(2, 50, 4, dtype=torch.float64, requires_grad=True)
    value = sigreg(z, seed=0, step=0, slices=8)
    value.backward()
    assert float(value.detach()) > 10
    assert torch.isfinite(z.grad).all()  # type: ignore[union-attr]


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected z of shape \[K, N, d\]"):
        sigreg(some(4, 5), **FEW)
    with pytest.raises(ValueError, match="odd number of 3 or more, got 4"):
        sigreg(some(2, 4, 5), **FEW, knots=4)
    with pytest.raises(ValueError, match="slices >= 1"):
        sigreg(some(2, 4, 5), seed=0, step=0, slices=0)


def test_half_precision_is_computed_in_float32_under_autocast() -> None:
    z = some(2, 6, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = sigreg(z, **FEW)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, sigreg(z.float(), **FEW))


def local(world: World, view_shards: int) -> Any:
    comm = MeshComm(world, view_shards) if world.size > 1 else comm_of(world)
    z = some(4, 12, 10)[comm.views, comm.rows(12 // comm.data_shards)].clone().requires_grad_()
    loss = sigreg(z, **FEW, comm=comm)
    (gradient,) = torch.autograd.grad(loss, z)
    return float(loss.detach()), gradient


@pytest.mark.parametrize(("size", "view_shards"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
def test_over_processes_it_is_the_large_batchs(ranks: Ranks, size: int, view_shards: int) -> None:
    z = some(4, 12, 10, grad=True)
    whole = sigreg(z, **FEW)
    (gradient,) = torch.autograd.grad(whole, z)
    n = 12 // (size // view_shards)
    for rank, (value, mine) in enumerate(ranks.run(local, size, view_shards)):
        assert value == pytest.approx(float(whole.detach()), rel=1e-12)
        place = slice(rank // view_shards * n, (rank // view_shards + 1) * n)
        held: Tensor = gradient[rank % view_shards :: view_shards, place]
        assert relative(mine / size, held) < 1e-10  # as DDP averages
