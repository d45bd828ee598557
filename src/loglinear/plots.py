"""One look for every plot of the library: readable in print, told apart without colour vision, labelled with
units.

The colours are those of Okabe and Ito's palette (chosen to stay distinct under every common colour-vision
deficiency), and no plot relies on colour alone: each series also has its own marker. Legends stand outside
the axes, so they never cover data.

Functions here take plain numbers and return a matplotlib `Figure`; `save` writes it. Nothing here touches
matplotlib's global state: figures are made without pyplot, so importing this module neither needs a display
nor changes the caller's settings.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "figure.dpi": 120.0,
    "savefig.dpi": 150.0,
    # Text in a PDF or SVG stays text, so that it can be searched.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The library's matplotlib settings, for as long as the `with` block lasts."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` axes, each `width` x `height` inches, and the axes in reading order.
    Call inside `style()`.
    """
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [axis for row in axes for axis in row]


def save(figure: Figure, path: str | Path) -> Path:
    """Writes `figure` to `path` (the ending chooses the format), making its folder if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        figure.savefig(path, bbox_inches="tight", facecolor="white")
    return path


def format_tokens(count: float) -> str:
    """A token count as people say it: 512, 1K, 64K, 1M (K is 1024)."""
    for size, suffix in ((1024**2, "M"), (1024, "K")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return f"{count:.0f}"


def format_bytes(count: float) -> str:
    """Bytes with a binary unit and three digits: 96 B, 1.5 KiB, 72 MiB, 3.28 GiB."""
    suffixes = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1000 and power + 1 < len(suffixes):
        count, power = count / 1024, power + 1
    return f"{count:.3g} {suffixes[power]}" if 0 < power and count < 1000 else f"{count:.0f} {suffixes[power]}"


def format_milliseconds(value: float) -> str:
    """A time in milliseconds with three digits and the unit that suits it: 85 µs, 1.52 ms, 12.3 s."""
    if value < 0.1:
        return f"{value * 1000:.3g} µs"
    if value < 1000:
        return f"{value:.3g} ms"
    return f"{value / 1000:.3g} s"


def token_axis(axis: Axes, lengths: Sequence[float], label: str = "sequence length (tokens)") -> None:
    """Makes the x axis logarithmic, with a tick at each length of `lengths` (thinned to about ten)."""
    axis.set_xscale("log", base=2)
    ticks = sorted({float(length) for length in lengths})
    step = max(1, math.ceil(len(ticks) / 10))
    axis.xaxis.set_major_locator(FixedLocator(ticks[::step]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    axis.set_xlabel(label)


def unit_axis(axis: Axes, formatter: Callable[[float], str]) -> None:
    """Labels the ticks of a logarithmic y axis with `formatter(value) -> str`. Call when the data are drawn: where they
    span less than two powers of ten, there are ticks at 2 and 5 times those, too.
    """
    low, high = axis.get_ylim()
    if getattr(axis.yaxis.get_transform(), "base", None) == 10 and high < 100 * low:
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatter(value)))
    axis.yaxis.set_minor_formatter(NullFormatter())


def plain_axis(axis: Axes) -> None:
    """Labels the ticks of a linear y axis with whole numbers and thousands apart: 250,000."""
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend_outside(axis: Axes) -> None:
    """Puts the legend to the right of the axes, where it covers nothing."""
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0)


def legend_below(figure: Figure, axis: Axes) -> None:
    """Puts the legend of `axis` in a row below the whole figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))))


@dataclass(frozen=True)
class Series:
    """One line of a plot: its name, points, and optional error bars (one standard error, or low and high
    ends).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False
    colour: int | None = None
    marker: int | None = None


def follow_lines(axis: Axes, series: Sequence[Series]) -> None:
    """Gives the y axis to the lines: bands that reach much further, as of very few values, are cut off."""
    values = [value for line in series for value in line.y]
    ends = [end for line in series for side in (line.low, line.high) if side is not None for end in side]
    if not values or not ends:
        return
    span = max(max(values) - min(values), 0.02 * max(map(abs, values)), 1e-9)
    low, high = (max(min(ends), min(values) - 2 * span), min(max(ends), max(values) + 2 * span))
    axis.set_ylim(min(low, min(values)) - 0.1 * span, max(high, max(values)) + 0.1 * span)


def draw_series(axis: Axes, series: Sequence[Series]) -> None:
    """Draws each series with its own colour and marker; errors as bars, low and high ends as a band."""
    for index, line in enumerate(series):
        colour = PALETTE[(index if line.colour is None else line.colour) % len(PALETTE)]
        appearance: dict[str, Any] = {
            "color": colour,
            "marker": MARKERS[(index if line.marker is None else line.marker) % len(MARKERS)],
            "linestyle": "--" if line.dashed else "-",
            "label": line.name,
        }
        if line.error is None:
            axis.plot(line.x, line.y, **appearance)
        else:
            axis.errorbar(line.x, line.y, yerr=line.error, capsize=2.5, elinewidth=1.0, **appearance)
        if line.low is not None and line.high is not None:
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
