"""Linear classifiers on frozen features; one pass trains those of several learning rates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddp_ssl.comm import ONE_PROCESS, Comm
from ddp_ssl.config import ConfigError
from ddp_ssl.data.datasets import selection
from ddp_ssl.data.datasets.split import Split
from ddp_ssl.data.loading.loader import TrainLoader
from ddp_ssl.data.loading.order import Order, permutation
from ddp_ssl.data.loading.settings import Augmentation, LoaderSettings
from ddp_ssl.evals.accuracy import Accuracy, Tally
from ddp_ssl.evals.features import Block, Extractor, crop_view, gather_rows
from ddp_ssl.evals.settings import Protocol, protocol_of
from ddp_ssl.optim import learning_rate
from ddp_ssl.utils.progress import Ticker
from ddp_ssl.utils.seeds import hashed

ROWS = 8192  # rows classified at once
SMALL = 2**30  # bytes of features up to which each process trains on all of them

# This process's features, labels and ids of a step; it may have none.
Step = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class LinearResult:
    """Accuracies of one seed, one for each learning rate."""

    seed: int
    test: list[Accuracy]
    held_out: list[float] | None
    """Top-1 on the held-out images, of classifiers that were trained without them."""
    finite: list[bool]
    """Whether the weights are finite; where training diverged the accuracy means nothing."""


def evaluate_linear(
    extractor: Extractor, train: Split, val: Split, classes: int
) -> tuple[Protocol, list[LinearResult], int | None]:
    """Train and test with every seed and rate; all processes must call it.

    Returns the protocol, a result per seed, and the index of the rate that is best on held-out
    training images (None where none is chosen).
    """
    settings, comm, device = extractor.settings, extractor.comm, extractor.device
    protocol, few = protocol_of(settings.linear), settings.linear.per_class
    if few is not None and settings.linear.augment:
        raise ConfigError("linear.per_class: not with linear.augment=true; one of the two")
    test = extractor.features(val, protocol.patches, f"{settings.data.name} test images")
    # Sums over processes round differently at each number of them, and a high learning rate makes
    # much of that. Small data sets are trained on by every process alike, in its one order.
    small = 4 * extractor.width * (len(train) + len(val)) <= SMALL
    alike = small and not settings.linear.augment
    if alike:
        test, comm = gathered(test, comm, device), ONE_PROCESS
    choosing = len(protocol.lrs) > 1 and settings.linear.held_out > 0 and few is None
    held: Tensor | None = None
    if choosing:
        held = torch.from_numpy(selection.held_out(train.labels, settings.linear.held_out))
    held_block: Block | None = None
    if settings.linear.augment:
        batch = fitting_batch(extractor, "linear", protocol.batch_size, len(train))
        if batch == 0:
            raise ConfigError(
                f"data.name: {len(train)} training images are too few for {comm.world_size} "
                "processes"
            )
        protocol = replace(protocol, batch_size=batch)
        if held is not None:
            kept = train.subset(np.flatnonzero(held))
            held_block = extractor.features(kept, protocol.patches, "held-out")
    else:
        block = extractor.features(train, protocol.patches, f"{settings.data.name} training images")
        block = gathered(block, extractor.comm, device) if alike else block
        held_block = None if held is None else block.where(held[block.ids])
        block = on_device(block, device)  # once for all seeds
    results = []
    for seed in settings.linear.seeds:
        steps: CachedSteps | AugmentedSteps
        if settings.linear.augment:
            steps = AugmentedSteps(extractor, train, protocol, seed)
        else:
            some = block
            if few is not None:
                chosen = torch.from_numpy(selection.per_class(train.labels, few, seed))
                some = block.where(chosen.to(block.ids.device)[block.ids])
            steps = CachedSteps(some, protocol.batch_size, seed, comm, device)
        heads, finite = train_heads(steps, protocol, seed, extractor.width, classes, held)
        if isinstance(steps, AugmentedSteps):
            steps.loader.close()
        rates = len(protocol.lrs)
        accuracies = [score(head, test, classes, comm, device) for head in heads[:rates]]
        held_out = None
        if held_block is not None:
            scores = [score(head, held_block, classes, comm, device) for head in heads[rates:]]
            held_out = [s.top1 if ok else 0.0 for s, ok in zip(scores, finite[rates:], strict=True)]
        results.append(LinearResult(seed, accuracies, held_out, finite[:rates]))
    if not choosing:
        return protocol, results, None
    # The best mean accuracy on held-out images; the first among equals.
    means = np.mean([result.held_out or [] for result in results], axis=0)
    return protocol, results, int(means.argmax())


def gathered(block: Block, comm: Comm, device: torch.device) -> Block:
    """The parts of all processes, in the order of ids; on all processes."""
    return Block(*(gather_rows(x, comm, device) for x in vars(block).values()))


def fitting_batch(extractor: Extractor, section: str, asked: int, images: int) -> int:
    """The largest batch up to `asked` that the images fill and the processes share evenly, or 0."""
    size = extractor.comm.world_size
    batch = min(asked, images) // size * size
    if 0 < batch != asked:
        extractor.tell(
            f"{section}.batch_size: {batch} instead of {asked}, for {size} process(es) and "
            f"{images} images"
        )
    return batch


def on_device(block: Block, device: torch.device) -> Block:
    """The features on the GPU, if they take less than half of its free memory."""
    if device.type != "cuda" or block.features.nbytes >= torch.cuda.mem_get_info(device)[0] / 2:
        return block
    return Block(*(x.to(device) for x in vars(block).values()))


class CachedSteps:
    """Batches of stored features, in the same order at any number of processes."""

    def __init__(
        self, block: Block, batch_size: int, seed: int, comm: Comm, device: torch.device
    ) -> None:
        self.comm, self.device, self.seed, self.batch_size = comm, device, seed, batch_size
        everyones = gather_rows(block.ids, comm, device)
        if not len(everyones):
            raise ConfigError("data.root: no training image with a label can be read")
        self.images = len(everyones)
        self.first = int((everyones < int(block.ids[0])).sum()) if len(block) else 0
        self.block = block
        self.per_epoch = -(-self.images // batch_size)

    def epoch(self, number: int) -> Iterator[Step]:
        """All batches of an epoch; the last one may be smaller."""
        order = torch.from_numpy(permutation(self.seed, number, self.images))
        for rows in order.split(self.batch_size):  # type: ignore[no-untyped-call]
            mine = rows[(rows >= self.first) & (rows < self.first + len(self.block))] - self.first
            mine = mine.to(self.block.ids.device)
            step = self.block.features[mine], self.block.labels[mine], self.block.ids[mine]
            yield step[0].to(self.device), step[1].to(self.device), step[2].cpu()


class AugmentedSteps:
    """Batches of random crops and flips, passed through the frozen backbone."""

    def __init__(self, extractor: Extractor, train: Split, protocol: Protocol, seed: int) -> None:
        self.extractor, self.device, self.comm = extractor, extractor.device, extractor.comm
        self.loader = random_crops(extractor, train, protocol.batch_size, seed)
        self.per_epoch = self.loader.steps_per_epoch

    def epoch(self, number: int) -> Iterator[Step]:
        """All full batches of an epoch."""
        for _ in range(self.per_epoch):
            batch = next(self.loader)
            features = self.extractor.embed(batch.views[0])
            yield features, batch.labels, batch.ids.cpu()


def random_crops(extractor: Extractor, split: Split, batch_size: int, seed: int) -> TrainLoader:
    """Endless batches of `split`, each image cropped and flipped at random.

    Images that cannot be read are added to the extractor's.
    """
    data, comm = extractor.settings.data, extractor.comm
    return TrainLoader(
        split,
        Order(len(split), batch_size, comm.rank, comm.world_size, seed),
        Augmentation([crop_view(extractor.settings)], data.color_jitter, comm.rank),
        LoaderSettings.of(data, extractor.device),
        bad=extractor.bad,
    )


def train_heads(
    steps: CachedSteps | AugmentedSteps,
    protocol: Protocol,
    seed: int,
    width: int,
    classes: int,
    held: Tensor | None = None,
) -> tuple[list[nn.Linear], list[bool]]:
    """A classifier per learning rate, and whether each one's weights are finite.

    The loss is the mean over the global batch. With `held`, a mask over ids, as many more
    classifiers are trained, on the images that are not held out. No classifier affects another one.
    """
    comm, device = steps.comm, steps.device
    rates = protocol.peaks * (1 if held is None else 2)
    heads = [_head(width, classes, seed).to(device) for _ in rates]
    parameters = [p for head in heads for p in head.parameters()]
    groups = [{"params": list(h.parameters()), "lr": r} for h, r in zip(heads, rates, strict=True)]
    decay = protocol.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, weight_decay=decay)
    if protocol.name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=decay)
    ticker = Ticker(f"linear, seed {seed}, epochs", protocol.epochs, comm.rank == 0)
    step, total = 0, protocol.epochs * steps.per_epoch
    for epoch in range(protocol.epochs):
        for features, labels, ids in steps.epoch(epoch):
            if protocol.name == "sgd":
                for group, peak in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = learning_rate(step, total, 0, peak, 0.0, 0.0)
            uses = [torch.ones_like(labels, dtype=torch.bool)]
            if held is not None:
                uses.append(~held[ids].to(device))
            counts = comm.sum(torch.stack([use.sum() for use in uses])).clamp(min=1)
            losses = []
            for i, head in enumerate(heads):
                which = i // len(protocol.lrs)
                each = F.cross_entropy(
                    head(features),
                    labels,
                    reduction="none",
                    label_smoothing=protocol.label_smoothing,
                )
                losses.append((each * uses[which]).sum() / counts[which])
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            _sum_gradients(parameters, comm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        ticker.at(epoch + 1)
    return heads, [all(bool(p.isfinite().all()) for p in head.parameters()) for head in heads]


def _head(width: int, classes: int, seed: int) -> nn.Linear:
    """A classifier with small normal weights and zero bias; the same at every learning rate."""
    head = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(hashed(seed, "linear"))
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def _sum_gradients(parameters: Sequence[nn.Parameter], comm: Comm) -> None:
    """Sum over processes: each one has the gradient of its part of the batch."""
    if comm.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = comm.sum(torch.cat([g.flatten() for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):  # type: ignore[no-untyped-call]
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def score(
    head: nn.Module, block: Block, classes: int, comm: Comm, device: torch.device
) -> Accuracy:
    """Accuracies of a classifier on the images of all processes."""
    tally = Tally(classes)
    for start in range(0, len(block), ROWS):
        part = slice(start, start + ROWS)
        tally.add(head(block.features[part].to(device)), block.labels[part])
    return tally.accuracy(comm, device)
