"""The page of results: drawn from rows, and nothing on it that is not in them but the words of the experiments' files.

For every file of an experiment whose rows are there, `experiments/NAME.yaml` and `benchmarks/NAME/`, the page has a
section: tables of means and standard deviations over seeds, plots, and for every pair of twins whether they differ by
more than seeds do. Experiments without rows are not on it.

Twins are models whose options differ in the number of levels alone. A seed is one initialization and one order of the
data, which both twins have; what is judged is their difference seed by seed: it is larger than the spread of seeds if
the 95 % interval of its mean (Student's t, as many values as seeds) leaves out zero. With two or three seeds that is a
hard test, which is what few seeds are worth.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loglinear import plots
from loglinear.bench.report import markdown
from loglinear.data.recall import RecallTask
from loglinear.evals import comparison, sweep, sweep_summary
from loglinear.evals.comparison import ComparisonConfig, ComparisonRow, ComparisonRun
from loglinear.evals.needle import NeedleCell
from loglinear.evals.needle import plot as plot_needles
from loglinear.evals.position_loss import student_quantile
from loglinear.evals.sweep import SweepConfig, SweepRow
from loglinear.train.reporting import duration

FIGURES = "figures/results"  # beside the page
FIRST_SHOWN = 128  # positions below are in the plot alone


# ----------------------------------------------------------------------------------------------------
# Twins, and whether they differ
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A log-linear model minus its linear twin, by seeds that both have: the mean, its standard deviation over seeds,
    and the 95 % interval of the mean (None with one seed).
    """

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, log_linear: Mapping[int, float], linear: Mapping[int, float]) -> "Difference | None":
        """By values of each seed; None where no seed is in both."""
        values = [log_linear[seed] - linear[seed] for seed in log_linear if seed in linear]
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.deviation is None:
            return None
        reach = student_quantile(self.seeds - 1) * self.deviation / math.sqrt(self.seeds)
        return self.mean - reach, self.mean + reach

    @property
    def clear(self) -> bool:
        """Whether it is larger than the spread of seeds."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def verdict(difference: Difference | None, what: str, unit: str, decimals: int, higher_is_better: bool) -> str:
    """A sentence: how log-linear differs from linear in `what`, and whether that is more than seeds differ.

    >>> verdict(Difference(0.02, 0.01, 3), "loss", "nats", 3, higher_is_better=False)
    'loss: +0.020 nats (95 % interval over 3 seeds −0.005 to +0.045): not larger than the spread of seeds.'
    """
    if difference is None:
        return f"{what}: no seed of both has been measured."
    number = f"{what}: {_signed(difference.mean, decimals)} {unit}".rstrip()
    if difference.mean == 0 and difference.deviation == 0:
        return f"{what}: none with any of {difference.seeds} seeds."
    if difference.interval is None:
        return f"{number}, of one seed, which says nothing of how much seeds differ."
    low, high = (_signed(end, decimals) for end in difference.interval)
    told = f"{number} (95 % interval over {difference.seeds} seeds {low} to {high}): "
    if not difference.clear:
        return told + "not larger than the spread of seeds."
    better = (difference.mean > 0) == higher_is_better
    return told + f"larger than the spread of seeds, log-linear is {'better' if better else 'worse'}."


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def twins(models: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs (linear, log-linear) of models whose options differ in `num_levels` alone."""

    def rest(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if name != "num_levels"}

    return [
        (linear, other)
        for linear, other in itertools.permutations(models, 2)
        if models[linear].get("num_levels") == 1
        and models[other].get("num_levels") != 1
        and models[other].get("mixer") != "attention"
        and rest(models[linear]) == rest(models[other])
    ]


def _plus_minus(values: Sequence[float], decimals: int) -> str:
    """Mean and, of several, standard deviation."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{decimals}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{decimals}f}"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# ----------------------------------------------------------------------------------------------------
# Associative recall
# ----------------------------------------------------------------------------------------------------


def recall_section(file: Path, config: SweepConfig, rows: Sequence[SweepRow], output: Path) -> str:
    """A section on a sweep; its plot goes into `output`."""
    wanted = {run.key: number for number, run in enumerate(config.runs())}
    newest = {row.key: row for row in rows if row.key in wanted}  # of what was run again
    rows = sorted(newest.values(), key=lambda row: wanted[row.key])  # not as they ended
    done = {row.key for row in rows if row.status != sweep.FAILED}
    summaries = sweep_summary.summarize(rows)
    task = config.runs()[0].task
    training = config.runs()[0].training
    parts = [f"## {config.title or file.stem}", *([config.about.strip()] if config.about else [])]
    parts.append(
        f"{task.length:,} tokens, {', '.join(map(str, task.pairs))} pairs{_later(task)}, vocabulary of "
        f"{task.vocabulary:,}; "
        f"{training.steps:,} steps of {training.rows} sequences; learning rates "
        f"{', '.join(f'{rate:g}' for rate in config.learning_rates)}; {len(config.seeds)} seeds; "
        f"{config.test_sequences:,} test sequences of each number of pairs. {_done(len(done), len(wanted))}"
    )
    if summaries:
        header, lines = sweep_summary.summary_table(summaries)
        if config.paper:
            header.append("in the paper")
            lines = [[*line, config.paper.get(line[0], {}).get(int(line[1]), "–")] for line in lines]
        parts += [markdown(header, lines), f"Per cent of queries answered right, {sweep_summary.SUMMARY_NOTE}."]
        figure = plots.save(sweep_summary.plot(summaries), output / f"{file.stem}.png")
        parts.append(f"![accuracy by number of pairs]({FIGURES}/{figure.name})")
        parts += _recall_verdicts(config, rows, summaries)
        parts += _recall_levels(rows, summaries)
    parts += _diverged([(row.model, f"width {row.width}, rate {row.learning_rate:g}, seed {row.seed}", row.message)
                        for row in rows if row.status == sweep.DIVERGED])  # fmt: skip
    failed = {(row.model, row.width, row.message): row.key for row in rows if row.status == sweep.FAILED}
    lines = [f"{model}, width {width}: {what}" for (model, width, what), key in failed.items() if key not in done]
    if lines:
        parts += ["Runs that failed, which the same command tries again:", _bullets(lines)]
    if config.conclusion:
        parts.append(config.conclusion.strip())
    if not rows:
        return "\n\n".join(parts)
    seconds = sum(row.seconds / row.together for row in rows)
    command, took = f"loglinear sweep {file} --output benchmarks/{file.stem}", "Groups of runs, added up, took"
    parts.append(_repeat(command, took, seconds, rows))
    return "\n\n".join(parts)


def _later(task: RecallTask) -> str:
    """Which numbers of pairs come into the training later, and when."""
    later: dict[float, list[str]] = {}
    for pairs, begin in zip(task.pairs, task.begins or (), strict=False):
        later.setdefault(begin, []).append(str(pairs))
    lines = [f"{' and '.join(pairs)} after {begin:.0%}" for begin, pairs in sorted(later.items()) if begin > 0]
    return f" ({', '.join(lines)} of the steps)" if lines else ""


def _recall_verdicts(
    config: SweepConfig, rows: Sequence[SweepRow], summaries: Sequence[sweep_summary.SweepSummary]
) -> list[str]:
    chosen = {(one.model, one.width, one.trained_pairs): one.learning_rate for one in summaries}
    options = {model.name: {**model.options, "times_width": model.times_width} for model in config.sweep_models()}

    def by_seed(model: str, width: int, pairs: str, most: int | None) -> dict[int, float]:
        rate = chosen.get((model, width, pairs))
        return {
            row.seed: 100 * (statistics.fmean(accuracies.values()) if most is None else accuracies[most])
            for row, accuracies in ((row, row.accuracies("test")) for row in rows)
            if (row.model, row.width, row.pairs, row.learning_rate) == (model, width, pairs, rate)
            and row.status != sweep.FAILED
        }

    lines = []
    for linear, log_linear in twins(options):
        for width, pairs in dict.fromkeys((one.width, one.trained_pairs) for one in summaries):
            numbers = [int(number) for number in pairs.split()]
            for most in (None, max(numbers))[: len(numbers)]:
                found = [by_seed(model, width, pairs, most) for model in (log_linear, linear)]
                what = f"{log_linear} minus {linear}, width {width}" + (f", {most} pairs" if most else "")
                lines.append(verdict(Difference.of(*found), what, "points", 1, higher_is_better=True))
    said = "Twins, in the mean over numbers of pairs and with the most of them, each at its own learning rate:"
    return [said, _bullets(lines)] if lines else []


def _recall_levels(rows: Sequence[SweepRow], summaries: Sequence[sweep_summary.SweepSummary]) -> list[str]:
    """What the levels are used for, at the chosen rates, as far as that was measured."""
    shown: list[tuple[list[str], list[dict[int, float]]]] = []
    several = len({one.trained_pairs for one in summaries}) > 1
    for chosen in dict.fromkeys((one.model, one.width, one.trained_pairs, one.learning_rate) for one in summaries):
        own = [row for row in rows if (row.model, row.width, row.pairs, row.learning_rate) == chosen]
        if found := [row.levels("shares") for row in own if row.level_shares]:
            shown.append(([str(cell) for cell in chosen[: 2 + several]], found))
    if not shown:
        return []
    levels = range(1 + max(level for _, found in shown for one in found for level in one))
    lines = [
        [*which, *(_plus_minus([100 * one[level] for one in found if level in one], 1) for level in levels)]
        for which, found in shown
    ]
    header = ["model", "width", *(["trained on"] if several else []), *(f"level {level}" for level in levels)]
    note = (
        "Share of the operator's output (%) by level, mean over layers, heads and tokens of "
        f"{sweep.LEVEL_SEQUENCES} test sequences with the most pairs, ± one standard deviation over seeds."
    )
    return [markdown(header, lines), note]


# ----------------------------------------------------------------------------------------------------
# Language models
# ----------------------------------------------------------------------------------------------------

Where = tuple[str, int | None, int | None, float | None]


class _Values:
    """Numbers of a comparison by model, metric and place: a value of each seed."""

    def __init__(self, rows: Sequence[ComparisonRow]):
        self.rows = rows
        self._found: dict[tuple[str, str, Where], dict[int, float]] = {}
        for row in rows:
            if row.value is not None and row.status == comparison.FINISHED:
                where = (row.task, row.position, row.until, row.depth)
                self._found.setdefault((row.model, row.metric, where), {})[row.seed] = row.value

    def of(
        self,
        model: str,
        metric: str,
        position: int | None = None,
        until: int | None = None,
        task: str = "",
        depth: float | None = None,
    ) -> dict[int, float]:
        return self._found.get((model, metric, (task, position, until, depth)), {})

    def mean(self, model: str, metric: str, **where: Any) -> float | None:
        values = self.of(model, metric, **where).values()
        return statistics.fmean(values) if values else None

    def places(self, metric: str) -> list[Where]:
        """Where a metric was measured, in order."""
        found = {where for _, name, where in self._found if name == metric}
        return sorted(
            found, key=lambda where: (where[0], where[1] or 0, where[2] or 0, where[3] is not None, where[3] or 0)
        )

    def over(self, model: str, metric: str, places: Sequence[Where], weights: Sequence[float]) -> dict[int, float]:
        """Weighted mean over places, by seed; of seeds that have them all."""
        columns = [self._found.get((model, metric, where), {}) for where in places]
        seeds = set.intersection(*(set(column) for column in columns)) if columns else set()
        return {
            seed: sum(weight * column[seed] for weight, column in zip(weights, columns, strict=True)) / sum(weights)
            for seed in sorted(seeds)
        }


def language_section(file: Path, config: ComparisonConfig, rows: Sequence[ComparisonRow], output: Path) -> str:
    """A section on a comparison; its plots go into `output`."""
    wanted = {run.key for run in config.runs()}
    rows = [row for row in rows if row.key in wanted]
    all_ends, tuning = [row for row in rows if _has_ended(row)], _tuning_parts(config, rows)
    chosen_rows = _of_chosen_rates(config, rows)
    ends = [row for row in chosen_rows if _has_ended(row)]
    values, training = _Values(chosen_rows), config.training(config.seeds[0])
    models = [name for name in config.models if any(row.model == name for row in ends)]
    pairs = [pair for pair in twins(config.models) if set(pair) <= set(models)]
    trained = training.sequence_length
    assert training.steps is not None
    tokens = training.steps * training.rows * training.accumulation * trained
    parts = [f"## {config.title or file.stem}", *([config.about.strip()] if config.about else [])]
    share = f"; {config.needles.share:.0%} of the tokens are texts with needles" if config.needles.share else ""
    kind = "bytes" if training.tokenizer == "bytes" else f"of the tokenizer {training.tokenizer}"
    rates = f"learning rate {training.learning_rate:g} for all" if not tuning else "learning rates below"
    parts.append(
        f"Trained on {tokens:,} tokens ({kind}) at {trained:,} tokens a row{share}; {rates}. "
        f"{_corpus(rows, training.data)} {_done(len(all_ends), len(wanted))}"
    )
    if not ends:
        return "\n\n".join(parts)
    sharing = {row.key: row.count or 1 for row in rows if row.metric == "tokens_per_second"}
    most = max((sharing.get(row.key, 1) for row in ends), default=1)
    shared = f" Up to {most} runs shared a device, and its speed." if most > 1 else ""
    parts += tuning
    parts += ["### Loss and cost", markdown(*_cost_table(values, models)), _COST_NOTE + shared]
    seconds = sum((row.value or 0.0) / sharing.get(row.key, 1) for row in all_ends)
    command, took = f"loglinear compare {file} --output benchmarks/{file.stem}", "Took, added up over devices,"
    repeat = _repeat(command, took, seconds, all_ends)
    if config.cost_only:
        return "\n\n".join([*parts, *([config.conclusion.strip()] if config.conclusion else []), repeat])
    parts += ["### Loss by position", markdown(*_position_table(values, models)), "Nats per token, mean ± standard "
              "deviation over seeds, on the same held-out documents."]  # fmt: skip
    figure = plots.save(_plot_positions(values, models, pairs, trained), output / f"{file.stem}-positions.png")
    parts.append(f"![loss by position; dotted: the trained length]({FIGURES}/{figure.name})")
    places = values.places("position_loss")
    widths = [(until or 0) - (position or 0) for _, position, until, _ in places]
    chosen = [
        ("held-out loss", None),
        (f"loss at positions {trained // 2:,} to {trained:,}", lambda place: place[1] == trained // 2),
        (f"loss beyond {trained:,}", lambda place: (place[1] or 0) >= trained),
    ]
    lines = []
    for (linear, log_linear), (what, inside) in itertools.product(pairs, chosen):
        found = [
            values.of(model, "held_out_loss") if inside is None else _restricted(values, model, places, widths, inside)
            for model in (log_linear, linear)
        ]
        lines.append(verdict(Difference.of(*found), f"{log_linear} minus {linear}, {what}", "nats", 4, False))
    parts += [_bullets(lines)] if lines else []
    parts += _needle_parts(file, config, values, models, pairs, trained, output)
    parts += _level_parts(file, values, models, output)
    parts += _diverged(
        [(row.model, f"seed {row.seed}", row.detail) for row in ends if row.status == comparison.DIVERGED]
    )
    if config.conclusion:
        parts.append(config.conclusion.strip())
    parts.append(repeat)
    return "\n\n".join(parts)


def _has_ended(row: ComparisonRow) -> bool:
    return row.metric == "run" and row.status != comparison.FAILED


def _of_chosen_rates(config: ComparisonConfig, rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    rates = {model: config.best_rate(model, rows) for model in config.models}
    chosen = {run.key for run in config.chosen_runs() if run.learning_rate == rates[run.model]}
    return [row for row in rows if row.key in chosen]


def _tuning_parts(config: ComparisonConfig, rows: Sequence[ComparisonRow]) -> list[str]:
    """What is known of learning rates, if there are several."""
    if not config.learning_rates:
        return []
    losses = {row.key: row.value for row in rows if row.metric == "held_out_loss" and row.value is not None}
    statuses = {row.key: row.status for row in rows if row.metric == "run"}
    rates, first = sorted(config.learning_rates), config.seeds[0]
    lines, better = [], []
    for model in config.models:
        cells, chosen, firsts = [], config.best_rate(model, rows), {}
        for rate in rates:
            seeds = config.seeds if rate in config.rates_of(model) else [first]
            keys = [ComparisonRun(config, model, seed, rate).key for seed in seeds]
            found = [losses[key] for key in keys if key in losses]
            if keys[0] in losses:
                firsts[rate] = losses[keys[0]]
            if found:
                some = f" ({len(found)} of {len(keys)})" if len(found) < len(keys) else ""
                cells.append(_plus_minus(found, 4) + ("*" if rate == chosen else "") + some)
            else:
                status = statuses.get(keys[0], "missing")
                cells.append("–" if status == comparison.FINISHED else status)
        lines.append([model, *cells])
        others = {rate: loss for rate, loss in firsts.items() if rate not in config.rates_of(model)}
        if chosen in firsts and others and others[best := min(others, key=others.__getitem__)] < firsts[chosen]:
            better.append(f"{model} ({best:g})")
    note = (
        f"Held-out loss by learning rate, nats per token: of seed {first}, and as mean ± standard deviation where all "
        "seeds were trained (of how many of them, where some are missing or not finite). *: the rate of the model "
        "everywhere below"
    )
    if any(len(config.rates_of(model)) > 1 for model in config.models):
        note += ", of those with all seeds the one with the lowest mean"
    note += "."
    if config.chosen_rates:
        note += (
            " It was chosen by these losses, which are of the same documents and runs as below: where twins have rates "
            "of their own, their differences are between each at its own."
        )
    if better:
        note += f" With seed {first} the loss is lower at another one: {', '.join(better)}."
    return ["### Learning rates", markdown(["model", *(f"{rate:g}" for rate in rates)], lines), note]


def _restricted(
    values: _Values, model: str, places: Sequence[Where], widths: Sequence[int], inside: Callable[[Where], bool]
) -> dict[int, float]:
    kept = [(place, width) for place, width in zip(places, widths, strict=True) if inside(place)]
    return (
        values.over(model, "position_loss", [place for place, _ in kept], [width for _, width in kept]) if kept else {}
    )


def comparison_table(config: ComparisonConfig, rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: loss and cost of each model that has been measured."""
    rows = _of_chosen_rates(config, rows)
    measured = {row.model for row in rows if row.metric == "held_out_loss"}
    return _cost_table(_Values(rows), [name for name in config.models if name in measured])


_COST_NOTE = (
    "Mean ± standard deviation over seeds. Held-out loss in nats per token up to the trained length; tokens per second "
    "and peak memory of the training; state: what is kept of a sequence of the trained length, recurrent states in "
    "float32 with all levels as allocated (in use on average), keys and values in bfloat16."
)


def _cost_table(values: _Values, models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "parameters", "seeds", "held-out loss", "tokens/s", "memory", "state (in use)"]
    lines = []
    for model in models:
        memory = values.mean(model, "memory_bytes")
        speed, state = values.mean(model, "tokens_per_second"), values.mean(model, "state_bytes") or 0.0
        cache, used = values.mean(model, "kv_cache_bytes") or 0.0, values.mean(model, "occupied_state_bytes") or 0.0
        kept = plots.format_bytes(cache) if not state else f"{plots.format_bytes(state)} ({plots.format_bytes(used)})"
        losses = values.of(model, "held_out_loss")
        lines.append(
            [
                model,
                f"{values.mean(model, 'parameters') or 0:,.0f}",
                str(len(losses)),
                _plus_minus([*losses.values()], 4),
                "–" if speed is None else f"{speed:,.0f}",
                "–" if memory is None else plots.format_bytes(memory),
                kept,
            ]
        )
    return header, lines


def _position_table(values: _Values, models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    places = [place for place in values.places("position_loss") if (place[1] or 0) >= FIRST_SHOWN]
    header = ["model", *(f"{position:,} … {(until or 0) - 1:,}" for _, position, until, _ in places)]
    return header, [
        [model, *(_plus_minus([*values.of(model, "position_loss", p, u).values()], 3) for _, p, u, _ in places)]
        for model in models
    ]


def _plot_positions(values: _Values, models: Sequence[str], pairs: Sequence[tuple[str, str]], trained: int) -> Figure:
    places = values.places("position_loss")
    middles = {place: ((place[1] or 0) + (place[2] or 0)) / 2 for place in places}

    def line(name: str, index: int, found: Mapping[Where, Sequence[float]]) -> plots.Series:
        kept = [place for place in places if found[place]]
        mean = [statistics.fmean(found[place]) for place in kept]
        spread = [statistics.stdev(found[place]) if len(found[place]) > 1 else 0.0 for place in kept]
        low = [value - width for value, width in zip(mean, spread, strict=True)]
        high = [value + width for value, width in zip(mean, spread, strict=True)]
        x = [middles[place] for place in kept]
        return plots.Series(name, x, mean, low=low, high=high, colour=index, marker=index)

    def by_place(model: str) -> dict[Where, dict[int, float]]:
        return {place: values.of(model, "position_loss", place[1], place[2]) for place in places}

    with plots.style():
        figure, axes = plots.new_figure(1, 2 if pairs else 1, width=5.6, height=3.8)
        lines = [
            line(model, index, {place: [*found.values()] for place, found in by_place(model).items()})
            for index, model in enumerate(models)
        ]
        plots.draw_series(axes[0], lines)
        axes[0].set_ylabel("loss (nats per token)")
        beyond = _cut_off_above(axes[0], lines, trained)
        axes[0].set_title(f"Held-out documents ({beyond})" if beyond else "Held-out documents")
        if pairs:
            axes[1].axhline(0, color="#555555", linewidth=1)
            lines = []
            for linear, other in pairs:
                ours, theirs = by_place(other), by_place(linear)
                both = {p: [ours[p][seed] - theirs[p][seed] for seed in ours[p] if seed in theirs[p]] for p in places}
                lines.append(line(f"{other} − {linear}", models.index(other), both))
            plots.draw_series(axes[1], lines)
            axes[1].set_title("Log-linear minus linear, by seed")
        for axis in axes:
            plots.token_axis(axis, [place[2] or 0 for place in places], "position (tokens; bands: ± 1 s.d. over seeds)")
            axis.axvline(trained, color="#555555", linewidth=1, linestyle=":")
        plots.legend_below(figure, axes[0])
    return figure


def _cut_off_above(axis: Axes, lines: Sequence[plots.Series], trained: int) -> str:
    """Lets lines leave the axis that go far above what all of them reach up to the trained length, for the others could
    not be told apart otherwise; which do, and how far, or nothing."""
    usual = [y for line in lines for x, y in zip(line.x, line.y, strict=True) if x <= trained]
    low, high = min(usual, default=0.0), max(usual, default=0.0)
    gone = [line for line in lines if usual and max(line.y) > high + 2 * (high - low)]
    if gone:
        margin = 0.1 * (high - low)
        axis.set_ylim(min(min(line.y) for line in lines) - margin, high + 2 * margin)
    return ", ".join(f"{line.name} reaches {max(line.y):.1f}" for line in gone)


def _needle_parts(
    file: Path,
    config: ComparisonConfig,
    values: _Values,
    models: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    trained: int,
    output: Path,
) -> list[str]:
    whole = [place for place in values.places("needle") if place[3] is None]
    if not whole:
        return []
    needles = config.needles
    lengths = sorted({place[1] or 0 for place in whole})
    drills = ""
    if needles.drill_share:
        sizes = ", ".join(f"{length:,}" for length in needles.drill_lengths)
        drills = f" {needles.drill_share:.0%} of the tokens of such texts are drills of {sizes} tokens."
    parts = [
        "### Needles",
        f"{needles.samples * len(needles.depths)} samples of each task and length, at {len(needles.depths)} depths. "
        f"Trained on {', '.join(needles.train_tasks) or 'none'} in texts of "
        f"{', '.join(f'{length:,}' for length in needles.train_lengths) or 'no'} tokens.{drills}",
    ]
    for metric, what, decimals, factor in (
        ("needle", "Exact answers (%)", 0, 100.0),
        ("needle_loss", "Loss of the right answer (nats per token)", 2, 1.0),
    ):
        lines = []
        for task, model in itertools.product(needles.tasks, models):
            cells = [values.of(model, metric, length, task=task) for length in lengths]
            shown = [_plus_minus([factor * value for value in cell.values()], decimals) for cell in cells]
            lines.append([task, model, *shown])
        header = ["task", "model", *(plots.format_tokens(length) for length in lengths)]
        parts += [markdown(header, lines), f"{what}, mean ± standard deviation over seeds."]
    cells = [
        NeedleCell(model, task, position or 0, depth, value, None, 0.0, 0)
        for model in models
        for task, position, _, depth in values.places("needle")
        if (value := values.mean(model, "needle", position=position, task=task, depth=depth)) is not None
    ]
    figure = plots.save(plot_needles(cells), output / f"{file.stem}-needles.png")
    parts.append(f"![exact answers by depth and length, mean over seeds]({FIGURES}/{figure.name})")
    lines = []
    for (linear, other), task in itertools.product(pairs, needles.tasks):
        for what, chosen in (
            (f"up to {trained:,} tokens", [length for length in lengths if length <= trained]),
            (f"beyond {trained:,} tokens", [length for length in lengths if length > trained]),
        ):
            if not chosen:
                continue
            places: list[Where] = [(task, length, None, None) for length in chosen]
            found = [
                {seed: 100 * value for seed, value in values.over(model, "needle", places, [1.0] * len(places)).items()}
                for model in (other, linear)
            ]
            name = f"{other} minus {linear}, {task}, {what}"
            lines.append(verdict(Difference.of(*found), name, "points", 1, higher_is_better=True))
    for linear, other in pairs:
        places = [(task, length, None, None) for task in needles.tasks for length in lengths if length <= trained]
        if places:
            found = [values.over(model, "needle_loss", places, [1.0] * len(places)) for model in (other, linear)]
            name = f"{other} minus {linear}, loss of the right answer, all tasks up to {trained:,} tokens"
            lines.append(verdict(Difference.of(*found), name, "nats", 3, higher_is_better=False))
    return [*parts, _bullets(lines)] if lines else parts


def _level_parts(file: Path, values: _Values, models: Sequence[str], output: Path) -> list[str]:
    shown = [model for model in models if values.of(model, "level_share", 0)]
    if not shown:
        return []
    levels = [position for _, position, _, _ in values.places("level_share") if position is not None]
    header = ["model", *(f"level {level}" for level in levels)]
    lines = [
        [
            model,
            *(_plus_minus([100 * v for v in values.of(model, "level_share", level).values()], 1) for level in levels),
        ]
        for model in shown
    ]
    with plots.style():
        figure, axes = plots.new_figure(1, 2, width=5.0, height=3.4)
        for axis, (metric, title, factor) in zip(
            axes, (("level_share", "share of the output (%)", 100.0), ("level_scale", "mean λ", 1.0)), strict=True
        ):
            series = []
            for model in shown:
                x = [level for level in levels if values.of(model, metric, level)]
                found = [[factor * value for value in values.of(model, metric, level).values()] for level in x]
                error = [statistics.stdev(one) if len(one) > 1 else 0.0 for one in found]
                y, index = [statistics.fmean(one) for one in found], list(models).index(model)
                series.append(plots.Series(model, x, y, error=error, colour=index, marker=index))
            plots.draw_series(axis, series)
            axis.set_xlabel("level (bars: ± 1 s.d. over seeds)")
            axis.set_title(title)
        plots.legend_below(figure, axes[0])
    path = plots.save(figure, output / f"{file.stem}-levels.png")
    return [
        "### What the levels are used for",
        markdown(header, lines),
        "Share of the operator's output (%), mean over layers, heads and the tokens of a held-out document; level 0 is "
        "the token itself, level l holds 2^(l-1) tokens where it is filled, the last one everything older.",
        f"![share and λ by level]({FIGURES}/{path.name})",
    ]


# ----------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------


def _done(done: int, wanted: int) -> str:
    return (
        f"All {wanted} runs are done." if done == wanted else f"{done} of {wanted} runs are done; the rest is missing."
    )


def _corpus(rows: Sequence[ComparisonRow], sources: Sequence[str]) -> str:
    found = sorted({(row.detail, row.count or 0, row.value or 0.0) for row in rows if row.metric == "corpus_tokens"})
    if not found:
        return ""
    read = "; ".join(f"{tokens:,.0f} tokens of {count:,} documents ({identity})" for identity, count, tokens in found)
    warning = " Not all runs read the same texts: their losses do not compare." if len(found) > 1 else ""
    return f"Text: {', '.join(sources)}; training on {read}.{warning}"


def _diverged(runs: Sequence[tuple[str, str, str]]) -> list[str]:
    if not runs:
        return []
    lines = [f"{model}, {which}: {what}" for model, which, what in runs]
    return ["Runs that were not finite, which count as zero or are left out of means:", _bullets(lines)]


def _repeat(command: str, took: str, seconds: float, rows: Sequence[Any]) -> str:
    """How to measure it again, and what it took: `took` says what seconds are counted."""
    devices = ", ".join(sorted({row.device for row in rows if row.device}))
    versions = ", ".join(sorted({f"torch {row.torch}" for row in rows if row.torch}))
    dates = sorted({row.date[:10] for row in rows if row.date})
    when = "" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    where = f"{devices or 'an unknown device'} ({versions}; {when})"
    return f"Measured by `{command}`. {took} {duration(seconds)} (h:mm:ss or m:ss), on {where}."


def write_page(experiments: str | Path, benchmarks: str | Path, output: str | Path) -> list[Path]:
    """Writes the page and its plots, which go into `FIGURES` beside it.

    Args:
        experiments: folder of experiments' files.
        benchmarks: folder whose folders have the rows, each by the name of its experiment's file.
        output: the page, a `.md` file.

    Returns:
        The page's path, and then those of the plots.

    Raises:
        FileNotFoundError: no rows of any experiment.
        ValueError: a file of an experiment or of rows that cannot be read.
    """
    output, sections = Path(output), []
    figures = output.parent / FIGURES
    before = {path: path.stat().st_mtime_ns for path in figures.glob("*.png")}
    for file in sorted(Path(experiments).glob("*.yaml"), key=lambda file: file.stem):
        folder = Path(benchmarks) / file.stem
        if (folder / sweep.ROWS_FILE).is_file():
            rows = sweep.read_rows(folder / sweep.ROWS_FILE)
            sections.append(recall_section(file, SweepConfig.from_file(file), rows, figures))
        elif (folder / comparison.ROWS_FILE).is_file():
            found = comparison.read_rows(folder / comparison.ROWS_FILE)
            sections.append(language_section(file, ComparisonConfig.from_file(file), found, figures))
    if not sections:
        raise FileNotFoundError(f"no rows in {benchmarks} of an experiment in {experiments}")
    head = (
        "# What was measured\n\n"
        "Drawn from the rows in `benchmarks/` by `loglinear results`; figures are means ± standard deviations over "
        "seeds. Twins differ in the number of levels alone, share data, order and initial weights, and are compared "
        "seed by seed: a difference is called larger than the spread of seeds if the 95 % interval of its mean leaves "
        "out zero (Student's t over seeds). How to repeat each experiment, and how long it takes: "
        "[evaluation.md](evaluation.md#repeating-the-measurements)."
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join([head, *sections]) + "\n", encoding="utf-8")
    new = [path for path in sorted(figures.glob("*.png")) if before.get(path) != path.stat().st_mtime_ns]
    return [output, *new]
