"""The same as `ddp-ssl reproduce`."""

import shim

if __name__ == "__main__":
    shim.run("reproduce")
