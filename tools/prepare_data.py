"""The same as `ddp-ssl prepare-data`."""

import shim

if __name__ == "__main__":
    shim.run("prepare_data")
