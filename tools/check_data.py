"""The same as `ddp-ssl check-data`."""

import shim

if __name__ == "__main__":
    shim.run("check_data")
