"""The same as `ddp-ssl simulate`."""

import door

if __name__ == "__main__":
    door.enter("simulate")
