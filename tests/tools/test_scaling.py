"""tools/scaling_model.py: bytes as real processes send them, times as computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import OneOf
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from ddp_ssl.distributed import World
from ddp_ssl.run.configure import load
from tests.ranks import Ranks
from tools import scaling_model
from tools.bench import growth, scaling
from tools.bench.scaling import Counts
from tools.scaling_model import Cluster, Event, Step, elapsed, record

SHARDED = ["method.name=adadim", "data.view_shards=2"]
CASES = {
    **scaling.CASES,
    "barlow_twins, gather": ["method.name=barlow_twins", "method.route=gather"],
    "simclr, float64": ["method.name=simclr", "method.temperature=0.01"],
    "adadim, view shards": SHARDED,
    "vicreg, local norm": ["method.name=vicreg", "model.batch_norm=local"],
    "nnclr, a queue": ["method.name=nnclr"],
    # As wide as the representation of `SMALL`.
    "adadim, mi_form: cov": [*scaling.CASES["adadim, mi_form: cov"], "model.projector=[512, 16]"],
}
# Two of DDP's buckets: the projector keeps its width.
SMALL = ["data.batch_size=32", "data.views.0.size=16",
         "model.backbone_args={channels: [8, 8, 16, 16], layers: [1, 1, 1, 1]}"]  # fmt: skip
AT_FOUR = (
    "adadim, gather",
    "adadim, moments",
    "vicreg, bf16 gradients",
    "adadim, view shards",
    "lejepa",
)


def send(world: World, cases: dict[str, list[str]]) -> dict[str, Counts]:
    return {name: scaling.counted(world, arguments) for name, arguments in cases.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_calls_and_bytes_are_those_of_real_processes(ranks: Ranks, size: int) -> None:
    names = CASES if size == 2 else AT_FOUR
    cases = {name: [*CASES[name], *SMALL] for name in names}
    everyones = ranks.run(send, size, cases)
    for name, arguments in cases.items():
        model = scaling.modelled(size, arguments)
        assert [one[name] for one in everyones] == [model] * size, name
        assert model["gradients"][1] > 0
    assert "view sum" in everyones[0]["adadim, view shards"]
    if size == 2:
        assert "norm" not in everyones[0]["vicreg, local norm"]
        assert everyones[0]["simclr, float64"]["gather"] != everyones[0]["simclr"]["gather"]


def test_bytes_by_hand() -> None:
    """AdaDim: z, r and the weights of InfoNCE gathered; 2 views; everything float32."""
    config = load(["method.name=adadim", "method.route=moments"]).config
    step = record(config, 8, Cluster(), classes=10)
    n, width, representation = 128, 512, 128
    counts = step.counts()
    assert counts["gather"] == (3, 4 * 2 * n * (width + representation + 2))
    # VICReg's d x d matrices, once: none in backward. The rest are vectors and numbers.
    matrices = 4 * 2 * width**2
    assert matrices < counts["sum"][1] < 1.01 * matrices
    assert counts["gradients"][1] == 4 * step.parameters
    assert counts["norm"][0] == 2 * step.norms
    assert record(config, 1, Cluster()).counts() == {}
    assert record(config, 8, Cluster(), alpha=0.0).counts()["sum"][0] < counts["sum"][0]


def test_the_time_of_a_collective_by_hand() -> None:
    c = Cluster(node_size=4, intra=100.0, inter=10.0, latency=1.0, latency_per_doubling=0.5)
    assert c.seconds("norm", 1000, 1) == 0
    assert c.seconds("norm", 1000, 4) == pytest.approx(1 + 2 * 1000 * 0.75 / 100)
    # 4 nodes: three quarters of the bytes come from other nodes, over 4 GPUs' links.
    here, between = 1000 * 0.75 / 100, 1000 * 0.75 / 40
    assert c.seconds("gather", 1000, 16) == pytest.approx(1 + 0.5 * 2 + here + between)
    assert c.seconds("sum", 1000, 16) == pytest.approx(2 + 2 * (here + between))


def test_gradients_hide_behind_work_and_hold_others_up() -> None:
    c = Cluster(node_size=2, intra=50.0, latency=0.0)  # 100 bytes reduced: 2 s

    def of(*events: Event) -> float:
        return elapsed(Step(list(events), 2, 1, 0, 0, (1, 1)), c, flops_rate=1.0)

    bucket = Event("gradients", 100, flops=1, waits=False)
    assert of(bucket, Event("end", 0, flops=5)) == 6  # hidden
    assert of(bucket, Event("end", 0, flops=0.5)) == 3  # the rest shows
    assert of(bucket, Event("norm", 100, flops=1), Event("end", 0)) == 5  # after the bucket
    assert of(Event("norm", 100, flops=1), Event("end", 0, seconds=3)) == 6


def test_predictions_follow_the_machine() -> None:
    model = scaling_model.Model(["configs/imagenet100/adadim.yaml"], Cluster(), per_gpu=32)
    few, many = model.at(8), model.at(64)
    local = ["model.batch_norm=local"]
    assert sum(many.terms.values()) == pytest.approx(many.step)
    assert min(many.terms.values()) >= 0
    assert 0 < many.efficiency < few.efficiency < 1
    assert model._predict(64, 64 * 32, local).terms["global batch norm"] == 0
    # ResNet-18's 11,300 images of 224 px a second, and a projector that adds little.
    assert few.terms["network"] == pytest.approx(2 * 32 / 11300, rel=0.03)
    assert few.input_rate == pytest.approx(32 / few.step)


@pytest.fixture(scope="module")
def step() -> Step:
    """A step of 64 images over 16 processes; what is done between epochs does not change it."""
    return record(load(["data.batch_size=64"]).config, 16, Cluster())


def test_predictions_follow_the_rates(step: Step) -> None:
    config = load(["data.batch_size=64", "method.alpha_every=1"]).config

    def of(rate: float = 1e13, **rates: float) -> dict[str, float]:
        return scaling_model.predict(config, step, Cluster(**rates), rate, 1438).terms

    base = of()
    assert of(rate=2e13)["network"] == pytest.approx(base["network"] / 2)
    assert of(inter=25e9)["embeddings gathered"] > base["embeddings gathered"]
    assert of(latency=50e-6)["global batch norm"] > 1.5 * base["global batch norm"]
    assert of(jitter=0)["waiting for the slowest"] == 0
    for slower in ({"decomposition": 1e8}, {"pipeline": 9.0}):
        assert of(**slower)["measuring alpha"] > base["measuring alpha"] > 0
    for slower in ({"hop": 1e-3}, {"host_copy": 1e8}, {"disk": 1e6}):
        assert of(**slower)["between epochs"] > base["between epochs"] > 0
    fast = scaling_model.network_rate(config, Cluster(images_per_second=22600.0))
    assert fast == pytest.approx(2 * scaling_model.network_rate(config, Cluster()))


def test_products_of_bf16_run_at_their_own_rate() -> None:
    def seconds(kind: torch.dtype, **rates: float) -> float:
        recorder = scaling_model.Recorder(Cluster(**rates))
        with FakeTensorMode():
            a = torch.empty(4096, 4096, dtype=kind)
            with recorder:
                torch.mm(a, a)
        recorder.event("end", 0)
        return recorder.events[-1].seconds

    flops = 2 * 4096**3
    assert seconds(torch.float32, fp32=5e13) == pytest.approx(flops / 5e13)
    assert seconds(torch.bfloat16, bf16=5e14) == pytest.approx(flops / 5e14)


def test_what_is_done_beside_training_costs_nothing_until_it_takes_longer(step: Step) -> None:
    def between_epochs(*changes: str, images: int = 1438, **rates: float) -> dict[str, float]:
        config = load(["data.batch_size=64", "method.alpha_every=2", *changes]).config
        # With a slow host an epoch covers everything.
        quick = replace(Cluster(operator=0.0, collective=0.0), **rates)
        return scaling_model.predict(config, step, quick, 1e13, images).terms

    quick = {"pipeline": 0.0}  # an epoch here is shorter than another pipeline's start
    waited, delayed = between_epochs(**quick), between_epochs("method.alpha_delay=1", **quick)
    assert 0 < delayed["measuring alpha"] < 0.3 * waited["measuring alpha"]
    for delay, ten in (("null", waited), ("1", delayed)):
        one = between_epochs(f"method.alpha_delay={delay}", "method.alpha_batches=1", **quick)
        assert one["measuring alpha"] < 0.5 * ten["measuring alpha"]
        # The first batch is read during the epoch's last steps, as far as they last.
        late = between_epochs(f"method.alpha_delay={delay}", pipeline=9.0)
        assert late["measuring alpha"] > 10 * ten["measuring alpha"]
    # Rank 0 decomposes ten of them, one after the other, which an epoch does not cover here.
    slow = between_epochs("method.alpha_delay=1", decomposition=1e6)
    assert slow["measuring alpha"] > 100 * delayed["measuring alpha"]
    assert slow["measuring alpha"] < between_epochs(decomposition=1e6)["measuring alpha"]
    rare = between_epochs("checkpoint.every=10")
    assert rare["between epochs"] < 0.5 * waited["between epochs"]
    # Twice the images are half as many ends of epochs a step.
    assert between_epochs(images=2876)["between epochs"] == pytest.approx(
        waited["between epochs"] / 2
    )


def test_what_is_between_epochs_needs_the_number_of_images(step: Step) -> None:
    config = load(["data.batch_size=64"]).config
    for images, words in ((None, "give --images"), (63, "less than one batch of 64")):
        made = scaling_model.predict(config, step, Cluster(), 1e13, images)
        assert made.terms["between epochs"] == made.terms["measuring alpha"] == 0
        assert words in made.notes[0]


def test_settings_that_a_run_would_refuse_are_not_proposed() -> None:
    model = scaling_model.Model(["method.alpha_every=1"], Cluster(images_per_second=9000.0))
    assert all("alpha_delay" not in " ".join(changes) for changes in model.variants())
    model = scaling_model.Model(["method.alpha_every=2"], Cluster(images_per_second=9000.0))
    assert ["method.alpha_delay=1", "method.alpha_batches=1"] in model.variants()


def test_what_a_person_sees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_model, "PLOTTED", (8, 16))
    picture = tmp_path / "curve.png"
    config = ["method.name=simclr", *SMALL]
    assert scaling_model.main([*config, "--gpus", "8,16", "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    for text in ("| gather | 2 ×", "| **efficiency** |", "model.batch_norm=local", "16 GPUs:"):
        assert text in said
    with Image.open(picture) as image:
        assert min(image.size) > 400


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.backbone=resnet34"], "no rate is known for resnet34"),
        (["--fixed-batch", "--gpus", "48"], "data.batch_size: 128 images cannot be split"),
        (["--gpus", "8,x"], "--gpus: expected numbers"),
        (["--inter", "0"], "--inter: expected a positive number"),
        (["optim.epoch=1"], "did you mean optim.epochs?"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaling_model.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_link_needs_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling.os, "geteuid", lambda: 1000)
    monkeypatch.setattr("sys.argv", ["scaling.py", "--link", "100"])
    assert scaling.main() == 2
    assert "not root; it needs root, ip and tc" in capsys.readouterr().err


def test_exponents() -> None:
    cubic = growth.Growth("x", "d", "ms")
    for size in (1.0, 2.0, 4.0):
        cubic.add(size, 5 * size**3)
    assert cubic.exponent == pytest.approx(3)
    assert cubic.last == pytest.approx(3)
    assert "| x | d | 1 | 4 | ms | 5 | 320 | 3.00 | 3.00 |" in growth.table([cubic])


def test_one_of_several_has_the_shapes_of_all() -> None:
    comm = OneOf(4)
    z = torch.randn(2, 8, 16, requires_grad=True)
    for name, loss in growth.LOSSES.items():
        value = loss(z, comm).detach()
        assert math.isfinite(float(value)), name
    assert comm.gather(z).shape == (2, 32, 16)
