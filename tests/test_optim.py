from __future__ import annotations

import copy
import itertools
import math
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from lightly.utils.scheduler import cosine_schedule
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from ddp_ssl import optim
from ddp_ssl.config import ConfigError, Optim
from ddp_ssl.optim import (
    LARS,
    MuonAdamW,
    Variant,
    build,
    learning_rate,
    load_state_by_name,
    set_learning_rates,
    state_by_name,
)
from tests.helpers import Operators


def lars_by_hand(
    p: list[float],
    g: list[float],
    buf: list[float] | None,
    *,
    one_dimensional: bool,
    lr: float,
    momentum: float,
    wd: float,
    eta: float,
    clip: bool,
    variant: str,
    bound: float | None,
) -> tuple[list[float], list[float]]:
    """One step on one flattened tensor: the formulas, number by number."""

    def norm(x: list[float]) -> float:
        return math.sqrt(math.fsum(v * v for v in x))

    d = list(g)
    if not one_dimensional and variant == "solo":
        if norm(p) != 0 and norm(g) != 0:
            q = eta * norm(p) / (norm(g) + wd * norm(p) + 1e-8)
            if clip:
                q = min(q / lr, 1) if lr > 0 else 1
            d = [q * (b + wd * a) for a, b in zip(p, g, strict=True)]
    elif not one_dimensional:
        d = [b + wd * a for a, b in zip(p, g, strict=True)]
        q = eta * norm(p) / norm(d) if norm(p) > 0 and norm(d) > 0 else 1
        d = [q * v for v in d]
    buf = d if buf is None else [momentum * b + v for b, v in zip(buf, d, strict=True)]
    if one_dimensional and bound is not None:
        excess = max(lr * max(abs(b) for b in buf) / bound, 1)
        buf = [b / excess for b in buf]
    return [a - lr * b for a, b in zip(p, buf, strict=True)], buf


def some_parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"conv": (4, 3, 2, 2), "wide": (5, 40), "bias": (6,), "scalar": (), "zero": (3, 3)}
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    values["zero"].zero_()
    values["wide"] *= 100
    values["still"] = torch.ones(2, 2, dtype=torch.float64)
    values["unused"] = torch.ones(2, 2, dtype=torch.float64)
    return [(name, nn.Parameter(value)) for name, value in values.items()]


def set_gradients(params: list[tuple[str, nn.Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for name, p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if name == "still":
            p.grad.zero_()
        if name == "conv":
            p.grad *= 1e-4
        if name == "unused":
            p.grad = None


@pytest.mark.parametrize(
    ("variant", "clip", "bound"),
    list(itertools.product(["solo", "vicreg"], [True, False], [None, 0.05])),
)
def test_lars_follows_its_formulas(variant: Variant, clip: bool, bound: float | None) -> None:
    """Three groups, all updated at once, with rates and decays of their own."""
    groups = [some_parameters() for _ in range(3)]
    decays, shares = (1e-2, 0.0, 3e-2), (1.0, 0.3, 0.0)
    eta = 0.02 if variant == "solo" else 0.001
    optimizer = LARS(
        [{"params": g, "weight_decay": wd} for g, wd in zip(groups, decays, strict=True)],
        lr=0.1, eta=eta, clip=clip, variant=variant, bound_1d=bound,
    )  # fmt: skip
    expected: dict[Tensor, tuple[list[float], list[float] | None]] = {
        p: (p.detach().flatten().tolist(), None) for params in groups for _, p in params
    }
    bounded = 0
    for step, lr in enumerate([0.1, 0.0, 1e-3, 0.4, 3.0]):
        for index, (params, wd, share) in enumerate(zip(groups, decays, shares, strict=True)):
            set_gradients(params, 3 * step + index)
            optimizer.param_groups[index]["lr"] = lr * share
            for _, p in params:
                if p.grad is None:
                    continue
                before, buf = expected[p]
                expected[p] = lars_by_hand(
                    before,
                    p.grad.flatten().tolist(),
                    buf,
                    one_dimensional=p.ndim == 1,
                    lr=lr * share,
                    momentum=0.9,
                    wd=wd,
                    eta=eta,
                    clip=clip,
                    variant=variant,
                    bound=bound,
                )
                moved = max(abs(a - b) for a, b in zip(before, expected[p][0], strict=True))
                bounded += p.ndim == 1 and bound is not None and math.isclose(moved, bound)
        optimizer.step()
        for index, params in enumerate(groups):
            for name, p in params:
                torch.testing.assert_close(
                    p.detach().flatten(),
                    torch.tensor(expected[p][0], dtype=torch.float64),
                    rtol=1e-13,
                    atol=1e-14,
                    msg=lambda text, where=f"{name} of group {index}": f"{where}: {text}",
                )
    assert bounded == 0 if bound is None else 0 < bounded < 15


OTHER = {
    "momentum": 0.5,
    "eta": 0.1,
    "clip": False,
    "variant": "vicreg",
    "eps": 1.0,
    "bound_1d": 0.01,
}


@pytest.mark.parametrize("name", OTHER)
def test_a_group_has_every_option_of_its_own(name: str) -> None:
    """Given to the group, written by a scheduler, loaded: each time as with two optimisers."""

    def ends(optimizers: list[LARS], groups: list[list[tuple[str, nn.Parameter]]]) -> list[Tensor]:
        for step in range(3):
            for params in groups:
                set_gradients(params, step)
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for params in groups for _, p in params]

    def pair() -> list[list[tuple[str, nn.Parameter]]]:
        return [some_parameters(), some_parameters()]

    own: dict[str, Any] = {name: OTHER[name]}
    apart = pair()
    expected = ends([LARS(apart[0], 0.1), LARS(apart[1], 0.1, **own)], apart)
    assert any(not torch.equal(*both) for both in zip(expected[:7], expected[7:], strict=True))

    given, written, loaded = pair(), pair(), pair()
    one = LARS([{"params": given[0]}, {"params": given[1], **own}], 0.1)
    state = one.state_dict()
    two = LARS([{"params": params} for params in written], 0.1)
    two.param_groups[1].update(own)
    three = LARS([{"params": params} for params in loaded], 0.1)
    three.load_state_dict(state)
    for optimizer, groups in ((one, given), (two, written), (three, loaded)):
        for a, b in zip(expected, ends([optimizer], groups), strict=True):
            assert torch.equal(a, b)


def test_a_step_of_groups_on_two_devices() -> None:
    here, there = [nn.Parameter(torch.ones(3, 3, device=device)) for device in ("cpu", "meta")]
    optimizer = LARS([{"params": [there]}, {"params": [here]}], 0.1)
    for p in (here, there):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (here < 1).all()
    assert optimizer.state[there]["momentum_buffer"].is_meta


def test_lars_clip_binds_in_the_test_above_for_some_tensors_only() -> None:
    params = dict(some_parameters())
    set_gradients(list(params.items()), 0)
    ratio = {
        name: 0.02 * float(p.detach().norm() / p.grad.norm()) / 0.1
        for name, p in params.items()
        if p.grad is not None and name in ("conv", "wide", "scalar")
    }
    assert min(ratio.values()) < 1 < max(ratio.values())


@pytest.mark.parametrize("variant", ["solo", "vicreg"])
def test_lars_never_gives_nan_from_zeros(variant: Variant) -> None:
    zeros = [nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))]
    optimizer = LARS(zeros, lr=0.0, weight_decay=0.0, variant=variant)
    for lr in (0.0, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        for p in zeros:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all(p.isfinite().all() for p in zeros)


def test_lars_leaves_what_has_no_gradient() -> None:
    params = some_parameters()
    optimizer = LARS([{"params": params}], lr=0.1, weight_decay=0.1)
    set_gradients(params, 0)
    optimizer.step()
    unused = dict(params)["unused"]
    assert torch.equal(unused, torch.ones_like(unused))
    assert unused not in optimizer.state


def test_lars_refuses_another_variant_and_no_bound() -> None:
    with pytest.raises(ValueError, match="solo or vicreg, got 'apex'"):
        LARS([nn.Parameter(torch.ones(1))], lr=0.1, variant="apex")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bound_1d: expected None or a number above 0, got 0"):
        LARS([{"params": [nn.Parameter(torch.ones(1))], "bound_1d": 0.0}], lr=0.1)


def test_lars_runs_a_closure_with_gradients() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight], lr=0.1)

    def closure() -> float:
        loss = weight.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 4.0
    assert float(weight.detach().sum()) < 4


@pytest.mark.parametrize(("variant", "clip"), [("solo", True), ("solo", False), ("vicreg", False)])
def test_lars_does_not_wait_for_the_device(variant: Variant, clip: bool) -> None:
    params = some_parameters()
    optimizer = LARS([{"params": params}], lr=0.1, weight_decay=1e-4, variant=variant, clip=clip)
    with Operators() as seen:
        for step in range(2):
            set_gradients(params, step)
            seen.names.clear()
            optimizer.step()
    assert "aten::_foreach_norm" in seen.names
    assert "aten::_to_copy" not in seen.names
    assert not seen.waits


def test_how_many_tensors_are_stepped_at_once_changes_nothing() -> None:
    ends = []
    for cached in (1, 30, 2**18):
        params = some_parameters()
        optimizer = LARS([{"params": params}], lr=0.1, weight_decay=1e-3, bound_1d=0.01)
        with patch.dict(optim.AT_ONCE, cpu=cached):
            for step in range(3):
                set_gradients(params, step)
                optimizer.step()
        ends.append([p.detach().clone() for _, p in params])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_factors_in_the_shapes_and_strides_of_the_tensors() -> None:
    tensors = [
        torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.randn(()),
        torch.randn(5, 2).T,
        torch.randn(6),
        torch.randn(optim.BLOCK),
        torch.randn(0, 3),
        torch.randn(2 * optim.BLOCK + 1),
        torch.randn(8),
    ]
    factors = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0])
    odd = torch.randn(600, 4)[:, ::2]  # not dense: its own shape alone
    assert torch.equal(optim._expanded(factors[:1], [odd])[0], torch.full((600, 2), 2.0))
    for expanded, factor, tensor in zip(
        optim._expanded(factors, tensors), factors, tensors, strict=True
    ):
        assert expanded.shape == tensor.shape
        assert expanded.stride() == tensor.stride()
        assert (expanded == factor).all()


def test_a_step_as_on_a_gpu() -> None:
    """With factors as large as the tensors, as its kernels want them."""
    ends = []
    for alike in (optim._alike, optim._expanded):
        params = some_parameters()
        optimizer = LARS([{"params": params}], lr=0.1, weight_decay=1e-3, bound_1d=0.01)
        with patch.object(optim, "_alike", alike), patch.object(optim, "BLOCK", 7):
            for step in range(3):
                set_gradients(params, step)
                optimizer.step()
        ends.append([p.detach().clone() for _, p in params])
    for plain, expanded in zip(*ends, strict=True):
        torch.testing.assert_close(expanded, plain, rtol=1e-15, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lars_takes_the_same_number_of_operators_for_any_network() -> None:
    counts = []
    for layers in (3, 30):
        params = [
            nn.Parameter(torch.randn(5, 4, 3, 3, device="cuda")
                         .to(memory_format=torch.channels_last))
            for _ in range(layers)
        ]  # fmt: skip
        biases = [nn.Parameter(torch.randn(7, device="cuda")) for _ in range(layers)]
        optimizer = LARS([{"params": [*params, *biases]}], lr=0.1, bound_1d=0.5)
        for p in (*params, *biases):
            p.grad = torch.randn_like(p)
        optimizer.step()
        with torch.profiler.profile() as profile:
            optimizer.step()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(len(kernels))
    assert counts[0] == counts[1], counts


# --- groups ----------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def groups_of(module: nn.Module, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "network", "params": list(module.named_parameters()), **more}]


@pytest.mark.parametrize("name", ["lars", "adam", "adamw"])
def test_one_dimensional_parameters_are_not_decayed(name: str) -> None:
    config = Optim(name=name, weight_decay=0.05)  # type: ignore[arg-type]
    groups = build(config, groups_of(network())).param_groups
    assert [g["name"] for g in groups] == ["network", "network/1d"]
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0]
    assert groups[0]["param_names"] == ["0.weight", "3.weight"]
    assert groups[1]["param_names"] == ["0.bias", "1.weight", "1.bias", "3.bias"]


def test_sgd_decays_all() -> None:
    groups = build(Optim(name="sgd", weight_decay=0.05), groups_of(network())).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.05, 6)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_parity_with_torch(
    name: str, kind: Any, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_on_gpu", lambda parameters: on_gpu)
    config = Optim(name=name, lr=0.01, weight_decay=0.1, momentum=0.8, betas=(0.8, 0.9))  # type: ignore[arg-type]
    ours, theirs = network(), network()
    optimizer = build(config, groups_of(ours))
    flat = [p for p in theirs.parameters() if p.ndim == 1]
    deep = [p for p in theirs.parameters() if p.ndim != 1]
    if name == "sgd":
        other = kind(theirs.parameters(), lr=0.01, momentum=0.8, weight_decay=0.1, foreach=False)
    else:
        groups = [{"params": deep}, {"params": flat, "weight_decay": 0.0}]
        other = kind(groups, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, foreach=False)
    for _ in range(4):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_adam_on_a_gpu_leaves_infinite_gradients_out_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp16: the scaler need not ask the device whether a gradient was infinite."""
    monkeypatch.setattr(optim, "_on_gpu", lambda parameters: True)
    module, scaler = network(), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = build(Optim(name="adamw", lr=0.01), groups_of(module))
    x = torch.randn(8, 3, 4, 4)
    weights = []
    for scale in (1.0, math.inf, 1.0):
        with Operators() as seen:
            scaler.scale(module(x).square().mean() * scale).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert seen.waits == []
        weights.append([p.detach().clone() for p in module.parameters()])
    for first, left_out, second in zip(*weights, strict=True):
        assert torch.equal(first, left_out)
        assert not torch.equal(left_out, second)
    assert scaler.get_scale() == 2
    assert {float(state["step"]) for state in state_by_name(optimizer).values()} == {2}


def test_groups_have_their_own_settings() -> None:
    module, probe = network(), nn.Linear(5, 3)
    config = Optim(name="lars", lr=0.4, warmup_epochs=1, warmup_lr=0.0, epochs=10)
    groups = [
        *groups_of(module),
        {
            "name": "probe",
            "params": [("probe." + n, p) for n, p in probe.named_parameters()],
            "base_lr": 0.1,
            "weight_decay": 0.0,
        },
        {"name": "still", "params": [("x", nn.Parameter(torch.ones(2, 2)))], "schedule": False},
    ]
    optimizer = build(config, groups)
    assert isinstance(optimizer, LARS)

    def rates(step: int) -> dict[str, float]:
        first = set_learning_rates(optimizer, config, 512, step, 8)
        assert first == optimizer.param_groups[0]["lr"]
        return {g["name"]: g["lr"] for g in optimizer.param_groups}

    assert rates(0) == {
        "network": 0, "network/1d": 0, "probe": 0, "probe/1d": 0, "still": 0.8
    }  # fmt: skip
    assert rates(8) == pytest.approx(
        {"network": 0.8, "network/1d": 0.8, "probe": 0.2, "probe/1d": 0.2, "still": 0.8}
    )
    assert rates(79)["still"] == 0.8
    assert 0 < rates(79)["network"] < 0.001
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "network": 1e-4, "network/1d": 0, "probe": 0, "probe/1d": 0, "still": 1e-4
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_muon_moves_matrices_and_adamw_the_rest() -> None:
    """As torch's two optimisers side by side, the probe's matrix under AdamW; and it resumes."""
    config = Optim(name="muon", lr=0.01, weight_decay=0.1, momentum=0.8, betas=(0.8, 0.9))
    ours, theirs, again = network(), network(), network()
    optimizer = build(config, groups_of(ours))
    assert [(g["name"], g["param_names"]) for g in optimizer.param_groups] == [
        ("network/muon", ["3.weight"]),
        ("network", ["0.weight"]),
        ("network/1d", ["0.bias", "1.weight", "1.bias", "3.bias"]),
    ]
    convolution, matrix = theirs[0].weight, theirs[3].weight
    flat = [p for p in theirs.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(
        [matrix], 0.01, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [{"params": [convolution]}, {"params": flat, "weight_decay": 0.0}],
        lr=0.01, betas=(0.8, 0.9), weight_decay=0.1,
    )  # fmt: skip
    other: torch.optim.Optimizer | None = None
    for step in range(6):
        for part in (muon, adamw):
            part.zero_grad()
        torch.manual_seed(step)
        theirs(torch.randn(8, 3, 4, 4)).square().mean().backward()
        for part in (muon, adamw):
            part.step()
        train(ours, optimizer, range(step, step + 1))
        if step == 2:  # from here on another one goes on from what was saved
            again.load_state_dict(ours.state_dict())
            other = build(config, groups_of(again))
            assert load_state_by_name(other, copy.deepcopy(state_by_name(optimizer))) == []
        elif other is not None:
            train(again, other, range(step, step + 1))
    assert state_by_name(optimizer)["3.weight"].keys() == {"momentum_buffer"}
    for a, b, c in zip(ours.parameters(), theirs.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert torch.equal(a, c)
    probe = {"name": "probe", "params": [("p", nn.Parameter(torch.ones(2, 2)))], "base_lr": 0.1}
    assert [g["name"] for g in build(config, [probe]).param_groups] == ["probe"]


def test_an_older_torch_without_muon_is_said() -> None:
    class Older:
        __version__, optim = "2.8.0", object()

    with (
        patch.object(optim, "torch", Older),
        pytest.raises(
            ConfigError, match=r"optim.name: torch 2.8.0 has no muon; adamw, or torch 2.9"
        ),
    ):
        MuonAdamW([], Optim(name="muon"))


def test_layers_of_a_vit_have_rates_and_decays_as_timm_groups_them() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, reg_tokens=2, num_classes=0)
    head = nn.Linear(vit.num_features, 4)
    config = Optim(name="adamw", lr=0.5, weight_decay=0.04, layer_decay=0.75, warmup_epochs=0)
    named = [*vit.named_parameters(prefix="vit"), *head.named_parameters(prefix="head")]
    optimizer = build(config, [{"name": "network", "params": named}], vit)
    first = set_learning_rates(optimizer, config, 256, 0, 10)
    assert first == 0.5
    ours = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    theirs = param_groups_layer_decay(vit, 0.04, vit.no_weight_decay(), layer_decay=0.75)
    expected = {p: (0.5 * g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    for name, p in vit.named_parameters(prefix="vit"):
        assert ours[name] == pytest.approx(expected[p])
    assert ours["vit.reg_token"] == ours["vit.pos_embed"] == pytest.approx((0.5 * 0.75**3, 0))
    assert ours["head.weight"] == (0.5, 0.04)
    assert ours["head.bias"] == (0.5, 0)
    with pytest.raises(ValueError, match=r"layer_decay: Sequential has no order .* null is accept"):
        build(config, groups_of(network()), network())


def test_weight_decay_follows_a_cosine_where_it_is_the_configs() -> None:
    config = Optim(name="adamw", weight_decay=0.04, final_weight_decay=0.4, epochs=10)
    probe = {
        "name": "probe",
        "params": [("p", nn.Parameter(torch.ones(2, 2)))],
        "weight_decay": 0.0,
    }
    optimizer = build(config, [*groups_of(network()), probe])

    def decays(step: int) -> list[float]:
        set_learning_rates(optimizer, config, 256, step, 8)
        return [group["weight_decay"] for group in optimizer.param_groups]

    assert decays(0) == pytest.approx([0.04, 0, 0])
    assert decays(40) == pytest.approx([0.22, 0, 0])
    for step in range(0, 80, 7):
        theirs = cosine_schedule(step, 81, 0.04, 0.4)
        assert decays(step) == pytest.approx([theirs, 0, 0])


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the name 0\.weight is given twice"):
        build(Optim(), [*groups_of(network()), *groups_of(network())])


# --- schedule --------------------------------------------------------------------------------


def test_schedule_at_its_anchors() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, 110, 10, peak=0.8, warmup_start=3e-5, final_fraction=0.1)

    assert rate(0) == 3e-5
    assert rate(5) == pytest.approx((0.8 + 3e-5) / 2)
    assert rate(10) == 0.8
    assert rate(60) == pytest.approx(0.8 * 0.55)
    assert rate(110) == pytest.approx(0.08)
    assert rate(1000) == pytest.approx(0.08)
    rates = [rate(step) for step in range(111)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert len(set(rates)) == 111


def test_schedule_without_warmup_begins_at_the_peak() -> None:
    assert learning_rate(0, 100, 0, 0.4, 3e-5, 0.0) == 0.4
    assert learning_rate(100, 100, 0, 0.4, 3e-5, 0.0) == pytest.approx(0, abs=1e-15)


def test_a_warmup_longer_than_the_run_is_clipped() -> None:
    rates = [learning_rate(step, 10, 1000, 1.0, 0.0, 0.0) for step in range(11)]
    assert rates == pytest.approx([i / 10 for i in range(11)])
    assert learning_rate(0, 0, 5, 1.0, 0.0, 0.0) == 1.0


def test_fractional_warmup_epochs_are_counted_in_steps() -> None:
    config = Optim(epochs=12, warmup_epochs=1.2, lr=0.1)
    optimizer = build(config, groups_of(network()))
    rates = [set_learning_rates(optimizer, config, 256, step, 5) for step in range(60)]
    assert rates.index(max(rates)) == 6
    assert max(rates) == pytest.approx(0.1)


# --- state by name ---------------------------------------------------------------------------


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize(
    "name", ["lars", "sgd", "adam", "adamw", "muon", "adamw on a GPU", "muon on a GPU"]
)
def test_state_by_name_continues_to_the_last_bit(
    name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, on_gpu = name.partition(" ")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    monkeypatch.setattr(optim, "_on_gpu", lambda parameters: bool(on_gpu))
    config = Optim(name=name, lr=0.01)  # type: ignore[arg-type]
    straight = network()
    expected = train(straight, build(config, groups_of(straight)), range(6))

    first = network()
    optimizer = build(config, groups_of(first))
    train(first, optimizer, range(3))
    torch.save((first.state_dict(), state_by_name(optimizer)), tmp_path / "x.pt")
    weights, state = torch.load(tmp_path / "x.pt", weights_only=True)
    second = network()
    second.load_state_dict(weights)
    optimizer = build(config, groups_of(second))
    assert load_state_by_name(optimizer, state) == []
    for a, b in zip(expected, train(second, optimizer, range(3, 6)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_adams_counter_of_steps_is_where_its_kernels_read_it(fused: bool, device: str) -> None:
    saved = network()
    optimizer = build(Optim(name="adamw"), groups_of(saved))
    train(saved, optimizer, range(1))
    other = build(Optim(name="adamw"), groups_of(network().to("meta")))
    for group in other.param_groups:
        group["fused"] = fused
    load_state_by_name(other, state_by_name(optimizer))
    for state in state_by_name(other).values():
        assert {k: torch.as_tensor(v).device.type for k, v in state.items()} == {
            "step": device, "exp_avg": "meta", "exp_avg_sq": "meta"
        }  # fmt: skip


def test_state_survives_added_and_removed_groups() -> None:
    config = Optim(name="adam", lr=0.01)
    module = network()
    optimizer = build(config, groups_of(module))
    train(module, optimizer, range(2))
    state = copy.deepcopy(state_by_name(optimizer))

    probe = nn.Linear(5, 3)
    extra = {"name": "probe", "params": [("p." + n, p) for n, p in probe.named_parameters()]}
    with_probe = build(config, [extra, *groups_of(module)])
    assert load_state_by_name(with_probe, state) == ["p.weight", "p.bias"]
    restored = state_by_name(with_probe)
    assert restored.keys() == state.keys()
    for name, values in state.items():
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(restored[name][key]))

    state["p.weight"] = {"exp_avg": torch.zeros(3, 5)}
    without = build(config, groups_of(module))
    assert load_state_by_name(without, state) == []
    assert "p.weight" not in state_by_name(without)


def test_loaded_state_is_a_copy() -> None:
    module = network()
    optimizer = build(Optim(), groups_of(module))
    train(module, optimizer, range(1))
    state = copy.deepcopy(state_by_name(optimizer))
    other = build(Optim(), groups_of(network()))
    load_state_by_name(other, state)
    before = torch.as_tensor(state["0.weight"]["momentum_buffer"]).clone()
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    other.step()
    assert torch.equal(before, torch.as_tensor(state["0.weight"]["momentum_buffer"]))


def test_state_of_another_shape_names_the_parameter() -> None:
    optimizer = build(Optim(), groups_of(network()))
    state = {"0.weight": {"momentum_buffer": torch.zeros(1)}}
    with pytest.raises(ValueError, match=r"0\.weight: momentum_buffer is \[1\], expected \[4, 3"):
        load_state_by_name(optimizer, state)


@pytest.mark.parametrize(("rates", "first"), [([0.1] * 30, 1.0), ([3e-5, 0.02, 0.04, 0.1], 1000.0)])
def test_lars_bounds_every_step_of_a_1d_parameter(rates: list[float], first: float) -> None:
    """Momentum included: built up at a constant rate, and carried over into a higher one."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = LARS([p], 0.1, bound_1d=0.1)
    moves = []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.full_like(p, 1.0 if first == 1.0 else first * (step == 0))
        before = p.detach().clone()
        optimizer.step()
        moves.append(float((p.detach() - before).abs().max()))
    assert max(moves) <= 0.1 + 1e-12
    assert max(moves) > 0.09  # and the bound was reached
