"""The same as `ddp-ssl simulate`."""

import shim

if __name__ == "__main__":
    shim.run("simulate")
