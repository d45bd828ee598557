"""FenwickState: sizes, rows, copies."""

import pytest
import torch

from loglinear import FenwickState


def make() -> FenwickState:
    return FenwickState(torch.randn(3, 4, 2, 5, 6), torch.tensor([0, 3, 9]))


def owing() -> FenwickState:
    """As `make`, with decays pending for the occupied buckets."""
    state = make()
    owed = torch.where(state.occupied()[..., None], -torch.rand(3, 4, 2), 0.0)
    return state._replace(log_decays=owed)


def test_zeros():
    state = FenwickState.zeros(batch=2, num_levels=5, num_heads=4, key_dim=16, value_dim=32, dtype=torch.bfloat16)
    assert state.buckets.shape == (2, 5, 4, 16, 32) and state.buckets.dtype == torch.bfloat16
    assert state.positions.tolist() == [0, 0] and state.positions.dtype == torch.int64
    assert not state.buckets.any()
    assert state.num_levels == 5
    assert state.nbytes == 2 * (2 * 5 * 4 * 16 * 32) + 8 * 2


@pytest.mark.parametrize("name", ["num_levels", "num_heads", "key_dim", "value_dim"])
def test_zeros_refuses_empty_sizes(name):
    sizes = {"batch": 1, "num_levels": 1, "num_heads": 1, "key_dim": 1, "value_dim": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        FenwickState.zeros(**sizes)


def test_zeros_of_no_rows():
    assert FenwickState.zeros(0, 1, 1, 1, 1).buckets.shape == (0, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="batch must be at least 0, got -1"):
        FenwickState.zeros(-1, 1, 1, 1, 1)


def test_occupied_by_row():
    assert make().occupied().tolist() == [
        [False, False, False, False], [False, True, True, False], [False, True, False, True]]  # fmt: skip


def test_select_repeats_and_drops_rows_and_copies():
    state = make()
    chosen = state.select(torch.tensor([2, 2]))
    assert chosen.positions.tolist() == [9, 9]
    assert torch.equal(chosen.buckets[1], state.buckets[2])
    chosen.buckets.zero_()
    assert state.buckets[2].any()


def test_clone_is_a_copy_and_detach_is_not():
    state = make()
    copy, same = state.clone(), state.detach()
    state.buckets.zero_()
    state.positions.add_(1)
    assert copy.buckets.any() and copy.positions.tolist() == [0, 3, 9]
    assert not same.buckets.any() and same.positions.tolist() == [1, 4, 10]


def test_detach_drops_the_history():
    buckets = torch.randn(1, 2, 1, 3, 3, requires_grad=True)
    assert not FenwickState(buckets * 2, torch.zeros(1, dtype=torch.int64)).detach().buckets.requires_grad


def test_to_converts_buckets_only():
    moved = make().to("cpu", torch.float64)
    assert moved.buckets.dtype == torch.float64 and moved.positions.dtype == torch.int64


def test_cat_is_the_opposite_of_select():
    state = make()
    rows = [state.select(torch.tensor(part)) for part in ([0], [1, 2])]
    joined = FenwickState.cat(rows)
    assert torch.equal(joined.buckets, state.buckets) and torch.equal(joined.positions, state.positions)
    joined.buckets.zero_()
    assert rows[0].buckets.any(), "the joined state is a copy"
    assert FenwickState.cat([FenwickState.zeros(0, 4, 2, 5, 6), state]).positions.tolist() == [0, 3, 9]


def test_cat_keeps_the_history():
    buckets = torch.randn(1, 2, 1, 3, 3, requires_grad=True)
    state = FenwickState(buckets, torch.zeros(1, dtype=torch.int64))
    FenwickState.cat([state, state]).buckets.sum().backward()
    assert torch.equal(buckets.grad, torch.full_like(buckets, 2))


@pytest.mark.parametrize(
    "other",
    [FenwickState.zeros(1, 5, 2, 5, 6), FenwickState.zeros(1, 4, 2, 5, 6, dtype=torch.float64)],
    ids=["levels", "dtype"],
)
def test_cat_refuses_states_that_differ(other):
    with pytest.raises(ValueError, match="same levels, heads, widths, dtype and device.* at index 1"):
        FenwickState.cat([make(), other])
    with pytest.raises(ValueError, match="got no states"):
        FenwickState.cat([])


def test_settled_applies_what_is_pending_and_empties_empty_buckets():
    state = owing()
    state.buckets[~state.occupied()] = torch.nan
    settled, before = state.settled(), state.clone()
    assert settled.log_decays is None and torch.equal(settled.positions, state.positions)
    assert settled.positions.data_ptr() != state.positions.data_ptr(), "a step with one would move the other"
    for row, levels in enumerate(state.occupied().tolist()):
        for level, used in enumerate(levels):
            factor = state.log_decays[row, level].exp()[:, None, None]
            wanted = state.buckets[row, level] * factor if used else torch.zeros(2, 5, 6)
            assert torch.equal(settled.buckets[row, level], wanted)
    pairs = zip(state.named_tensors(), before.named_tensors(), strict=True)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for (_, x), (_, y) in pairs), "a copy"


def test_a_plain_state_is_settled_already():
    state = make()
    assert state.settled() is state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_settled_keeps_the_dtype_and_the_history(dtype):
    state = owing().to(dtype=dtype)
    assert state.log_decays.dtype == torch.float32 and state.settled().buckets.dtype == dtype
    leaf = state.buckets.double().requires_grad_()
    state._replace(buckets=leaf).settled().buckets.sum().backward()
    factor = torch.where(state.occupied()[..., None], state.log_decays.double().exp(), 0)
    assert torch.equal(leaf.grad, factor[..., None, None].expand_as(leaf))


def test_room_for_pending_decays():
    state = make()
    pending = state.with_pending()
    assert pending.buckets is state.buckets and pending.positions is state.positions
    assert pending.log_decays.shape == (3, 4, 2) and not pending.log_decays.any()
    assert pending.log_decays.dtype == torch.float32
    assert pending.with_pending() is pending
    assert pending.nbytes == state.nbytes + 3 * 4 * 2 * 4
    assert FenwickState.zeros(2, 1, 1, 1, 1).with_pending().log_decays is None, "one level is written at every step"


def test_pending_decays_go_where_the_rows_go():
    state = owing()
    rows = torch.tensor([2, 0])
    assert torch.equal(state.select(rows).log_decays, state.log_decays[rows])
    copy, same = state.clone(), state.detach()
    assert state.to("meta").log_decays.is_meta and state.to(dtype=torch.float64).log_decays.dtype == torch.float32
    state.log_decays.zero_()
    assert copy.log_decays.any() and not same.log_decays.any()


def test_cat_of_pending_and_plain_states():
    state, plain = owing(), make()
    joined = FenwickState.cat([plain, state])
    assert torch.equal(joined.log_decays[3:], state.log_decays) and not joined.log_decays[:3].any()
    for one, rows in ((plain, slice(0, 3)), (state, slice(3, 6))):
        assert torch.equal(joined.settled().buckets[rows], one._replace(log_decays=torch.zeros(3, 4, 2)
                           if one.log_decays is None else one.log_decays).settled().buckets)  # fmt: skip
    single = FenwickState(torch.ones(1, 1, 1, 1, 1), torch.tensor([2]), torch.full((1, 1, 1), -1.0))
    joined = FenwickState.cat([FenwickState.zeros(1, 1, 1, 1, 1), single])
    assert joined.log_decays is None and torch.allclose(joined.buckets[1], torch.tensor(-1.0).exp())


def keeping(delta: bool = True) -> FenwickState:
    """As `make`, each row some tokens into a window of four, with numbers in all places."""
    state = make().with_window(4, num_groups=1, decay="head", delta=delta)
    for name, x in state.named_tensors():
        if name.startswith("window.") and name != "window.begun":
            x.copy_(-torch.rand_like(x))
    state.positions.add_(torch.tensor([3, 0, 2]))
    return state


def same(mine: FenwickState, theirs: FenwickState) -> bool:
    pairs = zip(mine.named_tensors(), theirs.named_tensors(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def test_room_for_a_window():
    state = make()
    kept = state.with_window(4, num_groups=2, decay="head", delta=True)
    assert kept.buckets is state.buckets and kept.positions is state.positions
    assert kept.window.begun.tolist() == [0, 3, 9] and kept.window.begun.data_ptr() != state.positions.data_ptr()
    assert [name for name, _ in kept.named_tensors()][2:] == [
        f"window.{name}" for name in ("begun", "keys", "values", "log_decays", "mixing", "owed")
    ]
    numbers = 3 * (2 * 4 * 5 + 2 * 4 * 6 + 2 * 4 + 2 * 4 * 4 + 2 * 2 * 4)
    assert kept.nbytes == state.nbytes + 4 * numbers + 8 * 3
    assert torch.equal(kept.settled().buckets[kept.occupied()], state.buckets[state.occupied()])
    plain = state.to(dtype=torch.bfloat16).with_window(1, num_groups=1)
    assert plain.window.keys.dtype == torch.float32, "a window is not rounded"
    assert plain.window.log_decays is plain.window.mixing is plain.window.owed is None
    by_channel = state.with_window(4, num_groups=1, decay="channel")
    assert by_channel.window.log_decays.shape == (3, 2, 4, 5) and by_channel.window.owed is None
    single = FenwickState.zeros(2, 1, 1, 1, 1, dtype=torch.float64).with_window(8, num_groups=1)
    assert single.window.values.dtype == torch.float64, "one level has a window, too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 12}, "a window must be a power of two, got 12"),
        ({"length": 0}, "a window must be a power of two, got 0"),
        ({"num_groups": 3}, "num_groups must divide the 2 heads of the state, got 3"),
        ({"decay": "heads"}, "decay must be 'head', 'channel' or None, got 'heads'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_windows_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make().with_window(**{"length": 4, "num_groups": 1, **options})


def test_buckets_beside_a_window_are_those_of_its_start():
    state = keeping()
    assert state.positions.tolist() == [3, 3, 11] and state.base().tolist() == [0, 3, 9]
    assert torch.equal(state.occupied(), make()._replace(positions=torch.tensor([0, 3, 9])).occupied())
    settled = state.settled()
    assert settled.window is None and torch.equal(settled.positions, state.positions)
    assert settled.positions.data_ptr() != state.positions.data_ptr()
    assert torch.equal(settled.buckets.ne(0).flatten(2).any(-1), settled.occupied())
    state.positions.fill_(12)
    assert state.base().tolist() == [12] * 3, "a window that has ended starts anew"


@pytest.mark.parametrize("delta", [False, True])
def test_windows_go_where_the_rows_go(delta):
    state = keeping(delta)
    rows = torch.tensor([2, 0])
    assert torch.equal(state.select(rows).window.values, state.window.values[rows])
    assert same(FenwickState.cat([state.select(torch.tensor([row])) for row in range(3)]), state)
    copy, shared = state.clone(), state.detach()
    assert all(x.is_meta for _, x in state.to("meta").named_tensors())
    wide = state.to(dtype=torch.float64)
    assert wide.buckets.dtype == torch.float64 and wide.window.keys.dtype == torch.float32
    assert torch.allclose(wide.settled().buckets.float(), state.settled().buckets, rtol=1e-5, atol=1e-5)
    state.window.values.zero_()
    assert copy.window.values.any() and not shared.window.values.any()


def test_forms_of_a_state():
    """`like` and `cat` bring states into one form; what they stand for stays."""
    plain, pending, kept = make(), owing(), keeping()
    for mine in (plain, pending, kept):
        for other in (plain, pending, kept, keeping(delta=False), make().with_window(8, num_groups=1, decay="head")):
            found = mine.like(other.select(torch.tensor([0])))
            assert (found.log_decays is None, found.window is None) == (other.log_decays is None, other.window is None)
            assert found.window is None or found.window.kind == other.window.kind
            occupied = mine.settled().occupied()
            assert torch.allclose(found.settled().buckets[occupied], mine.settled().buckets[occupied])
        assert mine.like(mine) is mine
    joined = FenwickState.cat([plain, kept, pending])
    assert joined.window.kind == kept.window.kind and joined.positions.tolist() == [0, 3, 9, 3, 3, 11, 0, 3, 9]
    assert same(joined.select(torch.arange(3, 6)), kept)
    for one, start in ((plain, 0), (kept, 3), (pending, 6)):
        occupied = one.settled().occupied()
        rows = joined.settled().select(torch.arange(start, start + 3))
        assert torch.allclose(rows.buckets[occupied], one.settled().buckets[occupied])
    assert kept.with_pending().window is None and pending.with_window(4, num_groups=1).log_decays is None
