import pytest
import torch

from loglinear.layers.packing import PackedLayout, pack_padded, take_once, token_positions, token_rows


def test_rows_and_positions_skip_empty_sequences():
    bounds = torch.tensor([0, 0, 3, 3, 4])
    assert token_rows(bounds, 4).tolist() == [1, 1, 1, 3]
    start = torch.tensor([7, 10, 20, 30])
    assert token_positions(1, 4, None, bounds, bounds.device).tolist() == [[0, 1, 2, 0]]
    assert token_positions(1, 4, start, bounds, bounds.device).tolist() == [[10, 11, 12, 30]]
    assert token_positions(2, 3, torch.tensor([0, 5]), None, bounds.device).tolist() == [[0, 1, 2], [5, 6, 7]]


def test_padding_is_dropped_and_restored():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    x = torch.arange(1.0, 17.0).reshape(4, 4, 1)
    padded = pack_padded(mask)
    assert padded is not None
    assert padded.cu_seqlens.tolist() == [0, 2, 3, 3, 4]
    assert padded.pack(x)[0, :, 0].tolist() == [2.0, 3.0, 5.0, 16.0]
    # Behind a row its last output is repeated, before it there are zeros.
    expected = [[0.0, 2.0, 3.0, 3.0], [5.0, 5.0, 5.0, 5.0], [0.0] * 4, [0.0, 0.0, 0.0, 16.0]]
    assert padded.unpack(padded.pack(x))[..., 0].tolist() == expected
    # With outputs of an earlier call, padding repeats those instead of zeros.
    before = -torch.arange(1.0, 5.0)[:, None]
    expected = [[-1.0, 2.0, 3.0, 3.0], [5.0, 5.0, 5.0, 5.0], [-3.0] * 4, [-4.0, -4.0, -4.0, 16.0]]
    assert padded.unpack(padded.pack(x), before)[..., 0].tolist() == expected


def test_no_padding_is_no_packing():
    assert pack_padded(torch.ones(2, 3, dtype=torch.bool)) is None


def test_holes_are_refused():
    with pytest.raises(ValueError, match="one contiguous run of real tokens in every row, but row 1 has 2 runs"):
        pack_padded(torch.tensor([[1, 1, 1], [1, 0, 1]]))


@pytest.mark.parametrize("lengths", [[1], [5, 3, 0, 9, 8, 1, 2], [16, 1, 1, 1]])
def test_buckets_hold_every_token_once_and_waste_less_than_half(lengths):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    layout = PackedLayout(bounds, sum(lengths))
    held = torch.cat([block.indices[block.valid] for block in layout.buckets()])
    assert held.sort().values.tolist() == list(range(sum(lengths)))
    for block in layout.buckets():
        assert 2 * block.valid.sum(1).min() > block.valid.shape[1]
        for row, sequence in zip(block.indices.tolist(), block.sequences.tolist(), strict=True):
            begin, length = int(bounds[sequence]), lengths[sequence]
            assert row[:length] == list(range(begin, begin + length))


def test_all_rows_keeps_the_order_and_empty_sequences():
    rows = PackedLayout(torch.tensor([0, 2, 2, 5]), 5).all_rows()
    assert rows.sequences.tolist() == [0, 1, 2]
    assert rows.valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert rows.indices[2].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([0, 5], TypeError, "must be an int32 or int64 tensor, got list"),
        (torch.tensor([0.0, 5.0]), TypeError, "must be int32 or int64, got torch.float32"),
        (torch.tensor([5]), ValueError, r"\[number of sequences \+ 1\], got shape \[1\]"),
        (torch.tensor([1, 5]), ValueError, r"must rise from 0 to the 5 tokens, got \[1, 5\]"),
        (torch.tensor([0, 4]), ValueError, "got .0, 4."),
        (torch.tensor([0, 3, 2, 5]), ValueError, "got .0, 3, 2, 5."),
    ],
    ids=["list", "float", "one", "start", "end", "falling"],
)
def test_wrong_bounds_are_refused(bounds, error, message):
    with pytest.raises(error, match=message):
        PackedLayout(bounds, 5)


def test_take_once_has_the_gradients_of_an_index():
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([5, 0, 6, 2])
    assert torch.equal(take_once(x, places), x[:, places])
    assert torch.autograd.gradcheck(take_once, (x, places)) and torch.autograd.gradgradcheck(take_once, (x, places))
