"""Numbers are labelled as people write them, and drawing leaves matplotlib's settings alone."""

import matplotlib
import pytest

from loglinear import plots


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512"), (1024, "1K"), (65_536, "64K"), (1536, "1.5K"), (2**20, "1M")]
)
def test_tokens(count, text):
    assert plots.format_tokens(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (96, "96 B"),
        (1536, "1.5 KiB"),
        (72 * 2**20, "72 MiB"),
        (1020 * 2**10, "0.996 MiB"),
        (5 * 2**50, "5120 TiB"),
    ],
)
def test_bytes(count, text):
    assert plots.format_bytes(count) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0852, "85.2 µs"), (1.519, "1.52 ms"), (999.4, "999 ms"), (12_345.0, "12.3 s")]
)
def test_times(value, text):
    assert plots.format_milliseconds(value) == text


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([33, 700], ["50", "100", "200", "500"]),
        ([599, 13_698], ["1,000", "2,000", "5,000", "10,000"]),
        ([0.1, 1000], ["0", "1", "10", "100", "1,000"]),
    ],
)
def test_a_short_logarithmic_axis_has_ticks_between_powers(values, labels):
    with plots.style():
        _, (axis,) = plots.new_figure()
        plots.draw_series(axis, [plots.Series("a", [1, 2], values)])
        axis.set_yscale("log", base=10)
        plots.unit_axis(axis, lambda value: f"{value:,.0f}")
    low, high = axis.get_ylim()
    ticks = [tick for tick in axis.yaxis.get_major_locator()() if low <= tick <= high]
    assert [axis.yaxis.get_major_formatter()(tick) for tick in ticks] == labels


def test_a_plot_is_written_and_settings_stay(tmp_path):
    before = dict(matplotlib.rcParams)
    with plots.style():
        figure, (axis,) = plots.new_figure()
        plots.draw_series(axis, [plots.Series("a", [1024, 4096], [1.0, 2.0], error=[0.1, 0.2])])
        plots.token_axis(axis, [1024, 4096])
        plots.legend_outside(axis)
    path = plots.save(figure, tmp_path / "new" / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1K", "4K"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a"]
    assert dict(matplotlib.rcParams) == before


def test_bands_that_reach_far_do_not_flatten_the_lines():
    with plots.style():
        figure, (axis, other) = plots.new_figure(1, 2)
        wide = plots.Series("wide", [1, 2], [1.0, 1.5], low=[-20.0, 1.4], high=[20.0, 1.6])
        narrow = plots.Series("narrow", [1, 2], [1.0, 1.5], low=[0.9, 1.4], high=[1.1, 1.6])
        plots.draw_series(axis, [wide])
        plots.follow_lines(axis, [wide])
        plots.draw_series(other, [narrow])
        plots.follow_lines(other, [narrow])
    low, high = axis.get_ylim()
    assert -1 < low < 0.9 and 1.6 < high < 3
    low, high = other.get_ylim()
    assert low < 0.9 and high > 1.6 and high - low < 1.0
    assert not figure.texts
