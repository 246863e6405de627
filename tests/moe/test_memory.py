"""moe/memory.py: buffers are used again, and never while somebody still looks at them."""

from __future__ import annotations

import torch

from xmoe_fairseq.moe.memory import BufferPool, empty, row_blocks

SIZE = 8 << 20


def test_a_buffer_is_used_again_once_nobody_refers_to_it() -> None:
    pool = BufferPool()
    first = pool.bytes_on(SIZE)
    address = first.data_ptr()
    second = pool.bytes_on(SIZE)
    assert second.data_ptr() != address
    del first
    assert pool.bytes_on(SIZE).data_ptr() == address


def test_views_keep_a_buffer() -> None:
    pool = BufferPool()
    whole = pool.bytes_on(SIZE)
    part = whole.view(torch.float32)[10:20].view(2, 5).t()
    address = whole.data_ptr()
    del whole
    assert pool.bytes_on(SIZE).data_ptr() != address
    del part
    assert pool.bytes_on(SIZE).data_ptr() == address


def test_gradients_and_saved_tensors_keep_a_buffer() -> None:
    leaf = torch.nn.Parameter(torch.zeros(1200, 1000))
    like = torch.zeros(1)
    gradient = empty(1200, 1000, like=like).fill_(3.0)
    leaf.grad = gradient
    del gradient
    others = [empty(1200, 1000, like=like).fill_(float(value)) for value in range(3)]
    assert bool((leaf.grad == 3.0).all())
    factor = empty(1200, 1000, like=like).fill_(2.0)
    product = (leaf * factor).sum()  # autograd keeps factor
    del factor, others
    empty(1200, 1000, like=like).fill_(7.0)
    leaf.grad = None
    product.backward()
    assert bool((leaf.grad == 2.0).all())


def test_much_larger_buffers_are_not_wasted_on_small_requests() -> None:
    pool = BufferPool()
    address = pool.bytes_on(4 * SIZE).data_ptr()
    assert pool.bytes_on(SIZE).data_ptr() != address


def test_idle_buffers_go_back_to_the_system() -> None:
    pool = BufferPool(patience=2)
    pool.bytes_on(SIZE)
    for factor in (2, 4, 8):
        pool.bytes_on(factor * SIZE)
    assert min(buffer.array.nbytes for buffer in pool._buffers) > 2 * SIZE


def test_small_and_typed_requests() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    small, large = empty(3, 5, like=like), empty(3000, 1001, like=like)
    assert (small.shape, large.shape) == ((3, 5), (3000, 1001))
    assert small.dtype == large.dtype == torch.bfloat16
    assert empty(0, 5, like=like).shape == (0, 5)


def test_row_blocks_cover_every_row_once() -> None:
    rows = torch.zeros(1000, 700)
    covered = [row for block in row_blocks(rows) for row in range(*block.indices(1000))]
    assert covered == list(range(1000))
    assert list(row_blocks(torch.zeros(0, 4))) == []


def test_release_gives_back_what_is_idle_only() -> None:
    pool = BufferPool()
    used = pool.bytes_on(SIZE)
    pool.bytes_on(2 * SIZE)
    assert pool.nbytes == 3 * SIZE
    pool.release()
    assert pool.nbytes == SIZE
    assert used.numel() == SIZE
