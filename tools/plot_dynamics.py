"""The same as `ddp-ssl plot dynamics`."""

import door

if __name__ == "__main__":
    door.enter("plot_dynamics")
