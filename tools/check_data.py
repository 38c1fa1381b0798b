"""The same as `ddp-ssl check-data`."""

import door

if __name__ == "__main__":
    door.enter("check_data")
