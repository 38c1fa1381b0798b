"""The same as `ddp-ssl pack-shards`."""

import shim

if __name__ == "__main__":
    shim.run("pack_shards")
