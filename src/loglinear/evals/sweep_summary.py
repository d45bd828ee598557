"""What the runs of a sweep come to: accuracy of each model at the learning rate that does best, as a table and a plot.

A learning rate is chosen for each model, width and training task by the mean accuracy over seeds on the validation
sequences; what is reported is the accuracy of those runs on the test sequences, which no choice has seen. A run that
was not finite counts as an accuracy of zero in both.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from loglinear import plots
from loglinear.evals.sweep import DIVERGED, FAILED, SweepRow

SUMMARY_FILE, PLOT_FILE = "sweep_summary.csv", "sweep.png"


@dataclass(frozen=True)
class SweepSummary:
    """Accuracy of one model at one width, at the learning rate chosen for it.

    `trained_pairs` is the training task, `pairs` the number of pairs that was tested (None: the mean over them).
    `accuracy` and `standard_deviation` are over `seeds` runs on the test sequences (None with one seed),
    `validation_accuracy` is what the learning rate was chosen by; `at_edge` says that it is the lowest or highest that
    was tried, of more than one, so that a better one may lie beyond. `diverged` counts runs that were not finite.
    """

    model: str
    width: int
    trained_pairs: str
    pairs: int | None
    accuracy: float
    standard_deviation: float | None
    seeds: int
    diverged: int
    learning_rate: float
    at_edge: bool
    validation_accuracy: float
    parameters: int
    num_levels: int
    state_bytes: int
    state_bytes_one_level: int
    occupied_state_bytes: int
    kv_cache_bytes: int


def summarize(rows: Sequence[SweepRow]) -> list[SweepSummary]:
    """One row for each model, width, training task and number of pairs tested, and one for the mean over the numbers.

    Only learning rates with a result of every seed can be chosen; a model without one is left out. Of rates that do
    equally well the lower one is chosen.
    """
    groups: dict[tuple, list[SweepRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.width, row.pairs), []).append(row)
    found = []
    for group in groups.values():
        chosen = _best(group)
        if chosen is None:
            continue
        rate, runs, validation = chosen
        rates = sorted({row.learning_rate for row in group})
        numbers = [int(number) for number in runs[0].pairs.split()]
        for pairs in (*numbers, None):
            values = [
                statistics.fmean(accuracies.values()) if pairs is None else accuracies[pairs]
                for accuracies in (run.accuracies("test") for run in runs)
            ]
            found.append(
                SweepSummary(
                    model=runs[0].model,
                    width=runs[0].width,
                    trained_pairs=runs[0].pairs,
                    pairs=pairs,
                    accuracy=statistics.fmean(values),
                    standard_deviation=statistics.stdev(values) if len(values) > 1 else None,
                    seeds=len(runs),
                    diverged=sum(run.status == DIVERGED for run in runs),
                    learning_rate=rate,
                    at_edge=len(rates) > 1 and rate in (rates[0], rates[-1]),
                    validation_accuracy=validation,
                    **{
                        name: getattr(runs[0], name)
                        for name in (
                            "parameters", "num_levels", "state_bytes", "state_bytes_one_level",
                            "occupied_state_bytes", "kv_cache_bytes",
                        )
                    },
                )
            )  # fmt: skip
    return found


def _best(group: Sequence[SweepRow]) -> tuple[float, list[SweepRow], float] | None:
    """The learning rate with the best mean validation accuracy over seeds, its runs, and that accuracy."""
    seeds = {row.seed for row in group}
    best = None
    for rate in sorted({row.learning_rate for row in group}):
        runs = [row for row in group if row.learning_rate == rate and row.status != FAILED]
        if {row.seed for row in runs} != seeds:
            continue
        mean = statistics.fmean(statistics.fmean(run.accuracies("validation").values()) for run in runs)
        if best is None or mean > best[2]:
            best = rate, runs, mean
    return best


SUMMARY_NOTE = (
    "± one standard deviation over seeds, on the test sequences, at the learning rate with the best mean over seeds on "
    "the validation sequences (*: the lowest or highest that was tried). A run that was not finite counts as 0"
)


def summary_table(summaries: Sequence[SweepSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: accuracy in per cent by number of pairs, and what each model keeps."""
    numbers = sorted({row.pairs for row in summaries if row.pairs is not None})
    mixtures = len({row.trained_pairs for row in summaries}) > 1
    header = ["model", "width", *(["trained on"] if mixtures else []), "levels", "state"]
    header += ["rate", "seeds", *(f"{number} pairs" for number in numbers), "mean"]
    lines = []
    cells = {(row.model, row.width, row.trained_pairs, row.pairs): row for row in summaries}
    for row in (row for row in summaries if row.pairs is None):
        line = [row.model, str(row.width), *([row.trained_pairs] if mixtures else []), str(row.num_levels or "–")]
        line.append(plots.format_bytes(row.state_bytes + row.kv_cache_bytes))
        line.append(f"{row.learning_rate:g}{'*' if row.at_edge else ''}")
        line.append(str(row.seeds) if not row.diverged else f"{row.seeds} ({row.diverged} not finite)")
        for number in (*numbers, None):
            cell = cells.get((row.model, row.width, row.trained_pairs, number))
            line.append("–" if cell is None else _percent(cell))
        lines.append(line)
    return header, lines


def _percent(row: SweepSummary) -> str:
    deviation = row.standard_deviation
    return f"{100 * row.accuracy:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def plot(summaries: Sequence[SweepSummary]) -> Figure:
    """A row of panels for each training task: accuracy by number of pairs at each width, and against what is kept."""
    tasks = list(dict.fromkeys(row.trained_pairs for row in summaries))
    widths = sorted({row.width for row in summaries})
    names = list(dict.fromkeys(row.model for row in summaries))
    with plots.style():
        figure, axes = plots.new_figure(len(tasks), len(widths) + 1, width=3.8, height=3.4)
        for number, task in enumerate(tasks):
            own = [row for row in summaries if row.trained_pairs == task]
            panels = axes[number * (len(widths) + 1) : (number + 1) * (len(widths) + 1)]
            for axis, width in zip(panels, widths, strict=False):
                series = []
                for index, name in enumerate(names):
                    line = [row for row in own if (row.model, row.width) == (name, width) and row.pairs is not None]
                    series.append(_series(name, index, [float(row.pairs or 0) for row in line], line))
                plots.draw_series(axis, series)
                plots.token_axis(axis, [row.pairs for row in own if row.pairs is not None], "key-value pairs")
                axis.set_title(f"width {width}")
            series = []
            for index, name in enumerate(names):
                line = [row for row in own if row.model == name and row.pairs is None]
                series.append(_series(name, index, [row.state_bytes + row.kv_cache_bytes for row in line], line))
            plots.draw_series(panels[-1], series)
            panels[-1].set_xscale("log", base=2)
            panels[-1].xaxis.set_major_locator(LogLocator(base=2, numticks=5))
            panels[-1].xaxis.set_major_formatter(lambda value, _: plots.format_bytes(value))
            panels[-1].set_xlabel("state per sequence (float32)")
            panels[-1].set_title("mean, by state")
            for axis in panels:
                axis.set_ylim(-3, 103)
            panels[0].set_ylabel("queries answered right (%; bars: ± 1 s.d.)")
        plots.legend_below(figure, axes[0])
    return figure


def _series(name: str, index: int, x: Sequence[float], rows: Sequence[SweepSummary]) -> plots.Series:
    return plots.Series(
        name,
        x,
        [100 * row.accuracy for row in rows],
        error=[100 * (row.standard_deviation or 0.0) for row in rows],
        colour=index,
        marker=index,
    )
