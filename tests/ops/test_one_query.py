"""Attention of one query to a cache against its definition in fp64, for rows of every fill."""

import pytest
import torch

from loglinear.ops.triton import one_query, scalar
from small_models import relative_error

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not scalar.INTERPRETED, reason="kernels are not interpreted here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def attention(q, keys, values, lengths, scale):
    """`q [B, H, D]` to the first columns of `keys, values [B, S, J, D]`."""
    q, keys, values = q.double(), keys.double(), values.double()
    repeats = q.shape[1] // keys.shape[2]
    keys, values = (x.repeat_interleave(repeats, dim=2) for x in (keys, values))
    scores = torch.einsum("bhd,bshd->bhs", q, keys) * scale
    columns = torch.arange(keys.shape[1], device=q.device)
    scores = scores.masked_fill(columns >= lengths[:, None, None], -torch.inf)
    return torch.einsum("bhs,bshd->bhd", scores.softmax(-1), values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 24), (3, 1, 80)], ids=["4x4x16", "6x2x24", "3x1x80"])
def test_rows_of_every_fill(heads, dtype, device):
    """One token, within a block, at its end, all columns; what is behind a row's tokens is poison."""
    (queries, keys_heads, width), columns = heads, 700
    lengths = torch.tensor([1, 97, 128, 513, 700], device=device)
    q = torch.randn(5, queries, width, device=device, dtype=dtype) * 3
    keys, values = (torch.randn(5, columns, keys_heads, width, device=device, dtype=dtype) for _ in range(2))
    wanted = attention(q, keys, values, lengths, 0.3)
    for row, length in enumerate(lengths.tolist()):
        keys[row, length:], values[row, length:] = torch.nan, torch.nan
    got = one_query.attend_one(q, keys, values, lengths, 0.3)
    assert got.dtype == dtype and got.shape == q.shape
    assert relative_error(got.double(), wanted) < TOLERANCES[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("heads", [(24, 24, 64), (32, 4, 128), (16, 1, 256)], ids=["24x24x64", "32x4x128", "16x1x256"])
def test_long_caches(heads, dtype):
    """More parts than the second kernel reads at once, and offsets beyond 32 bits where memory allows."""
    queries, keys_heads, width = heads
    lengths = torch.tensor([100_000, 31], device="cuda")
    q = torch.randn(2, queries, width, device="cuda", dtype=dtype)
    keys, values = (torch.randn(2, 100_000, keys_heads, width, device="cuda", dtype=dtype) for _ in range(2))
    wanted = torch.cat([attention(*(x[i : i + 1] for x in (q, keys, values, lengths)), 0.125) for i in range(2)])
    got = one_query.attend_one(q, keys, values, lengths, 0.125)
    assert relative_error(got.double(), wanted) < TOLERANCES[dtype]
