"""What runs the kernels for Hopper on a processor objects to what would be wrong on a GPU, and to nothing else."""

import pytest
import torch

pytest.importorskip("triton")
from gluon_on_cpu import (
    Launched,
    allocate_shared_memory,
    async_copy_global_to_shared,
    commit_group,
    fence_async_shared,
    load,
    program,
    store,
    thread_barrier,
    wait_group,
    warpgroup_mma,
    warpgroup_mma_wait,
)

SIZE = 16


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def new_tile():
    return allocate_shared_memory(torch.bfloat16, [SIZE, SIZE], None)


def offsets():
    return SIZE * torch.arange(SIZE)[:, None] + torch.arange(SIZE)


def copy(tile, pointer):
    async_copy_global_to_shared(tile, pointer + offsets())
    commit_group()


def overwrite(tile, pointer):
    tile.store(load(pointer + offsets()))


def arrived(later=0):
    wait_group(later)
    fence_async_shared()
    thread_barrier()


def tile_of(pointer):
    tile = new_tile()
    copy(tile, pointer)
    arrived()
    return tile


def multiply(left, right, total=None):
    acc = torch.zeros(SIZE, SIZE) if total is None else total
    return warpgroup_mma(left, right, acc, use_acc=total is not None, is_async=True)


def objects(message, kernel, *tensors):
    with pytest.raises(AssertionError, match=message):
        Launched(kernel)[(1,)](*(tensors or [numbers(SIZE, SIZE)]))


def test_right_kernel():
    """Products from shared memory and from registers, one added to the other, while a third is under way."""

    def kernel(left_at, right_at, found_at):
        left, right = new_tile(), new_tile()
        copy(left, left_at)
        copy(right, right_at)
        arrived(1)
        turned = left.permute([1, 0]).load(None)
        arrived()
        found = multiply(left, right)
        found = multiply(turned, right, found)
        square = multiply(right, right)
        found = warpgroup_mma_wait(1, deps=[found])
        left_again = left.load(None)
        square = warpgroup_mma_wait(0, deps=[square])
        thread_barrier()
        left.store((found + square).to(torch.bfloat16))
        copy(right, left_at)
        arrived()
        assert torch.equal(right.load(None), left_again)
        store(found_at + offsets(), left.load(None))

    left, right = numbers(2, SIZE, SIZE)
    found = torch.zeros(SIZE, SIZE, dtype=torch.bfloat16)
    Launched(kernel)[(1,)](left, right, found)
    expected = (left + left.T.float() + right) @ right.float()
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("backwards", [False, True])
def test_order_of_programs(backwards):
    order = []
    kernel = Launched(lambda: order.append(program().place[:2]), backwards)
    kernel[(2, 2)]()
    expected = [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert order == (expected[::-1] if backwards else expected)


def test_nothing_is_left_of_a_program_that_was_objected_to():
    objects("under way", lambda at: copy(new_tile(), at))
    with pytest.raises(AssertionError):
        program()


@pytest.mark.parametrize("used", [lambda tile: tile.load(None), lambda tile: multiply(tile, tile)])
def test_copy_that_is_used_before_it_was_waited_for(used):
    def kernel(at):
        first, second = new_tile(), new_tile()
        copy(first, at)
        copy(second, at)
        arrived(1)
        first.load(None)
        used(second)

    objects("read before it has arrived", kernel)


def test_copy_that_is_in_no_group_when_it_is_waited_for():
    def kernel(at):
        tile = new_tile()
        async_copy_global_to_shared(tile, at + offsets())
        arrived()
        tile.load(None)

    objects("read before it has arrived", kernel)


def test_copy_that_is_used_before_a_barrier():
    def kernel(at):
        tile = new_tile()
        copy(tile, at)
        wait_group(0)
        tile.load(None)

    objects("read before a barrier", kernel)


def test_load_before_a_barrier():
    def kernel(at):
        tile = new_tile()
        overwrite(tile, at)
        tile.slice(0, 1).load(None)

    objects("read before a barrier", kernel)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [thread_barrier]),
        ([fence_async_shared], [thread_barrier]),
        ([], [thread_barrier, fence_async_shared]),
    ],
)
def test_store_that_is_multiplied_without_a_fence_and_a_barrier(before, after):
    def kernel(at):
        tile = new_tile()
        for step in [*before, lambda: overwrite(tile, at), *after]:
            step()
        multiply(tile, tile)

    objects("multiplied without a fence", kernel)


@pytest.mark.parametrize("is_left", [False, True])
@pytest.mark.parametrize("change", [copy, overwrite])
def test_operand_that_is_changed_under_way(change, is_left):
    def kernel(at):
        left, right = tile_of(at), tile_of(at)
        multiply(left, right)
        thread_barrier()
        change(left if is_left else right.permute([1, 0]), at)

    objects("changed while a product is under way", kernel)


@pytest.mark.parametrize("change", [copy, overwrite])
@pytest.mark.parametrize(
    "read", [lambda tile: tile.load(None), lambda tile: warpgroup_mma_wait(0, deps=[multiply(tile, tile)])]
)
def test_overwritten_while_it_may_be_read(read, change):
    """A product has been waited for by those alone whose it is."""

    def kernel(at):
        tile = tile_of(at)
        read(tile)
        change(tile, at)

    objects("overwritten while it may be read", kernel)


@pytest.mark.parametrize("change", [copy, overwrite])
def test_written_while_a_copy_is_under_way(change):
    def kernel(at):
        tile = new_tile()
        copy(tile, at)
        thread_barrier()
        change(tile, at)

    objects("written before a copy to it has arrived", kernel)


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("change", [copy, overwrite])
def test_overwritten_before_a_barrier(change, is_copied):
    def kernel(at):
        tile = new_tile()
        if is_copied:
            copy(tile, at)
            wait_group(0)
        else:
            overwrite(tile, at)
        change(tile, at)

    objects("overwritten before a barrier", kernel)


def test_too_much_shared_memory():
    def kernel(at):
        for _ in range(8):
            allocate_shared_memory(torch.bfloat16, [128, 128], None)

    objects("262144 bytes of shared memory", kernel)


def copy_of_one(pointer, mask):
    async_copy_global_to_shared(allocate_shared_memory(torch.bfloat16, [1], None), pointer + torch.zeros(1), mask)
    commit_group()
    wait_group(0)


@pytest.mark.parametrize(
    "access", [copy_of_one, load, lambda pointer, mask: store(pointer, torch.zeros((), dtype=torch.bfloat16), mask)]
)
def test_beyond_a_tensor(access):
    """Which is a part of another here."""
    part = numbers(8, SIZE)[2:6, 3:8]
    last = 3 * SIZE + 4
    for offset, masked in [(0, True), (last, True), (-1, False), (last + 1, False)]:
        Launched(lambda at, offset=offset, masked=masked: access(at + offset, masked))[(1,)](part)
    for offset in (-1, last + 1):
        objects("beyond a tensor", lambda at, offset=offset: access(at + offset, True), part)


def test_beyond_an_empty_tensor():
    objects("beyond a tensor", load, numbers(4, 4)[:, 2:2])


@pytest.mark.parametrize("begin", [copy, lambda tile, at: multiply(tile, tile)])
def test_ends_while_something_is_under_way(begin):
    def kernel(at):
        begin(tile_of(at), at)

    objects("ends while something is under way", kernel)


@pytest.mark.parametrize(
    "use",
    [
        lambda found: -found,
        lambda found: 2 * found,
        lambda found: torch.ones(SIZE, SIZE) * found,
        lambda found: torch.where(torch.ones(SIZE, SIZE) > 0, found, 0.0),
        lambda found: found.to(torch.bfloat16),
    ],
)
def test_product_that_is_used_before_it_is_waited_for(use):
    def kernel(at):
        tile = tile_of(at)
        found = multiply(tile, tile)
        other = multiply(tile, tile)
        warpgroup_mma_wait(0, deps=[other])
        use(found)

    objects("used before it is waited for", kernel)


def test_product_that_a_wait_leaves_under_way():
    def kernel(at):
        tile = tile_of(at)
        multiply(tile, tile)
        warpgroup_mma_wait(1, deps=[multiply(tile, tile)]) + 1

    objects("used before it is waited for", kernel)


def test_product_that_is_added_to_under_way():
    def kernel(at):
        tile = tile_of(at)
        first = multiply(tile, tile)
        multiply(tile, tile, first)
        warpgroup_mma_wait(1, deps=[first]) + 1

    objects("used before it is waited for", kernel)
