"""Runs a command of the package, installed or not."""

import importlib
import sys
from pathlib import Path


def run(command: str) -> None:
    """Run `ddp_ssl.commands.COMMAND` with the arguments of the command line, and exit."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(importlib.import_module(f"ddp_ssl.commands.{command}").main())
