"""Features of a data set: `ddp-ssl embed RUN [--data NAME] --out FILE [key=value ...]`.

Alone, or under torchrun or srun with the images shared by the processes. `--projector DIR` writes
the same for TensorBoard's embedding projector. docs/export.md says what is in the files.

Exit codes: 0 done, 1 failed, 2 the weights, the settings or the data cannot be used.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ddp_ssl.commands import common
from ddp_ssl.config import ConfigError
from ddp_ssl.evals.embedding import MOST_POINTS, Wanted, embed
from ddp_ssl.evals.settings import EvaluateConfig, load_settings
from ddp_ssl.evals.weights import Source, find_source
from ddp_ssl.run.signals import stop_with_parent
from ddp_ssl.utils.files import path_of

FORMATS = (".npz", ".csv", ".parquet")


def main(arguments: Sequence[str] | None = None) -> int:
    stop_with_parent()
    words = sys.argv[1:] if arguments is None else arguments
    return common.exit_code(lambda: _run(*_parse(words)))


def _parse(arguments: Sequence[str]) -> tuple[Source, EvaluateConfig, Wanted]:
    parser = common.Parser(
        "ddp-ssl embed",
        "Features of a data set, from a run or from anybody's weights.",
        "key=value: those of `python -m ddp_ssl.evaluate`, such as data.root=FOLDER,\n"
        "eval.batch_size=64, run.device=cpu, or, for a file of weights,\n"
        "model.backbone=resnet50.",
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="RUN, RUN:best, RUN:ema, a file of weights, timm:NAME or "
        "hf-hub:USER/NAME")  # fmt: skip
    add("settings", nargs="*", metavar="key=value", help="see below")
    add("--data", metavar="NAME", help="data set; the run's own if not given")
    add("--split", choices=["train", "val", "all"], default="val",
        help="val if not given; all: both, with a column that says which")  # fmt: skip
    add("--out", type=path_of, metavar="FILE", help="features, paths, labels, ids and classes: "
        "FILE.npz, FILE.csv or FILE.parquet")  # fmt: skip
    add("--embeddings", action="store_true", help="also z, the projection head's output")
    add("--projector", type=path_of, metavar="DIR", help="for TensorBoard; a new or empty folder")
    add("--points", type=int, default=5000, help="images in the projector at most (5000)")
    add("--trust", action="store_true", help=common.TRUST)
    trusted, words = common.split_trust(arguments)
    options = parser.parse_intermixed_args(words)
    _check(parser, options)
    for word in options.settings:
        if "=" not in word and not word.endswith((".yaml", ".yml")):
            parser.error(f"{word}: unknown word; what comes after SOURCE is key=value")
    source = find_source(options.source, trusted)
    name = [f"data.name={options.data}"] if options.data else []
    settings, _ = load_settings(source, [*options.settings, *name])
    o = options
    return source, settings, Wanted(o.split, o.embeddings, o.out, o.projector, o.points)


def _check(parser: common.Parser, options: argparse.Namespace) -> None:
    """Raise `ConfigError` for what cannot be written."""
    if options.out is None and options.projector is None:
        files = ", ".join(f"FILE{ending}" for ending in FORMATS)
        parser.error(f"nowhere to write to: --out ({files}) or --projector DIR is needed")
    if options.out is not None and options.out.suffix not in FORMATS:
        parser.error(f"--out: {options.out} does not end in {', '.join(FORMATS)}")
    if options.out is not None and options.out.suffix == ".parquet" and not find_spec("pyarrow"):
        raise ConfigError(
            "--out: parquet needs pyarrow: pip install 'ddp_ssl[parquet]'; FILE.csv and FILE.npz "
            "are accepted without it"
        )
    if options.projector is not None and options.split == "all":
        parser.error("--projector: shows one split; --split train or val is accepted")
    if not 2 <= options.points <= MOST_POINTS:
        parser.error(f"--points: {options.points} given; 2 to {MOST_POINTS} are accepted")
    folder = options.projector
    if folder is not None and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        parser.error(f"--projector: {folder} is not empty; a new or empty folder is accepted")


def _run(source: Source, settings: EvaluateConfig, wanted: Wanted) -> int:
    with common.processes(settings.run) as world:
        embed(source, settings, wanted, world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
