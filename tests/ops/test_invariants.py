"""What must hold without any reference (both backends)."""

import pytest
import torch

from loglinear import FenwickState, fenwick, log_linear_attention
from operator_cases import MIXERS, Shape, assert_close, make_inputs, random_state

each_mixer = pytest.mark.parametrize("mixer", MIXERS)
each_backend = pytest.mark.parametrize("backend", ["torch", "reference"])
SHAPE = Shape(B=3, T=75, G=1, H=2, K=4, V=3, L=8)


def run(inputs, backend, level_scales="own", **options):
    arguments = inputs.arguments()
    if level_scales != "own":
        arguments["level_scales"] = level_scales
    o, state = log_linear_attention(**arguments, return_state=True, backend=backend, **options)
    assert state is not None
    return o, state


@each_backend
@each_mixer
@pytest.mark.parametrize("L", [1, 4, 8])
def test_scales_of_one_are_the_plain_mixer(mixer, L, backend):
    inputs = make_inputs(mixer, SHAPE)
    plain, state = run(inputs, backend, level_scales=None)
    o, buckets = run(inputs, backend, level_scales=torch.ones(3, 75, 2, L, dtype=torch.float64))
    assert_close(o, plain, 1e-13, "o")
    assert_close(buckets.buckets.sum(1, keepdim=True), state.buckets, 1e-13, "sum of the buckets")


@each_backend
@each_mixer
def test_longer_partition_with_equal_scales_changes_nothing(mixer, backend):
    inputs = make_inputs(mixer, SHAPE)
    level_scales = inputs.level_scales
    assert level_scales is not None
    short = level_scales[..., :4]
    longer = torch.cat([short, short[..., -1:].expand(-1, -1, -1, 9)], dim=-1)
    o, state = run(inputs, backend, level_scales=short)
    same, full = run(inputs, backend, level_scales=longer)
    assert_close(same, o, 1e-13, "o")
    assert_close(full.buckets[:, :3], state.buckets[:, :3], 1e-13, "lower buckets")
    assert_close(full.buckets[:, 3:].sum(1), state.buckets[:, 3], 1e-13, "last bucket")


@each_backend
@each_mixer
def test_buckets_of_the_returned_state_are_occupied_by_the_digits_of_its_position(mixer, backend):
    for T in (1, 2, 7, 64, 75):
        _, state = run(make_inputs(mixer, SHAPE).tokens(0, T), backend)
        assert state.positions.tolist() == [T] * 3
        assert (state.buckets.abs().amax((2, 3, 4)) > 0).tolist() == [fenwick.occupied(T, 8)] * 3


@each_backend
@each_mixer
def test_permuted_rows(mixer, backend):
    inputs, state, order = make_inputs(mixer, SHAPE), random_state(SHAPE, [5, 70, 0]), torch.tensor([2, 0, 1])
    o, after = run(inputs, backend, initial_state=state)
    moved, moved_after = run(inputs.map(lambda x: x[order]), backend, initial_state=state.select(order))
    assert_close(moved, o[order], 1e-13, "o")
    assert_close(moved_after.buckets, after.buckets[order], 1e-13, "state")
    assert moved_after.positions.tolist() == after.positions[order].tolist()


@each_backend
@each_mixer
def test_a_token_sees_nothing_of_what_follows(mixer, backend):
    inputs = make_inputs(mixer, SHAPE)
    o, _ = run(inputs, backend)
    changed = inputs.map(lambda x: torch.cat([x[:, :50], x[:, 50:] * 0.5], dim=1))
    later, _ = run(changed, backend)
    assert_close(later[:, :50], o[:, :50], 1e-14, "o before the change")
    assert not torch.equal(later[:, 50:], o[:, 50:])


@each_backend
@each_mixer
def test_scale_multiplies_the_output(mixer, backend):
    inputs = make_inputs(mixer, SHAPE)
    assert_close(run(inputs, backend, scale=0.25)[0], 0.25 * run(inputs, backend)[0], 1e-14, "o")


@each_backend
def test_heads_read_the_group_they_belong_to(backend):
    inputs = make_inputs("mamba2", SHAPE._replace(G=2, H=6))
    o, _ = run(inputs, backend)
    repeated = inputs.map(lambda x: x)
    repeated.q, repeated.k = (x.repeat_interleave(3, dim=2) for x in (inputs.q, inputs.k))
    assert_close(run(repeated, backend)[0], o, 1e-13, "o")


@each_mixer
def test_a_state_of_zeros_is_no_state(mixer):
    inputs = make_inputs(mixer, SHAPE)
    o, after = run(inputs, "torch")
    again, again_after = run(inputs, "torch", initial_state=FenwickState.zeros(3, 8, 2, 4, 3, dtype=torch.float64))
    assert_close(again, o, 1e-14, "o")
    assert_close(again_after.buckets, after.buckets, 1e-14, "state")
