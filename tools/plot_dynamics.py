"""The same as `ddp-ssl plot dynamics`."""

import shim

if __name__ == "__main__":
    shim.run("plot_dynamics")
