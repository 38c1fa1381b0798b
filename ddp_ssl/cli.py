"""The console script `ddp-ssl`: `ddp-ssl train ...` is `python -m ddp_ssl.train ...`."""

from __future__ import annotations

import importlib
import os
import sys

from ddp_ssl import __version__

# Each is a module with a `main(arguments)` that returns the exit code.
COMMANDS = {
    "train": "pretrain, here and now; the processes are torchrun's or srun's, if any",
    "submit": "the same as a Slurm job, or an array of jobs, through submitit",
    "evaluate": "linear probe, k-NN, fine-tuning, and how a run's figures moved",
    "export": "a run's backbone for timm, torchvision, safetensors or ONNX, with a model card",
    "embed": "features of a data set as NPZ, and for TensorBoard's embedding projector",
    "doctor": "check the machine, the data and the cluster before a long run",
}
USAGE = "usage: ddp-ssl COMMAND [CONFIG.yaml] [key=value ...]"


def main() -> int:
    """Dispatch to a command; returns the exit code."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        # As `python -m` does, so that `method.name=my_module:MyMethod` finds a file lying here.
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        # Imported when it is needed: `train` catches signals before torch is imported.
        return int(importlib.import_module(f"ddp_ssl.{command}").main(arguments))
    if command == "--version":
        print(f"ddp_ssl {__version__}")
        return 0
    if command in ("-h", "--help"):
        print("\n".join([USAGE, "", *(f"  {name:<8}{text}" for name, text in COMMANDS.items())]))
        print("\nddp-ssl COMMAND --help says more; ddp-ssl --version tells the version.")
        return 0
    accepted = ", ".join(COMMANDS)
    print(f"ddp-ssl: error: unknown command {command!r}; accepted: {accepted}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
