"""The same as `ddp-ssl plot balance`."""

import door

if __name__ == "__main__":
    door.enter("plot_balance")
