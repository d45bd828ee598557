"""Tables and plots from synthetic rows: right numbers in right places, and words where there are no
numbers.
"""

from pathlib import Path

import pytest

from bench.synthetic import make_row
from loglinear.bench import report
from loglinear.bench.rows import fit_growth, read_rows

LENGTHS = (4096, 16384, 65536)


def group_key(dtype: str = "bfloat16", tokens: int | None = None) -> report.Group:
    return report.Group("mamba2", "forward", dtype, tokens)


def rows_of(operator: str, mechanism: str, exponent: float, **changes):
    return [
        make_row(
            operator=operator,
            mechanism=mechanism,
            length=length,
            batch=1,
            time_ms=(length / 4096) ** exponent,
            time_low_ms=0.9 * (length / 4096) ** exponent,
            time_high_ms=1.1 * (length / 4096) ** exponent,
            peak_memory_bytes=1024 * length,
            **changes,
        )
        for length in LENGTHS
    ]


def test_the_table_has_fitted_growth_and_values_per_sequence():
    rows = [
        *rows_of("softmax-flash", "FlashAttention", 2.0),
        *rows_of("log-linear", "log-linear", 1.0),
        *[make_row(batch=262144 // length, length=length, time_ms=2.0 * 262144 / 4096) for length in LENGTHS],
    ]
    groups = report.groups_of(rows)
    one, tokens = group_key(), group_key(tokens=262144)
    assert list(groups) == [one, tokens]
    header, lines = report.comparison_table(groups[one])
    assert header[4:7] == ["4K time", "16K time", "64K time"]
    by_operator = {line[1]: line for line in lines}
    assert list(by_operator) == ["softmax-flash", "log-linear"]
    assert by_operator["softmax-flash"][2].startswith("T^2.00")
    assert by_operator["log-linear"][2].startswith("T^1.00")
    assert by_operator["softmax-flash"][4:7] == ["1 ms", "16 ms", "256 ms"]
    assert by_operator["log-linear"][7:] == ["4 MiB", "16 MiB", "64 MiB"]
    _, lines = report.comparison_table(groups[tokens])
    assert lines[0][4:7] == ["2 ms", "8 ms", "32 ms"]


def test_ratios_are_relative_to_log_linear():
    group = report.groups_of(
        [*rows_of("softmax-flash", "FlashAttention", 2.0), *rows_of("log-linear", "log-linear", 1.0)]
    )
    header, lines = report.ratio_table(next(iter(group.values())))
    assert header == ["time over that of log-linear", "4K", "16K", "64K"]
    assert lines == [["softmax-flash", "1.00", "4.00", "16.00"]]


def test_a_batch_of_one_continues_the_constant_number_of_tokens():
    rows = [
        make_row(batch=2, length=32768),
        make_row(batch=1, length=32768),
        make_row(batch=1, length=65536),
    ]
    groups = report.groups_of(rows)
    assert [row.length for row in groups[group_key(tokens=65536)]["log-linear"]] == [32768, 65536]
    assert [row.length for row in groups[group_key()]["log-linear"]] == [32768, 65536]


def test_a_curve_has_one_dtype(tmp_path: Path):
    rows = [
        *rows_of("log-linear", "log-linear", 1.0, dtype="bfloat16"),
        *rows_of("log-linear", "log-linear", 2.0, dtype="float32"),
    ]
    groups = report.groups_of(rows)
    assert list(groups) == [group_key(), group_key(dtype="float32")]
    growths = [report.growth_of(group["log-linear"], lambda row: row.time_ms) for group in groups.values()]
    assert [round(growth.exponent, 6) for growth in growths if growth is not None] == [1.0, 2.0]
    written = report.write_report(rows, tmp_path, "gpu")
    assert [path.name for path in written[1:]] == [
        "gpu-mamba2-forward-one-bfloat16.png",
        "gpu-mamba2-forward-one-float32.png",
    ]
    text = written[0].read_text()
    assert "### mamba2, forward, one sequence a call, bfloat16\n" in text
    assert "### mamba2, forward, one sequence a call, float32\n" in text


def test_a_curve_has_one_number_of_tokens(tmp_path: Path):
    """Two measurements with 65,536 and 16,384 tokens a call, at a length that divides neither among them."""
    rows = [
        make_row(batch=max(1, tokens // length), length=length, time_ms=float(tokens))
        for tokens in (16_384, 65_536)
        for length in (1000, 4096, 16384, 32768)
    ]
    groups = report.groups_of(rows)
    few, many = group_key(tokens=16_384), group_key(tokens=65_536)
    assert list(groups) == [group_key(), few, many]
    assert [(row.batch, row.length) for row in groups[few]["log-linear"]] == [
        (16, 1000), (4, 4096), (1, 16384), (1, 32768),
    ]  # fmt: skip
    assert [(row.batch, row.length) for row in groups[many]["log-linear"]] == [
        (65, 1000), (16, 4096), (4, 16384), (2, 32768),
    ]  # fmt: skip
    written = report.write_report(rows, tmp_path, "gpu")
    assert [path.name for path in written[1:]] == [
        "gpu-mamba2-forward-one.png",
        "gpu-mamba2-forward-16384-tokens.png",
        "gpu-mamba2-forward-65536-tokens.png",
    ]
    assert "### mamba2, forward, 16,384 tokens a call\n" in written[0].read_text()


def test_a_call_that_two_numbers_of_tokens_ask_for_is_on_both_curves():
    rows = [make_row(batch=batch, length=length) for batch, length in ((32, 2048), (40, 2048), (2, 32768))]
    groups = report.groups_of(rows)
    assert [(row.batch, row.length) for row in groups[group_key(tokens=65_536)]["log-linear"]] == [
        (32, 2048),
        (2, 32768),
    ]
    assert [(row.batch, row.length) for row in groups[group_key(tokens=81_920)]["log-linear"]] == [
        (40, 2048),
        (2, 32768),
    ]


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_the_reports_in_the_repository_are_those_of_their_rows(name):
    folder = Path(__file__).parents[2] / "benchmarks"
    rows = read_rows(folder / f"{name}.csv")
    assert report.to_markdown(rows) == (folder / f"{name}.md").read_text()


def test_what_could_not_run_says_why_and_is_left_out_of_the_fit():
    rows = rows_of("softmax-math", "standard", 2.0)[:2]
    rows.append(
        make_row(
            operator="softmax-math",
            mechanism="standard",
            length=65536,
            batch=1,
            status="out of memory",
            time_ms=None,
            peak_memory_bytes=None,
        )
    )
    text = report.to_markdown(rows)
    assert "| out of memory | " in text
    assert "Not measured: softmax-math: out of memory (64K)." in text
    growth = report.growth_of(rows, lambda row: row.time_ms)
    assert growth == fit_growth(LENGTHS[:2], [1.0, 16.0])


def test_growth_is_fitted_where_calls_are_long():
    rows = rows_of("log-linear", "log-linear", 1.0)
    short = [make_row(length=length, batch=1, time_ms=1.0) for length in (256, 1024)]
    growth = report.growth_of([*short, *rows], lambda row: row.time_ms)
    assert growth is not None and growth.points == 3 and abs(growth.exponent - 1) < 1e-9


def test_models_are_tabulated_by_tokens_per_second():
    rows = [
        make_row(suite="models", operator="a", direction="training step", length=2048, tokens_per_second=1234.5),
        make_row(
            suite="models",
            operator="a",
            direction="training step",
            length=4096,
            tokens_per_second=None,
            status="out of memory",
        ),
    ]
    assert report.model_table(rows) == (["preset", "2K", "4K"], [["a", "1,234", "out of memory"]])


def test_the_report_and_its_plots_are_written(tmp_path: Path):
    rows = [
        *rows_of("softmax-flash", "FlashAttention", 2.0),
        *rows_of("log-linear", "log-linear", 1.0),
        make_row(suite="models", operator="a", shape="model", direction="training step"),
    ]
    written = report.write_report(rows, tmp_path, "gpu")
    assert [path.name for path in written] == ["gpu.md", "gpu-mamba2-forward-one.png", "gpu-models.png"]
    assert "Exact T log T growth over 4K to 64K, fitted in the same way: T^1.1" in written[0].read_text()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


def test_a_model_keeps_its_colour_and_how_its_states_are_kept_its_marker():
    names = ["a, no window", "b, no window", "a", "b", "a, float32 states", "b, bfloat16 states"]
    rows = [
        make_row(suite="decode", operator=name, shape="model", batch=32, length=length)
        for name in names
        for length in LENGTHS
    ]
    (axis,) = report.plot_decoding(rows, of_cache=False).axes
    look = {line.get_label(): (line.get_color(), line.get_marker()) for line in axis.get_lines()}
    assert set(look) == set(names)
    colour, marker = ({name: pair[which] for name, pair in look.items()} for which in (0, 1))
    assert colour["a"] == colour["a, no window"] == colour["a, float32 states"]
    assert colour["b"] == colour["b, no window"] == colour["b, bfloat16 states"] != colour["a"]
    assert marker["a"] == marker["b"] and marker["a, no window"] == marker["b, no window"]
    assert len(set(marker.values())) == 4
