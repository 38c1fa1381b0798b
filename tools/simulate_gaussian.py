"""The same as `ddp-ssl simulate`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, installed or not
from ddp_ssl.commands.simulate import main

if __name__ == "__main__":
    sys.exit(main())
