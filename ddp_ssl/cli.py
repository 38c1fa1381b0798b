"""The console script `ddp-ssl`: `ddp-ssl train ...` is `python -m ddp_ssl.train ...`."""

import importlib
import os
import sys

from ddp_ssl import __version__
from ddp_ssl.utils.streams import open_streams, say, tell
from ddp_ssl.utils.text import suggest

# A command is a module with a `main(arguments)` that returns the exit code.
COMMANDS = {
    "train": ("train", "pretrain, in the processes of torchrun or srun, or in one"),
    "resume": ("resume", "go on with a run that was stopped, from its folder alone"),
    "submit": ("submit", "pretrain in a Slurm job, or an array of jobs, with submitit"),
    "evaluate": ("evaluate", "linear probe, k-NN, fine-tuning, a suite of data sets, dynamics"),
    "export": ("export", "a run's backbone for timm, torchvision, safetensors or ONNX"),
    "embed": ("embed", "features of a data set as NPZ, CSV or parquet, or for TensorBoard"),
    "doctor": ("doctor", "check the machine, the data and the cluster before a long run"),
    "runs": ("commands.runs", "list runs and their state, or compare some of them"),
    "verify": ("commands.verify", "is a loss on W processes that of one process?"),
    "prepare-data": ("commands.prepare_data", "fetch a data set and check that it is complete"),
    "check-data": ("commands.check_data", "find images that cannot be read or decoded"),
    "pack-shards": ("commands.pack_shards", "pack a data set into tar files"),
    "plot": ("commands.plot", "draw runs: metrics over epochs, accuracy over rank and I(R;Z)"),
    "reproduce": ("commands.reproduce", "the papers' tables and figures"),
    "simulate": ("commands.simulate", "AdaDim's simulation of I(R;Z) with Gaussian clusters"),
}
USAGE = "usage: ddp-ssl COMMAND [CONFIG] [key=value ...]"


def main() -> int:
    """Dispatch to a command; returns the exit code."""
    open_streams()
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        # As `python -m` does, so that `method.name=my_module:MyMethod` finds a file lying here.
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        # Imported when it is needed: `train` catches signals before torch is imported.
        module = importlib.import_module(f"ddp_ssl.{COMMANDS[command][0]}")
        return int(module.main(arguments))
    if command == "--version":
        say(f"ddp_ssl {__version__}")
        return 0
    if command in ("-h", "--help"):
        lines = (f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items())
        say("\n".join([USAGE, "", *lines]))
        say("\nddp-ssl COMMAND --help says more; ddp-ssl --version tells the version.")
        return 0
    hint = suggest(command, COMMANDS) or f"; accepted: {', '.join(COMMANDS)}"
    tell(f"ddp_ssl: error: unknown command {command!r}{hint}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
