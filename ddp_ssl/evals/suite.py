"""The suite: small data sets x linear classifier, k-NN and few labels, as one table of a run.

`suite-CHECKPOINT.json` in `evaluate/` of the run folder holds the measurements, and is written
after each. A measurement of the same weights, settings and images is not made again.
"""

import fcntl
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddp_ssl.config import ConfigError
from ddp_ssl.config.text import flow
from ddp_ssl.data import recognise
from ddp_ssl.data.datasets import transfer
from ddp_ssl.data.datasets.base import absolute
from ddp_ssl.distributed import World
from ddp_ssl.distributed.agreement import on_all_ranks, on_rank_0
from ddp_ssl.evals import evaluation, report
from ddp_ssl.evals.accuracy import difference, over_both
from ddp_ssl.evals.evaluation import Evaluation
from ddp_ssl.evals.pretrained import Pretrained, load_everywhere
from ddp_ssl.evals.report import Report, percent
from ddp_ssl.evals.settings import EvaluateConfig, protocol_of
from ddp_ssl.evals.weights import Source
from ddp_ssl.utils.files import json_file, path_of, replace_text
from ddp_ssl.utils.progress import logger
from ddp_ssl.utils.text import markdown_lines

# The named data sets, looked for in the root; class folders of other names come after them.
NAMED = (
    *("digits", "food101", "cifar10", "cifar100", "sun397", "cars", "aircraft", "dtd", "pets"),
    *("caltech101", "flowers102", "stl10", "tiny_imagenet", "cinic10"),
    *("blood", "organa", "organc", "organs"),
)
FEW = (10, 1)  # labelled images of each class
SPLITS = [0, 1, 2, 3, 4]  # seeds that choose them
# Keys of `data` that the figures depend on, whatever the data set is.
OF_IMAGES = {
    *("views", "color_jitter", "mean", "std", "max_pixels"),
    *("val_fraction", "val_size", "val_resize", "val_interpolation"),
}
# Settings that runs must share to be compared.
SHARED = ("linear", "knn", "run")
MEASURES = ("linear", "k-NN", *(f"{count} a class" for count in FEW))
DIGESTS = ("training_digest", "test_digest")
OTHER_IMAGES = "other images"

Tree = dict[str, Any]


class Place(NamedTuple):
    """The values of `data.name` and `data.root` for a data set."""

    name: str
    root: str | None


def run(
    source: Source,
    settings: EvaluateConfig,
    asked: list[str],
    against: Tree | None,
    world: World,
) -> int:
    """Measure what is not measured yet, on all processes together, and print the table.

    `asked`: the data sets, or all that are found. `against`: the result to compare with, as
    `result_of` reads it. Returns the exit code: 1 if a data set that is there could not be
    measured. Raises `ConfigError`.
    """
    start = time.perf_counter()
    check(settings)
    if len(settings.data.roots) > 1:
        raise ConfigError("data.root: the suite takes one folder, which holds the data sets")
    root = settings.data.root
    places, missing = on_rank_0(world, lambda: find(root, asked))
    if missing:
        logger.info(f"not in {place_in_words(root)}: {', '.join(missing)}")
    pretrained = load_everywhere(source, settings, world)
    suite = Suite(source, settings, pretrained, world)
    if against is not None:
        on_all_ranks(world, lambda: check_comparable(suite.content, against))
    for label, place in places.items():
        try:
            evaluated = evaluation.begin(
                "suite", source, settings_for(settings, place), world, pretrained
            )
            suite.measure(label, evaluated)
        except ConfigError as error:  # on all processes
            suite.leave_out(label, str(error))
    on_rank_0(world, lambda: suite.finish(against))
    logger.info(
        f"{suite.measured} measured, {suite.kept} kept ({time.perf_counter() - start:.0f} s)"
    )
    return int(bool(suite.content["left_out"]))


def settings_for(settings: EvaluateConfig, place: Place) -> EvaluateConfig:
    data = settings.data.model_copy(update=place._asdict())
    return settings.model_copy(update={"data": data})


# --- the data sets -------------------------------------------------------------------------------


def find(root: str | None, asked: list[str]) -> tuple[dict[str, Place], list[str]]:
    """The places of the data sets, and the names of those that are not there.

    Without `asked` these are the named ones and all other class folders. Raises `ConfigError`.
    """
    folder = None if root is None else absolute(root)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"data.root: {folder} is no folder; the folder of the data sets is")
    others = []
    if folder is not None:
        inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        others = [n for n in inside if n not in NAMED and transfer.splits_for_tests(folder / n)]
    places = {name: place_of(folder, name) for name in asked or (*NAMED, *others)}
    found = {name: place for name, place in places.items() if place is not None}
    if not found:
        raise ConfigError(
            f"data.name: {', '.join(places)} not in {place_in_words(root)}; accepted: "
            f"{', '.join(NAMED)}, or a folder there with train/ and test/ or val/"
        )
    return found, [name for name in places if name not in found]


def place_in_words(root: str | None) -> str:
    return "data.root, which is unset" if root is None else f"data.root={root}"


def place_of(root: Path | None, name: str) -> Place | None:
    """Where the data set `name` lies: in `root/NAME` or, in torchvision's layout, in `root`."""
    if name == "digits":
        return Place(name, None)
    if root is None:
        return None
    for folder in (root / name, root):
        if recognise.holds(folder, name):
            return Place(name, str(folder))
    if transfer.splits_for_tests(root / name):
        return Place("train_test", str(root / name))
    # A folder of that name whose content is not the data set's: loading says what is wrong.
    return Place(name, str(root / name)) if name in NAMED and (root / name).is_dir() else None


# --- the measurements ----------------------------------------------------------------------------


def check(settings: EvaluateConfig) -> None:
    """Raise `ConfigError` for settings that do not say which figure is quoted."""
    linear = settings.linear
    if linear.per_class is not None:
        raise ConfigError("linear.per_class: the suite takes all labels, and 10 and 1 of a class")
    if len(settings.knn.k) > 1:
        raise ConfigError(f"knn.k: {flow(settings.knn.k)}; the suite accepts one, such as 20")
    if linear.held_out == 0 and len(protocol_of(linear).lrs) > 1:
        raise ConfigError(
            "linear.held_out: 0 chooses none of several learning rates; accepted in the suite: a "
            "share, or one linear.lr"
        )


def steps(settings: EvaluateConfig) -> list[tuple[str, EvaluateConfig]]:
    """The evaluation and its settings for each of `MEASURES`."""
    linear = settings.linear
    few = {
        "lr": [protocol_of(linear).lrs[0]],  # few labels leave no images to choose a rate by
        "held_out": 0.0,
        "augment": False,
        "seeds": SPLITS,
    }
    linears = [linear.model_copy(update={**few, "per_class": count}) for count in FEW]
    return [
        ("linear", settings),
        ("knn", settings),
        *(("linear", settings.model_copy(update={"linear": each})) for each in linears),
    ]


class Suite:
    """What is measured of one checkpoint, and the files of it."""

    def __init__(
        self, source: Source, settings: EvaluateConfig, pretrained: Pretrained, world: World
    ) -> None:
        self.world, self.measured, self.kept = world, 0, 0
        self.mine: Tree = {}  # the data sets that this process has looked at
        tree = settings.model_dump(mode="json", include={"model", "linear", "knn"})
        tree["data"] = settings.data.model_dump(mode="json", include=OF_IMAGES)
        tree["run"] = {"seed": settings.run.seed}
        tree["weights"] = pretrained.digest
        stem = pretrained.path.stem if pretrained.path else source.name
        folder = evaluation.folder_of(source, settings)
        name = settings.run.name or f"suite-{stem}"

        def place() -> tuple[Path, Tree]:
            folder.mkdir(parents=True, exist_ok=True)
            path = report.free_name(folder, name, tree)
            return path, json_file(path.with_name(path.name + ".json")).get("data", {})

        self.path, data = on_rank_0(world, place)
        self.content: Tree = {
            "command": "suite",
            "source": source.text,
            "weights": pretrained.description,
            "step": pretrained.step,
            "epoch": pretrained.epoch,
            "settings": tree,
            "data": data,
            "left_out": {},
        }

    def measure(self, label: str, evaluated: Evaluation) -> None:
        """All measures of one data set. Raises `ConfigError`, on all processes."""
        facts = {
            **evaluation.facts_of_data(evaluated),
            "num_classes": evaluated.data.num_classes,
            "notes": evaluation.reservations(evaluated),
        }
        before = self.content["data"].get(label, {})
        entry = self.mine[label] = self.content["data"][label] = {**facts, "measures": {}}
        if all(before.get(key) == facts[key] for key in DIGESTS):
            entry["measures"] = before.get("measures", {})
        for name, (command, settings) in zip(MEASURES, steps(evaluated.settings), strict=True):
            if name in entry["measures"]:
                self.kept += 1
                logger.info(f"{label}, {name}: {cell(entry['measures'][name])}, measured before")
                continue
            evaluated.command, evaluated.settings = command, settings
            evaluated.extractor.settings = settings
            result = evaluation.evaluate(evaluated)
            evaluated.extractor.tell = lambda line: None  # the features are told of once
            bad = evaluation.unreadable(evaluated)
            entry["measures"][name] = {**numbers(result), "unreadable": len(bad)}
            self.measured += 1
            on_rank_0(self.world, self._write)
            logger.info(f"{label}, {name}: {cell(entry['measures'][name])}")

    def leave_out(self, label: str, why: str) -> None:
        """Say why a data set is not measured, and go on."""
        self.content["left_out"][label] = why
        if self.world.is_main:
            logger.error("%s is left out: %s", label, why)

    def finish(self, against: Tree | None) -> None:
        """Write the files and print the table, and the comparison; on rank 0."""
        self._write()
        print(f"\n{table(self.content)}\n\n{self.path}.md  {self.path}.json", flush=True)
        if against is not None:
            print(f"\n{comparison(self.content, against)}", flush=True)

    def _write(self) -> None:
        """Write the files, with the data sets of other jobs; on rank 0."""
        file, lock = (self.path.with_name(self.path.name + end) for end in (".json", ".lock"))
        with open(lock, "w") as held:  # a job for each data set may write into the same file
            fcntl.flock(held, fcntl.LOCK_EX)
            self.content["data"] = json_file(file).get("data", {}) | self.mine
            replace_text(file, json.dumps(self.content, indent=1) + "\n")
            replace_text(self.path.with_name(self.path.name + ".md"), table(self.content) + "\n")


def numbers(result: Report) -> Tree:
    """Plain values of a measurement; `right` has a bit for each test image, for each seed."""
    assert result.best is not None  # `check` has seen to it
    row = result.rows[result.best]
    classes = [value for value in row.per_class if not math.isnan(value)]
    return {
        "row": f"{result.first} {row.name}",
        "top1": row.top1,
        "interval_95": list(asdict(over_both(row.accuracies)).values()),
        "top5": row.top5,
        "mean_per_class": sum(classes) / max(len(classes), 1),
        "top1_per_seed": [a.top1 for a in row.accuracies],
        **row.facts,
        "images": row.accuracies[0].images,
        "right": [a.right.hex() for a in row.accuracies],
    }


# --- tables --------------------------------------------------------------------------------------


def table(content: Tree) -> str:
    """Markdown: a line for each data set."""
    order = {name: number for number, name in enumerate(NAMED)}
    data = content["data"]
    rows = [["data", "classes", "training", "test", *MEASURES]]
    for label in sorted(data, key=lambda name: (order.get(name, len(order)), name)):
        entry = data[label]
        counts = [str(entry[key]) for key in ("num_classes", "training_images", "test_images")]
        found = entry["measures"]
        rows.append([label, *counts, *(cell(found[m]) if m in found else "" for m in MEASURES)])
    notes = [f"{label}: {note}" for label, entry in data.items() for note in entry["notes"]]
    notes += [
        f"{label}, {name}: training diverged, so that the accuracy means nothing"
        for label, entry in data.items()
        for name, measured in entry["measures"].items()
        if "diverged" in measured
    ]
    notes += [f"{label} is left out: {why}" for label, why in content["left_out"].items()]
    heading = f"Suite, top-1 in % with 95 % intervals, of {content['weights']}"
    return "\n\n".join([heading, "\n".join(markdown_lines(rows)), *notes])


def cell(measured: Tree) -> str:
    """`96.94 (94.60 to 98.28)`"""
    low, high = measured["interval_95"]
    return f"{percent(measured['top1'])} ({percent(low)} to {percent(high)})"


# --- comparison ----------------------------------------------------------------------------------


def result_of(text: str) -> Tree:
    """What a run's newest `suite*.json`, or the file itself, holds. Raises `ConfigError`."""
    path = path_of(text)
    files = [path] if path.is_file() else [*path.glob("evaluate/suite*.json")]
    if not files:
        raise ConfigError(
            f"--against: {path} has no evaluate/suite*.json; ddp-ssl evaluate suite {path} makes it"
        )
    newest = max(files, key=lambda file: file.stat().st_mtime)
    found = json_file(newest)
    if found.get("command") != "suite":
        raise ConfigError(
            f"--against: {newest} is no result of the suite; accepted: a run folder, or the .json "
            "that ddp-ssl evaluate suite has written"
        )
    return found


def check_comparable(now: Tree, other: Tree) -> None:
    """Raise `ConfigError` unless both are measured with the same classifiers."""
    for section in SHARED:
        ours, theirs = now["settings"][section], other["settings"][section]
        for key in (key for key in ours if ours[key] != theirs.get(key)):
            raise ConfigError(
                f"{section}.{key}: {flow(ours[key])}, but {other['source']} was measured with "
                f"{flow(theirs.get(key))}; the same value is accepted"
            )


def comparison(now: Tree, other: Tree) -> str:
    """Markdown: a line for each measurement that both have."""
    rows = [["data", "measure", now["source"], other["source"], "difference"]]
    for label in (label for label in now["data"] if label in other["data"]):
        ours, theirs = now["data"][label], other["data"][label]
        same = all(ours[key] == theirs[key] for key in DIGESTS)
        for name in (m for m in MEASURES if m in ours["measures"] and m in theirs["measures"]):
            a, b = ours["measures"][name], theirs["measures"][name]
            rows.append([label, name, cell(a), cell(b), differing(a, b) if same else OTHER_IMAGES])
    return "\n".join(markdown_lines(rows))


def differing(a: Tree, b: Tree) -> str:
    """`+1.50 (-0.20 to 3.20)`"""
    first, second = rights(a), rights(b)
    if first.shape != second.shape:  # an image that could not be read
        return OTHER_IMAGES
    mean, interval = difference(first, second)
    return f"{100 * mean:+.2f} ({percent(interval.low)} to {percent(interval.high)})"


def rights(measured: Tree) -> NDArray[np.uint8]:
    """`[seeds, images]`: 1 where an image is classified correctly."""
    rows = [np.frombuffer(bytes.fromhex(bits), np.uint8) for bits in measured["right"]]
    return np.stack([np.unpackbits(row)[: measured["images"]] for row in rows])
