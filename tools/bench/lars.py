"""A step of LARS beside lightly's, solo-learn's and torch's SGD, on a ResNet-50's parameters.

    python tools/bench/lars.py [--repeats 15] [--device cpu] [--threads 2] [--model resnet50]

Gradients are random and made once (a step of ours adds the decay to them). Also printed are the
operators that a step launches, and how often it asks the device for a value (`item`, `bool`), which
stalls a GPU's host. lightly's and solo-learn's take part where they are installed. Only the file
with solo-learn's LARS is loaded, so `pip install --no-deps solo-learn==1.0.2` is enough.
"""

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from compare import device_line, in_turn, parser_of, spread, verdict
from torch import nn

from ddp_ssl.optim import LARS, is_one_dimensional

OURS = "ddp_ssl LARS"
SYNCHRONISING = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero")


def with_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Its own copies of the parameters, with random gradients."""
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for p in copies:
        p.grad = torch.randn_like(p) * 0.01
    return copies


def groups(parameters: list[nn.Parameter]) -> list[dict[str, object]]:
    """1-D parameters apart and without weight decay, as a run has them."""
    deep = [p for p in parameters if not is_one_dimensional(p)]
    flat = [p for p in parameters if is_one_dimensional(p)]
    return [{"params": deep, "weight_decay": 1e-4}, {"params": flat, "weight_decay": 0.0}]


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """All contestants, each with parameters of its own."""

    def sgd(**how: bool) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups(with_gradients(model)), 1e-4, momentum=0.9, **how)

    made = {
        OURS: LARS(groups(with_gradients(model)), 1e-4, bound_1d=0.5),
        "SGD, foreach": sgd(foreach=True),
        "SGD, fused": sgd(fused=True),
    }
    with contextlib.suppress(ModuleNotFoundError):
        from lightly.utils.lars import LARS as Lightly

        made["lightly LARS"] = Lightly(groups(with_gradients(model)), 1e-4, momentum=0.9)
    wrapper = solo_learns()
    if wrapper is not None:
        made["solo-learn LARS"] = wrapper(sgd(), eta=0.02, clip=True, exclude_bias_n_norm=True)
    return made


def solo_learns() -> Callable[..., torch.optim.Optimizer] | None:
    """solo-learn's LARS, without what the package imports besides."""
    package = importlib.util.find_spec("solo")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "utils" / "lars.py"
    spec = importlib.util.spec_from_file_location("solo_lars", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LARSWrapper  # type: ignore[no-any-return]


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """The number of operators that one call launches, and of those that wait for the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    assert profile.profiler is not None
    events = profile.events() or []
    names = Counter(event.name for event in events)
    launched = [e for e in events if e.name.startswith("aten::")]
    top = sum(e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::") for e in launched)
    return top, sum(names[name] for name in SYNCHRONISING[1:])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="resnet50")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    model = timm.create_model(options.model, num_classes=0).to(device)
    work = {name: optimizer.step for name, optimizer in optimizers(model).items()}
    times = in_turn(work, options.repeats, device)
    unit = "ms" if device.type == "cuda" else "CPU-ms"
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{device_line(device)}; {options.model}, {size:.1f} M parameters\n")
    print(f"| | {unit}, median (range) | times ours | operators | waits for the device |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in times.items():
        ratio = "1" if name == OURS else verdict(times[OURS], values)
        operators, waits = counted(work[name])
        print(f"| {name} | {spread(values)} | {ratio} | {operators} | {waits} |")


if __name__ == "__main__":
    main()
