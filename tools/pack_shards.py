"""The same as `ddp-ssl pack-shards`."""

import door

if __name__ == "__main__":
    door.enter("pack_shards")
