"""Errors of many steps: rows, what they compare, and the stand-in for the kernel's pending decays."""

import importlib.util

import pytest
import torch

from loglinear import FenwickState, log_linear_attention_step
from loglinear.bench import drift, read_rows
from loglinear.bench.decoding import Kept
from loglinear.cli import main


@pytest.mark.parametrize("shape", drift.SHAPES, ids=lambda shape: shape.name)
def test_errors_by_how_states_are_kept(shape):
    told = []
    found = dict(drift.drift(shape, (20, 70), told.append))
    assert list(found) == [20, 70] and told == list(range(70))
    for errors in found.values():
        assert set(errors) == {(kept, head) for kept in drift.KEPT for head in (0, 1)}
        for (kept, _), error in errors.items():
            assert 1e-8 < error < 1e-6 if kept.state_dtype is None else 1e-5 < error < 2e-2
    exact, rounded = (found[70][Kept(dtype, None), 1] for dtype in (None, "bfloat16"))
    assert rounded > 100 * exact


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(), reason="kernels are not interpreted here"
)
def test_pending_decays_are_those_of_the_kernel():
    shape, generator = drift.SHAPES[0], torch.Generator().manual_seed(1)
    mine = FenwickState.zeros(1, 4, shape.num_heads, shape.key_dim, shape.value_dim).with_pending()
    theirs = mine.clone()
    for _ in range(11):
        token = drift._token(shape, 4, generator)
        o = drift._deferring_step(mine, token)
        assert torch.allclose(o, log_linear_attention_step(**token, state=theirs, backend="triton"), atol=1e-5)
        assert torch.equal(mine.positions, theirs.positions)
        assert torch.allclose(mine.log_decays, theirs.log_decays, atol=1e-6)
        occupied = mine.occupied()
        assert torch.allclose(mine.buckets[occupied], theirs.buckets[occupied], atol=1e-5)


def test_the_command_keeps_rows(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--drift", "--lengths", "10,30", "--output", str(tmp_path)])
    assert ended.value.code == 0
    rows = read_rows(tmp_path / "drift.csv")
    assert len(rows) == len(drift.SHAPES) * 2 * len(drift.KEPT) * len(drift.DECAYS)
    assert {row.length for row in rows} == {10, 30} and all(row.error is not None for row in rows)
    assert "| delta rule, window 16, bfloat16 states | decays to 0.0001 |" in (tmp_path / "drift.md").read_text()
    assert "error of steps" in capsys.readouterr().out
