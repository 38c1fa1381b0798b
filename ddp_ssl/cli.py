"""The console script `ddp-ssl`: `ddp-ssl train ...` is `python -m ddp_ssl.train ...`."""

from __future__ import annotations

import sys

from ddp_ssl import __version__

COMMANDS = {"train": "pretrain; the same arguments as python -m ddp_ssl.train"}


def main() -> int:
    """Dispatch to a command; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["train"]:
        from ddp_ssl.train import main as train

        return train(arguments[1:])
    if arguments[:1] == ["--version"]:
        print(f"ddp_ssl {__version__}")
        return 0
    lines = ["usage: ddp-ssl COMMAND [...]", ""]
    lines += [f"  {name:<8}{text}" for name, text in COMMANDS.items()]
    wrong = bool(arguments) and arguments[0] not in ("-h", "--help")
    if wrong:
        lines = [f"ddp-ssl: error: unknown command {arguments[0]!r}; accepted: train"]
    print("\n".join(lines), file=sys.stderr if wrong else sys.stdout)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
