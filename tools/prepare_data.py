"""The same as `ddp-ssl prepare-data`."""

import door

if __name__ == "__main__":
    door.enter("prepare_data")
