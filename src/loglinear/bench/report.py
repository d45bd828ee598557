"""Tables and plots from rows: what `loglinear bench` prints and draws, and what can be redrawn from a CSV at
any time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from loglinear import plots
from loglinear.bench.decoding import STEPPED
from loglinear.bench.drift import DRIFT, NEWEST
from loglinear.bench.models import COMPILED, RECOMPUTED
from loglinear.bench.operators import MECHANISMS, OPERATORS
from loglinear.bench.rows import OK, Growth, Row, fit_growth, t_log_t_exponent
from loglinear.bench.worker import BOTH, FORWARD

TABLE_LENGTHS = (4_096, 16_384, 65_536, 262_144)
# Below this length a call is mostly fixed cost (launches, dispatch), which says nothing about growth.
FIT_FROM = 4_096
_FEWEST_FITTED = 3
# Index into the palette; a mechanism keeps its colour in every plot, and operators of one differ by marker.
_COLOURS = {"log-linear": 0, "FlashAttention": 1, "linear": 2, "sparse": 3, "standard": 6}


def _time(row: Row) -> float | None:
    return row.time_per_sequence_ms


def _memory(row: Row) -> float | None:
    return row.memory_per_sequence_bytes


def growth_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Growth | None:
    """The fitted growth of a value per sequence over measured lengths from `FIT_FROM` up (all of them if
    those are too few).
    """
    points = [(row.length, value(row)) for row in rows if row.status == OK]
    usable = [(length, number) for length, number in points if number is not None and number > 0]
    long = [point for point in usable if point[0] >= FIT_FROM]
    chosen = long if len(long) >= _FEWEST_FITTED else usable
    return fit_growth([length for length, _ in chosen], [number for _, number in chosen])


def _operator_order(name: str) -> tuple[int, int, str]:
    operator = OPERATORS.get(name)
    if operator is None:
        return len(MECHANISMS), 0, name
    return MECHANISMS.index(operator.mechanism), list(OPERATORS).index(name), name


class Group(NamedTuple):
    """What the rows of one table share, its operators apart. `tokens` is the constant number of tokens in a call, None
    for one sequence a call.
    """

    shape: str
    direction: str
    dtype: str
    tokens: int | None


def groups_of(rows: Iterable[Row]) -> dict[Group, dict[str, list[Row]]]:
    """Operator rows by group and operator, lengths ascending.

    A batch of one belongs to both kinds of call where a call of a constant number of tokens would hold one sequence
    anyway. A row that two numbers of tokens would have asked for belongs to both.
    """
    places: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.suite == "operators":
            places.setdefault((row.shape, row.direction, row.dtype), []).append(row)
    groups: dict[Group, dict[str, list[Row]]] = {}
    for place, found in places.items():
        rules = _tokens_per_call(found)
        for row in found:
            kinds: list[int | None] = [tokens for tokens in rules if row.batch == max(1, tokens // row.length)]
            if row.batch == 1:
                kinds.append(None)
            for tokens in kinds:
                groups.setdefault(Group(*place, tokens), {}).setdefault(row.operator, []).append(row)
    for group in groups.values():
        for operator in sorted(group, key=_operator_order):
            group[operator] = sorted(group.pop(operator), key=lambda row: row.length)
    order = sorted(groups, key=lambda group: (group.shape, group.direction, group.tokens or 0, group.dtype))
    return {group: groups[group] for group in order}


def _tokens_per_call(rows: Iterable[Row]) -> list[int]:
    """The fewest numbers of tokens a call that explain every batch of more than one, largest first.

    A row does not keep the number that it was asked for, only the `tokens // length` sequences that fitted into it: any
    number from its own tokens up to one sequence more would have given the same. The largest that a call meets exactly
    explains all rows of the largest number asked for; what it leaves is explained in the same way.
    """
    unexplained = [row for row in rows if row.batch > 1]
    found = []
    while unexplained:
        found.append(max(row.batch * row.length for row in unexplained))
        unexplained = [row for row in unexplained if found[-1] // row.length != row.batch]
    return found


def _cell(rows: Sequence[Row], length: int, value: Callable[[Row], float | None], text: Callable[[float], str]) -> str:
    found = [row for row in rows if row.length == length]
    if not found:
        return "–"
    number = value(found[-1])
    if found[-1].status == OK and number is not None:
        return text(number)
    return found[-1].status.split(":")[0].split(" at ")[0]


def comparison_table(
    group: dict[str, list[Row]], lengths: Sequence[int] = TABLE_LENGTHS
) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table people compare mechanisms by; times and memory are per sequence."""
    present = {row.length for rows in group.values() for row in rows}
    shown = [length for length in lengths if length in present]
    others = sorted(present.difference(shown))
    shown = sorted([*shown, *others[max(0, len(others) - (4 - len(shown))) :]])
    header = ["mechanism", "operator", "time grows", "memory grows"]
    header += [f"{plots.format_tokens(length)} time" for length in shown]
    header += [f"{plots.format_tokens(length)} memory" for length in shown]
    lines = []
    for name, rows in group.items():
        time_growth, memory_growth = growth_of(rows, _time), growth_of(rows, _memory)
        line = [rows[0].mechanism, name, str(time_growth or "–"), str(memory_growth or "–")]
        line += [_cell(rows, length, _time, plots.format_milliseconds) for length in shown]
        line += [_cell(rows, length, _memory, plots.format_bytes) for length in shown]
        lines.append(line)
    return header, lines


def ratio_table(group: dict[str, list[Row]]) -> tuple[list[str], list[list[str]]] | None:
    """How many times the time of log-linear the others take, by length: above 1, log-linear is faster. None
    without our own rows.
    """
    ours = next((rows for name, rows in group.items() if name.startswith("log-linear")), None)
    if ours is None:
        return None
    base = {row.length: row.time_ms / row.batch for row in ours if row.status == OK and row.time_ms is not None}
    lengths = sorted(base)
    if not lengths:
        return None
    header = [f"time over that of {ours[0].operator}", *(plots.format_tokens(length) for length in lengths)]
    lines = []
    for name, rows in group.items():
        if rows is ours:
            continue
        times = {row.length: row.time_ms / row.batch for row in rows if row.status == OK and row.time_ms is not None}
        lines.append([name, *(f"{times[n] / base[n]:.2f}" if n in times else "–" for n in lengths)])
    return header, lines


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def titles_of(groups: Iterable[Group]) -> dict[Group, str]:
    """A heading for each group; dtype and number of tokens are named where there are several."""
    groups = list(groups)
    dtypes, rules = _distinct(groups)
    titles = {}
    for group in groups:
        calls = "one sequence a call" if group.tokens is None else "a constant number of tokens a call"
        if group.tokens is not None and len(rules) > 1:
            calls = f"{group.tokens:,} tokens a call"
        dtype = [group.dtype] if len(dtypes) > 1 else []
        titles[group] = ", ".join([group.shape, group.direction, calls, *dtype])
    return titles


def _stems_of(groups: Iterable[Group]) -> dict[Group, str]:
    """The same for the name of a file."""
    groups = list(groups)
    dtypes, rules = _distinct(groups)
    stems = {}
    for group in groups:
        direction = {FORWARD: "forward", BOTH: "backward"}[group.direction]
        calls = "one" if group.tokens is None else "tokens" if len(rules) == 1 else f"{group.tokens}-tokens"
        dtype = [group.dtype] if len(dtypes) > 1 else []
        stems[group] = "-".join([group.shape, direction, calls, *dtype])
    return stems


def _distinct(groups: Sequence[Group]) -> tuple[set[str], set[int]]:
    return {group.dtype for group in groups}, {group.tokens for group in groups if group.tokens is not None}


def _versions(rows: Sequence[Row], package: str) -> str:
    """The version that most rows have, and which operators have another one."""
    counts = Counter(getattr(row, package) for row in rows)
    (usual, _), *others = counts.most_common()
    for version, _ in others:
        names = dict.fromkeys(row.operator for row in rows if getattr(row, package) == version)
        usual += f" ({version}: {', '.join(names)})"
    return usual


def to_markdown(rows: Sequence[Row]) -> str:
    """The whole result as Markdown: conditions, a table per group, ratios, and the model table."""
    if not rows:
        raise ValueError("there are no rows to report")
    newest, groups = max(rows, key=lambda row: row.date), groups_of(rows)
    where = (
        f"Measured on {newest.device}, torch {_versions(rows, 'torch')}, triton {_versions(rows, 'triton')}, Python "
        f"{newest.python}, loglinear {newest.loglinear}, {newest.date}. Times are medians"
    )
    how = (
        "; they and memory beyond the inputs are given per sequence. Growth is the fitted exponent ± its standard "
        f"error over lengths from {plots.format_tokens(FIT_FROM)} up (over all lengths where fewer than three are that "
        "long)."
    )
    parts = [where + (how if groups else ".")]
    titles = titles_of(groups)
    for place, group in groups.items():
        parts.append(f"### {titles[place]}")
        parts.append(markdown(*comparison_table(group)))
        ratios = ratio_table(group)
        if ratios is not None:
            parts.append(markdown(*ratios))
        lengths = sorted({row.length for group_rows in group.values() for row in group_rows if row.length >= FIT_FROM})
        exact = t_log_t_exponent(lengths) if len(lengths) >= _FEWEST_FITTED else None
        if exact is not None:
            span = f"{plots.format_tokens(lengths[0])} to {plots.format_tokens(lengths[-1])}"
            parts.append(f"Exact T log T growth over {span}, fitted in the same way: T^{exact:.2f}.")
        parts.extend(_not_measured(group))
    models = [row for row in rows if row.suite == "models"]
    if models:
        parts.append("### Training of whole models, tokens per second")
        parts.append(markdown(*model_table(models)))
    parts.extend(_decoding_parts(rows))
    parts.extend(_step_parts(rows))
    parts.extend(_drift_parts(rows))
    return "\n\n".join(parts) + "\n"


def _not_measured(group: dict[str, list[Row]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, rows in group.items():
        for row in rows:
            if row.status != OK:
                reasons.setdefault(f"{name}: {row.status}", []).append(plots.format_tokens(row.length))
    if not reasons:
        return []
    return ["Not measured: " + "; ".join(f"{why} ({', '.join(lengths)})" for why, lengths in reasons.items()) + "."]


def model_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: tokens per second of each preset at each length."""
    lengths = sorted({row.length for row in rows})
    header = ["preset", *(plots.format_tokens(length) for length in lengths)]
    lines = []
    for preset in dict.fromkeys(_model_name(row) for row in rows):
        found = {row.length: row for row in rows if _model_name(row) == preset}
        cells = []
        for length in lengths:
            row = found.get(length)
            if row is None:
                cells.append("–")
            elif row.tokens_per_second is None:
                cells.append(row.status.split(":")[0])
            else:
                recomputed = " (recomputed)" if RECOMPUTED in row.direction else ""
                cells.append(f"{row.tokens_per_second:,.0f}{recomputed}")
        lines.append([preset, *cells])
    return header, lines


def _decoding_parts(rows: Sequence[Row]) -> list[str]:
    """The tables of decoding models, by batch."""
    found = [row for row in rows if row.suite == "decode"]
    if not found:
        return []
    parts = [
        "### Decoding",
        "One token a step for every row of the batch, greedily chosen, at contexts that were not read: states and "
        "caches hold random numbers of the right size. A time is that of a step, averaged over positions just before "
        "and behind the context, where a log-linear state has half of its buckets occupied. Memory is what is "
        "allocated for the whole batch.",
    ]
    for batch in sorted({row.batch for row in found}):
        of_batch = [row for row in found if row.batch == batch]
        parts.append(f"Batch {batch}, tokens per second (time of a step):")
        parts.append(markdown(*decoding_table(of_batch)))
        parts.append(f"Batch {batch}, bytes of state or cache (of occupied buckets alone):")
        parts.append(markdown(*cache_table(of_batch)))
    by_preset = {preset: [row for row in found if row.operator == preset] for preset in _names(found)}
    return parts + _not_measured(by_preset)


def _step_parts(rows: Sequence[Row]) -> list[str]:
    """The table of the operator's step."""
    found = [row for row in rows if row.suite == "steps"]
    if not found:
        return []
    parts = [
        "### The step of the operator",
        "Time of `log_linear_attention_step` alone, and which share of the rate of copying it reaches with the fewest "
        "bytes that it must move (occupied buckets read; written the merged one, by the delta rule all, with a window "
        "all once in a window).",
        markdown(*step_table(found)),
    ]
    shapes = dict.fromkeys(row.shape for row in found)
    return parts + _not_measured({shape: [row for row in found if row.shape == shape] for shape in shapes})


def _drift_parts(rows: Sequence[Row]) -> list[str]:
    """The table of errors over many steps."""
    found = [row for row in rows if row.suite == DRIFT]
    if not found:
        return []
    return [
        "### Errors of many steps",
        f"Relative error of the outputs of the newest {NEWEST:,} tokens against float64 steps on the same numbers, by "
        "how states are kept and how far the log-decays of a token go.",
        markdown(*drift_table(found)),
    ]


def drift_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: error after so many tokens, by how states are kept and by decays."""
    lengths = sorted({row.length for row in rows})
    lines = []
    for place in dict.fromkeys((row.operator, row.direction) for row in rows):
        found = {row.length: row.error for row in rows if (row.operator, row.direction) == place}
        errors = (found.get(length) for length in lengths)
        lines.append([*place, *("–" if error is None else f"{error:.1e}" for error in errors)])
    return ["states", "tokens", *(f"{length:,}" for length in lengths)], lines


def _names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.operator for row in rows))


def decoding_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: tokens per second and the time of a step, of each preset at each context, for one batch."""

    def text(row: Row) -> str:
        assert row.tokens_per_second is not None and row.time_ms is not None
        return f"{row.tokens_per_second:,.0f} ({plots.format_milliseconds(row.time_ms)})"

    return _by_context(rows, text)


def cache_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: bytes of state or cache, allocated and (in brackets) of occupied buckets."""

    def text(row: Row) -> str:
        allocated = "–" if row.cache_bytes is None else plots.format_bytes(row.cache_bytes)
        return allocated if row.occupied_bytes is None else f"{allocated} ({plots.format_bytes(row.occupied_bytes)})"

    return _by_context(rows, text)


def _by_context(rows: Sequence[Row], text: Callable[[Row], str]) -> tuple[list[str], list[list[str]]]:
    contexts = sorted({row.length for row in rows})
    lines = []
    for preset in _names(rows):
        found = {row.length: row for row in rows if row.operator == preset}
        cells = ["–" if n not in found else _measured(found[n], text) for n in contexts]
        lines.append([preset, *cells])
    return ["preset", *(plots.format_tokens(context) for context in contexts)], lines


def _measured(row: Row, text: Callable[[Row], str]) -> str:
    return text(row) if row.status == OK else row.status.split(":")[0]


def step_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: time of a step and share of the copying rate, by shape, position and batch."""

    def text(row: Row) -> str:
        assert row.time_ms is not None
        share = "" if row.bandwidth_share is None else f" ({row.bandwidth_share:.0%})"
        return plots.format_milliseconds(row.time_ms) + share

    batches = sorted({row.batch for row in rows})

    def name(row: Row) -> str:
        return row.shape + row.operator.removeprefix(STEPPED)

    found = {(name(row), row.length, row.batch): row for row in rows}
    lines = []
    for shape, length in sorted({(name(row), row.length) for row in rows}):
        cells = [found.get((shape, length, batch)) for batch in batches]
        texts = ["–" if row is None else _measured(row, text) for row in cells]
        lines.append([shape, plots.format_tokens(length), *texts])
    return ["shape", "position", *(f"batch {batch}" for batch in batches)], lines


def _model_name(row: Row) -> str:
    return f"{row.operator}, {COMPILED}" if COMPILED in row.direction else row.operator


def _series(group: dict[str, list[Row]], value: Callable[[Row], float | None], quartiles: bool) -> list[plots.Series]:
    series = []
    for name, rows in group.items():
        points = [(row, number) for row in rows if row.status == OK and (number := value(row))]
        if not points:
            continue
        low = high = None
        if quartiles:
            low = [(row.time_low_ms or number * row.batch) / row.batch for row, number in points]
            high = [(row.time_high_ms or number * row.batch) / row.batch for row, number in points]
        series.append(
            plots.Series(
                name,
                [row.length for row, _ in points],
                [number for _, number in points],
                low=low,
                high=high,
                dashed=points[0][0].mechanism in ("standard", "FlashAttention", "sparse"),
                colour=_COLOURS.get(points[0][0].mechanism),
                marker=len(series),
            )
        )
    return series


def plot_group(group: dict[str, list[Row]], title: str, device: str) -> Figure:
    """Time and memory against length, log-log, one line per operator; the band is the first to third
    quartile.
    """
    with plots.style():
        figure, (left, right) = plots.new_figure(1, 2, width=4.6, height=3.8)
        for axis, value, label, text in (
            (left, _time, "time per sequence", plots.format_milliseconds),
            (right, _memory, "peak memory per sequence", plots.format_bytes),
        ):
            lines = _series(group, value, quartiles=value is _time)
            plots.draw_series(axis, lines)
            plots.token_axis(axis, [x for line in lines for x in line.x])
            axis.set_yscale("log", base=10 if value is _time else 2)
            plots.unit_axis(axis, text)
            axis.set_ylabel(label)
        figure.suptitle(title, x=0.01, ha="left", fontsize="large", fontweight="bold")  # wider than its axes
        right.set_title(device, fontsize=8, loc="right", fontweight="normal", color="#555555")
        plots.legend_outside(right if right.get_legend_handles_labels()[0] else left)
    return figure


def plot_models(rows: Sequence[Row]) -> Figure:
    """Training tokens per second against length, one line per preset."""
    with plots.style():
        figure, (axis,) = plots.new_figure()
        lines = []
        for preset in dict.fromkeys(_model_name(row) for row in rows):
            points = [(r.length, r.tokens_per_second) for r in rows if _model_name(r) == preset and r.tokens_per_second]
            if points:
                lines.append(plots.Series(preset, [length for length, _ in points], [speed for _, speed in points]))
        plots.draw_series(axis, lines)
        plots.token_axis(axis, [x for line in lines for x in line.x], "training length (tokens)")
        plots.plain_axis(axis)
        axis.set_ylabel("training speed (tokens per second)")
        axis.set_ylim(bottom=0)
        axis.set_title(f"Training on {rows[0].device}")
        plots.legend_outside(axis)
    return figure


def plot_decoding(rows: Sequence[Row], of_cache: bool) -> Figure:
    """Tokens per second, or bytes of state or cache, against context: a panel for each batch, a line for each preset.
    A preset keeps its colour however its states are kept: that is the marker. Bytes of occupied buckets are dashed."""
    batches = sorted({row.batch for row in rows})
    presets = _names(rows)
    # "preset, how its states are kept", or "preset" alone
    colours = list(dict.fromkeys(preset.partition(", ")[0] for preset in presets))
    markers = list(dict.fromkeys(["", *(preset.partition(", ")[2] for preset in presets)]))
    with plots.style():
        figure, axes = plots.new_figure(1, len(batches), width=4.8, height=3.8)
        for axis, batch in zip(axes, batches, strict=True):
            lines = []
            for preset in presets:
                model, _, kept = preset.partition(", ")
                colour, marker = colours.index(model), markers.index(kept)
                found = sorted(
                    (row for row in rows if row.operator == preset and row.batch == batch), key=lambda row: row.length
                )
                values = {
                    preset: [(r.length, r.cache_bytes if of_cache else r.tokens_per_second) for r in found],
                    f"{preset}, occupied": [(r.length, r.occupied_bytes) for r in found if of_cache],
                }
                for name, pairs in values.items():
                    points = [(x, y) for x, y in pairs if y is not None]
                    x, y = [x for x, _ in points], [y for _, y in points]
                    if points:
                        lines.append(plots.Series(name, x, y, dashed=name != preset, colour=colour, marker=marker))
            plots.draw_series(axis, lines)
            plots.token_axis(axis, [x for line in lines for x in line.x], "context (tokens)")
            axis.set_yscale("log", base=2 if of_cache else 10)
            plots.unit_axis(axis, plots.format_bytes if of_cache else lambda value: f"{value:,.0f}")
            axis.set_ylabel("state or cache" if of_cache else "tokens per second")
            axis.set_title(f"batch {batch}")
        axes[-1].text(1, 1.02, rows[0].device, transform=axes[-1].transAxes, fontsize=8, ha="right", color="#555555")
        plots.legend_below(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return figure


def write_report(rows: Sequence[Row], folder: str | Path, name: str) -> list[Path]:
    """Writes `name.md` and the plots of `rows` into `folder`; returns the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}.md"]
    written[0].write_text(to_markdown(rows))
    groups = groups_of(rows)
    titles, stems = titles_of(groups), _stems_of(groups)
    for place, group in groups.items():
        if len({row.length for group_rows in group.values() for row in group_rows if row.status == OK}) < 2:
            continue  # one length makes no curve
        device = next(iter(group.values()))[0].device
        figure = plot_group(group, titles[place], device)
        written.append(plots.save(figure, folder / f"{name}-{stems[place]}.png"))
    models = [row for row in rows if row.suite == "models" and row.status == OK]
    if models:
        written.append(plots.save(plot_models(models), folder / f"{name}-models.png"))
    decoded = [row for row in rows if row.suite == "decode" and row.status == OK]
    if len({row.length for row in decoded}) > 1:
        written.append(plots.save(plot_decoding(decoded, of_cache=False), folder / f"{name}-decode-speed.png"))
        written.append(plots.save(plot_decoding(decoded, of_cache=True), folder / f"{name}-decode-cache.png"))
    return written
