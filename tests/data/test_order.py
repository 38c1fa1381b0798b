"""Every image once an epoch, the same global batches whatever the number of shards."""

import numpy as np
import pytest

from ddp_ssl.data.loading.order import Order, permutation
from ddp_ssl.utils.seeds import hashed


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_an_epoch_is_every_image_once_up_to_the_dropped_tail(shards: int) -> None:
    size, batch = 103, 12
    orders = [Order(size, batch, shard, shards, seed=1) for shard in range(shards)]
    for epoch in range(3):
        expected = permutation(1, epoch, size)[: size // batch * batch]
        steps = range(epoch * orders[0].steps_per_epoch, (epoch + 1) * orders[0].steps_per_epoch)
        got = np.concatenate([order.ids(step) for step in steps for order in orders])
        np.testing.assert_array_equal(got, expected)
        assert len(set(got.tolist())) == 96


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_the_shards(shards: int) -> None:
    one = Order(50, 12, 0, 1, seed=9)
    parts = [Order(50, 12, shard, shards, seed=9) for shard in range(shards)]
    for step in (0, 3, 4, 17, 2):  # backwards too: a pure function of the step
        gathered = np.concatenate([order.ids(step) for order in parts])
        np.testing.assert_array_equal(gathered, one.ids(step))


def test_epochs_and_seeds_differ_and_the_order_is_fixed_for_good() -> None:
    assert permutation(0, 0, 10).tolist() == [4, 6, 3, 5, 8, 2, 0, 7, 9, 1]
    assert sorted(permutation(0, 1, 10)) == list(range(10))
    orders = {tuple(permutation(seed, epoch, 10)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert hashed(1, "a") != hashed(1, "b")
    assert 0 <= hashed(1, "a") < 2**31


def test_a_batch_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^data.batch_size: 12 images do not fit in the 11 "):
        Order(11, 12, 0, 1, seed=0)
    with pytest.raises(ValueError, match=r"^data.batch_size: 12 .* evenly over 5 shards$"):
        Order(100, 12, 0, 5, seed=0)
