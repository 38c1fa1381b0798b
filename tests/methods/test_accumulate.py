"""A batch in parts, and blocks computed again: the gradient of the whole batch, in less memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_ssl import distributed
from ddp_ssl.data.batch import Batch
from ddp_ssl.distributed import World, comm_of
from ddp_ssl.methods import base
from ddp_ssl.methods.base import Method, Progress
from ddp_ssl.models import recompute
from tests.helpers import batch_of, config_of, images, method_of
from tests.methods.settings import SETTINGS
from tests.ranks import Ranks

VIT = (
    "model.backbone=vit_tiny_patch16_224",
    "model.backbone_args={img_size: 16, patch_size: 4, embed_dim: 24, depth: 3, num_heads: 2%s}",
)
METHODS = ["adadim", "byol", "lejepa", "mocov2plus", "swav"]  # queue, predictor, prototypes, ...


def built(name: str, *more: str, backbone: str = "", comm: Any = None) -> Method:
    settings = [VIT[0], VIT[1] % backbone, f"method.name={name}", *SETTINGS.get(name, ()), *more]
    config = config_of(*settings)
    return method_of(config) if comm is None else method_of(config, comm)


def trained(method: Method, module: Any = None) -> tuple[float, dict[str, Tensor]]:
    """Loss, gradients and buffers of one step on twelve images."""
    torch.manual_seed(3)
    loss = (module or method)(batch_of(images(2, 12), method.comm)).loss
    loss.backward()
    method.after_step(Progress(1, 10, 0, 1))
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    found |= {f"{name} (buffer)": b.double() for name, b in method.named_buffers()}
    return float(loss.detach()), found


@pytest.mark.parametrize("name", METHODS)
def test_parts_have_the_gradient_of_the_whole_batch(name: str) -> None:
    """The queue, the momentum network and the projector's batch norms move once."""
    loss, whole = trained(built(name))
    again, parts = trained(built(name, "optim.accumulate=5"))  # five parts of 24 rows: unequal
    assert again == pytest.approx(loss, rel=1e-12)
    assert whole.keys() == parts.keys()
    assert len([name for name in whole if name.startswith("backbone")]) > 30
    same(parts, whole)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rounding: float = 1e-12) -> None:
    """Up to rounding; a bias before a batch norm has no gradient but rounding."""
    scale = max(float(value.abs().max()) for value in theirs.values())
    for key, value in theirs.items():
        assert float((ours[key] - value).abs().max()) < rounding * scale, key


CROPS = ("data.views=[{count: 2, size: 16, recipe: sym}, {count: 2, size: 8, recipe: sym}]",)


def test_views_of_two_sizes_and_blocks_computed_again_under_autocast() -> None:
    """In bf16 the parts' gradients of a weight are added in float32, without loss of precision."""

    def gradients(precision: str, *more: str) -> dict[str, Tensor]:
        how = {"backbone": ", dynamic_img_size: true"}
        method = built("lejepa", f"optim.precision={precision}", *CROPS, *more, **how).float()
        large, small = images(2, 12).float(), images(2, 12, size=8).float()
        ids = torch.arange(12)
        method(Batch([*large, *small], ids, ids % 3)).loss.backward()
        return {n: p.grad for n, p in method.named_parameters() if n.endswith("weight")}

    exact, whole = gradients("fp32"), gradients("bf16")
    for more in (("optim.accumulate=6",), ("optim.accumulate=6", "model.checkpointing=true")):
        same({n: g.double() for n, g in gradients("fp32", *more).items()},
             {n: g.double() for n, g in exact.items()}, 1e-5)  # fmt: skip
        parts = gradients("bf16", *more)
        off = [sum(float((g[n] - exact[n]).norm()) for n in exact) for g in (parts, whole)]
        assert 0 < off[0] < 1.1 * off[1]


def test_a_momentum_network_goes_in_parts_too() -> None:
    whole, parts = (peak(*more, name="byol")[0] for more in ((), ("optim.accumulate=8",)))
    assert parts < 0.3 * whole


def under_ddp(world: World, parts: int) -> Any:
    comm = comm_of(world)
    more = ("model.checkpointing=true", f"optim.accumulate={parts}")
    method = built("simclr", *more, comm=comm)
    loss, found = trained(method, distributed.data_parallel(method, world, None))
    return loss, found


def test_several_processes_reduce_once_and_have_the_large_batchs_gradient(ranks: Ranks) -> None:
    loss, whole = trained(built("simclr"))
    for value, parts in ranks.run(under_ddp, 2, 3):
        assert value == pytest.approx(loss, rel=1e-12)
        same(parts, whole)


def test_random_numbers_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout and drop path: as if each part's graph had been kept, to the last bit."""
    how = {"backbone": ", proj_drop_rate: 0.3, drop_path_rate: 0.3"}
    loss, ours = trained(built("simclr", "optim.accumulate=3", **how))
    monkeypatch.setattr(base, "checkpoint", lambda part, x, use_reentrant: part(x))
    kept, theirs = trained(built("simclr", "optim.accumulate=3", **how))
    assert kept == loss
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    other, _ = trained(built("simclr", "optim.accumulate=3"))
    assert other != loss


@pytest.mark.parametrize("more", [(), ("optim.accumulate=3",)])
def test_blocks_computed_again_change_no_bit(more: tuple[str, ...]) -> None:
    loss, whole = trained(built("vicreg", *more))
    again, ours = trained(built("vicreg", "model.checkpointing=true", *more))
    assert again == loss
    assert all(torch.equal(ours[key], whole[key]) for key in whole)


class Peak(TorchDispatchMode):
    """The most bytes of tensors made within that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: Any) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place and place not in self._seen:
            self._seen.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def peak(*more: str, name: str = "simclr") -> tuple[int, int]:
    """Bytes alive at most in a step of 240 images, and bytes kept for the backward pass."""
    method = built(name, "data.batch_size=240", *more)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    batch = batch_of(images(2, 240))
    with Peak() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        method(batch).loss.backward()
    return seen.most, sum(kept.values())


def test_activations_of_one_part_are_in_memory() -> None:
    whole, kept = peak()
    parts, kept_in_parts = peak("optim.accumulate=8")
    assert parts < 0.3 * whole  # an eighth, projector and loss
    assert kept_in_parts < 0.3 * kept
    blocks, kept_of_blocks = peak("model.checkpointing=true")
    assert kept_of_blocks < 0.4 * kept
    assert blocks < 0.6 * whole


@pytest.mark.parametrize("key", ["optim.accumulate=2", "model.checkpointing=true"])
def test_batch_norms_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key.partition('=')[0]}: resnet18 has batch norms, "):
        method_of(config_of("method.name=simclr", key))


def test_a_backbone_that_cannot_compute_blocks_again_is_refused() -> None:
    class Plain(torch.nn.Sequential):
        """No model of timm."""

    config = config_of("method.name=simclr", "model.checkpointing=true")
    with pytest.raises(ValueError, match=r"^model\.checkpointing: timm's resnet18 cannot"):
        recompute(Plain(), config)
