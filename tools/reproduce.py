"""The same as `ddp-ssl reproduce`."""

import door

if __name__ == "__main__":
    door.enter("reproduce")
