"""The same as `ddp-ssl plot balance`."""

import shim

if __name__ == "__main__":
    shim.run("plot_balance")
