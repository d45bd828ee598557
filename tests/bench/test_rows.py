"""Rows survive a CSV, merge by what they measure, and the growth fitted from them is the growth that is in
them.
"""

import pytest

from bench.synthetic import make_row
from loglinear.bench.rows import (
    ADDED,
    COLUMNS,
    environment,
    fit_growth,
    merge_rows,
    read_rows,
    t_log_t_exponent,
    write_rows,
)


def test_rows_survive_the_csv(tmp_path):
    rows = [make_row(), make_row(length=8192, status="out of memory, really", time_ms=None, heads=None)]
    path = write_rows(tmp_path / "new" / "rows.csv", rows)
    assert read_rows(path) == rows
    assert path.read_text().splitlines()[0].split(",") == list(COLUMNS)


def test_a_row_says_where_it_was_measured():
    here = environment("cpu")
    assert here.device and here.threads >= 1
    assert all(version[0].isdigit() for version in (here.torch, here.python, here.loglinear))
    assert here.date.endswith("+00:00")


def test_foreign_columns_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns suite"):
        read_rows(tmp_path / "rows.csv")


def test_files_from_before_there_was_decoding_are_read(tmp_path):
    path = write_rows(tmp_path / "rows.csv", [make_row(cache_bytes=None)])
    lines = [",".join(line.split(",")[: -len(ADDED)]) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    assert read_rows(path) == [make_row(date=read_rows(path)[0].date)]
    path.write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    with pytest.raises(ValueError, match="expected the columns suite"):
        read_rows(path)


def test_a_new_row_replaces_the_old_one_of_the_same_measurement():
    old = [make_row(time_ms=9.0), make_row(length=8192)]
    merged = merge_rows(old, [make_row(time_ms=3.0), make_row(device="another machine")])
    assert [(row.length, row.time_ms, row.device) for row in merged] == [
        (4096, 3.0, old[0].device),
        (8192, 1.25, old[0].device),
        (4096, 1.25, "another machine"),
    ]


def test_times_and_memory_are_divided_among_the_sequences():
    row = make_row(batch=4, time_ms=2.0, peak_memory_bytes=400)
    assert (row.time_per_sequence_ms, row.memory_per_sequence_bytes) == (0.5, 100.0)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 1.37])
def test_the_fitted_exponent_is_that_of_a_power_law(exponent):
    lengths = [1024, 2048, 4096, 65536]
    growth = fit_growth(lengths, [3.0 * length**exponent for length in lengths])
    assert growth is not None
    assert growth.exponent == pytest.approx(exponent, abs=1e-9)
    assert growth.standard_error == pytest.approx(0, abs=1e-7)


def test_the_standard_error_is_that_of_a_line_through_scattered_points():
    # log2: x = 0, 1, 2, 3 and y = 0, 2, 1, 3: slope 0.8, residual sum 1.8, spread of x 5, so sqrt(1.8 / 2 /
    # 5).
    growth = fit_growth([1, 2, 4, 8], [1, 4, 2, 8])
    assert growth is not None
    assert growth.exponent == pytest.approx(0.8)
    assert growth.standard_error == pytest.approx((1.8 / 2 / 5) ** 0.5)
    assert str(growth) == "T^0.80 ± 0.42"


def test_growth_needs_two_lengths_and_positive_numbers():
    assert fit_growth([1024], [2.0]) is None
    assert fit_growth([1024, 1024], [2.0, 3.0]) is None
    two = fit_growth([1024, 2048], [2.0, 8.0])
    assert two is not None and two.exponent == pytest.approx(2.0) and two.standard_error is None
    with pytest.raises(ValueError, match="one value per length"):
        fit_growth([1, 2], [1])
    with pytest.raises(ValueError, match="positive"):
        fit_growth([1, 2], [1, 0])


def test_t_log_t_lies_just_above_linear():
    exponent = t_log_t_exponent([4096, 16384, 65536])
    assert exponent is not None and 1.08 < exponent < 1.12
