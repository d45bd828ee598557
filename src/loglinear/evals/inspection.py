"""A look inside a model: what it costs, how the past is cut into buckets, and what the level scales λ do on
a text.

T tokens, H heads, L levels
"""

import copy
import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from loglinear import fenwick, plots
from loglinear.layers.recurrent import LevelScales
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.cost import cost

COST_LENGTHS = tuple(1024 * scale for scale in (1, 4, 16, 64, 256, 1024))


@dataclass(frozen=True)
class CostRow:
    """Cost of a model at one length. The state is that of a full partition of `length` tokens, `levels` of
    them.

    `state_bytes` is what is allocated, `occupied_state_bytes` what holds tokens on average, both float32;
    `kv_cache_bytes` is the cache of the softmax model of the same shape (of the attention layers, where the
    model has some), in bfloat16.
    """

    length: int
    levels: int
    training_flops_per_token: int
    decoding_flops_per_token: int
    state_bytes: int
    occupied_state_bytes: int
    conv_bytes: int
    kv_cache_bytes: int


def cost_rows(config: LogLinearConfig, lengths: Sequence[int] = COST_LENGTHS) -> list[CostRow]:
    """The cost at each length, with as many levels as a full partition of that length has (one for a plain
    linear mixer).
    """
    rows = []
    for length in lengths:
        at_length = copy.deepcopy(config)
        if config.num_levels is not None and config.num_levels > 1:
            at_length.num_levels = fenwick.full_num_levels(length)
        found = cost(at_length, length, torch.bfloat16)
        rows.append(
            CostRow(
                length,
                at_length.num_levels or 0,
                found.training_flops_per_token,
                found.decoding_flops_per_token,
                found.state_bytes,
                found.occupied_state_bytes,
                found.conv_bytes,
                found.kv_cache_bytes,
            )
        )
    return rows


def format_flops(count: float) -> str:
    """FLOPs with a decimal prefix and three digits: 950 kFLOP, 3.2 GFLOP."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {prefix}FLOP"
    return f"{count:.0f} FLOP"


def cost_table(rows: Sequence[CostRow]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for the terminal and Markdown."""
    header = [
        "tokens",
        "levels",
        "training / token",
        "decoding / token",
        "state",
        "of it in use",
        "softmax KV cache",
    ]
    lines = [
        [
            plots.format_tokens(row.length),
            str(row.levels),
            format_flops(row.training_flops_per_token),
            format_flops(row.decoding_flops_per_token),
            plots.format_bytes(row.state_bytes + row.conv_bytes),
            plots.format_bytes(row.occupied_state_bytes + row.conv_bytes),
            plots.format_bytes(row.kv_cache_bytes),
        ]
        for row in rows
    ]
    return header, lines


def plot_memory(models: dict[str, Sequence[CostRow]], kv_cache: Sequence[CostRow]) -> Figure:
    """State per sequence against length for models by name, beside the KV cache of the softmax model of the
    same shape.
    """
    with plots.style():
        figure, (axis,) = plots.new_figure()
        series = [
            plots.Series(name, [row.length for row in rows], [row.state_bytes + row.conv_bytes for row in rows])
            for name, rows in models.items()
        ]
        cache = [row.kv_cache_bytes for row in kv_cache]
        series.append(plots.Series("softmax KV cache", [row.length for row in kv_cache], cache, dashed=True))
        series = [line for line in series if all(value > 0 for value in line.y)]
        plots.draw_series(axis, series)
        plots.token_axis(axis, [row.length for row in kv_cache], "context (tokens)")
        axis.set_yscale("log", base=2)
        plots.unit_axis(axis, plots.format_bytes)
        axis.set_ylabel("memory per sequence while decoding")
        axis.set_title("What a model keeps of its context")
        plots.legend_outside(axis)
    return figure


def partition(position: int, num_levels: int) -> list[tuple[int, int, int]]:
    """The buckets that the token at `position` reads, itself included, oldest first: (level, first token,
    last token).

    >>> partition(6, 5)
    [(3, 0, 3), (2, 4, 5), (0, 6, 6)]
    """
    buckets: list[tuple[int, int, int]] = []
    for token in range(position + 1):
        level = int(fenwick.level(position, token, num_levels))
        if buckets and buckets[-1][0] == level:
            buckets[-1] = (level, buckets[-1][1], token)
        else:
            buckets.append((level, token, token))
    return buckets


def partition_text(position: int, num_levels: int) -> str:
    """The same as one line: which level holds which tokens."""
    parts = []
    for level, first, last in partition(position, num_levels):
        tokens = str(first) if first == last else f"{first}–{last}"
        parts.append(f"level {level}: {tokens}")
    return f"token {position} reads " + ", ".join(parts)


def _level_colours(num_levels: int) -> ListedColormap:
    return ListedColormap(colormaps["viridis"](np.linspace(0, 1, max(2, num_levels)))[:num_levels])


def plot_partition(length: int = 64, num_levels: int | None = None) -> Figure:
    """The Fenwick partition: the level of every earlier token as every token sees it, and the buckets of a
    few tokens.

    Args:
        length: tokens to draw.
        num_levels: levels of the partition; default: a full one.
    """
    levels = fenwick.full_num_levels(length) if num_levels is None else num_levels
    colours = _level_colours(levels)
    positions = torch.arange(length)
    grid = fenwick.level(positions[:, None], positions[None, :], levels)
    grid = np.ma.masked_array(grid.numpy(), mask=np.triu(np.ones((length, length), bool), 1))
    shown = sorted({length - 1, *(max(0, round((length - 1) * part)) for part in (0.2, 0.4, 0.55, 0.7, 0.85))})
    with plots.style():
        figure, (left, right) = plots.new_figure(1, 2, width=5.0, height=4.2)
        norm = BoundaryNorm(np.arange(levels + 1) - 0.5, levels) if levels > 1 else None
        left.imshow(grid, cmap=colours, norm=norm, interpolation="nearest", aspect="equal")
        left.grid(False)
        left.set_xlabel("token read, s")
        left.set_ylabel("token reading, t")
        left.set_title("Level on which t sees s")
        right.grid(False)
        for row, position in enumerate(shown):
            for level, first, last in partition(position, levels):
                box = Rectangle(
                    (first, row - 0.36), last - first + 1, 0.72, facecolor=colours(level), edgecolor="white"
                )
                right.add_patch(box)
        right.set_xlim(0, length)
        right.set_ylim(len(shown) - 0.5, -0.5)
        right.set_yticks(range(len(shown)), [f"t = {position}" for position in shown])
        right.set_xlabel("tokens of the past, s")
        right.set_title("Buckets that a token reads")
        handles = [Patch(facecolor=colours(level), label=f"level {level}") for level in range(levels)]
        if num_levels is not None and levels < fenwick.full_num_levels(length):
            handles[-1].set_label(f"level {levels - 1} (everything older)")
        right.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0.0)
    return figure


@dataclass(frozen=True)
class LevelScaleSummary:
    """λ of one head on one level over the tokens of a text that found the level's bucket filled (level 0:
    all tokens).
    """

    layer: int
    head: int
    level: int
    mean: float | None
    smallest: float | None
    largest: float | None
    tokens: int


@torch.no_grad()
def level_scales_on(model: LogLinearForCausalLM, token_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """λ of every layer that has level scales, on one text: layer -> float32 [T,H,L].

    Raises:
        ValueError: no token.
    """
    if len(token_ids) == 0:
        raise ValueError("level scales need a text of at least one token")
    found: dict[int, np.ndarray] = {}
    hooks = []
    for layer, block in enumerate(model.model.layers):
        for module in block.modules():
            if isinstance(module, LevelScales):

                def keep(_module, _inputs, output: torch.Tensor, layer: int = layer) -> None:
                    found[layer] = output[0].float().cpu().numpy()

                hooks.append(module.register_forward_hook(keep))
    try:
        device = next(model.parameters()).device
        model.model(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def buckets_in_use(length: int, num_levels: int) -> np.ndarray:
    """Which levels hold anything for the tokens 0 … length - 1: bool [T,L]. Level 0 is the token itself, so
    it always does.
    """
    in_use = fenwick.occupied(torch.arange(length), num_levels).numpy().copy()
    in_use[:, 0] = True
    return in_use


def summarize_level_scales(scales: dict[int, np.ndarray]) -> list[LevelScaleSummary]:
    """Mean, smallest and largest λ by layer, head and level, over the tokens where the level holds
    something.
    """
    rows = []
    for layer, values in scales.items():
        length, heads, levels = values.shape
        in_use = buckets_in_use(length, levels)
        for head in range(heads):
            for level in range(levels):
                chosen = values[in_use[:, level], head, level]
                numbers: tuple[float | None, float | None, float | None] = (None, None, None)
                if len(chosen):
                    numbers = (float(chosen.mean()), float(chosen.min()), float(chosen.max()))
                rows.append(LevelScaleSummary(layer, head, level, *numbers, len(chosen)))
    return rows


def level_scale_table(summaries: Sequence[LevelScaleSummary]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: mean λ over heads by layer and level."""
    levels = sorted({row.level for row in summaries})
    header = ["layer", *(f"λ{level}" for level in levels)]
    lines = []
    for layer in sorted({row.layer for row in summaries}):
        line = [str(layer)]
        for level in levels:
            chosen = [r for r in summaries if (r.layer, r.level) == (layer, level) and r.mean is not None]
            line.append(f"{sum(r.mean or 0.0 for r in chosen) / len(chosen):.2f}" if chosen else "–")
        lines.append(line)
    return header, lines


def write_level_scales(path: str | Path, summaries: Sequence[LevelScaleSummary]) -> Path:
    """Writes the summaries as CSV; a level that no token of the text reached has empty cells."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(LevelScaleSummary)])
        for row in summaries:
            values = astuple(row)
            writer.writerow(["" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in values])
    return path


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def plot_level_scales(scales: dict[int, np.ndarray], most_layers: int = 4, most_heads: int = 4) -> Figure:
    """λ as colour, by position (across) and level (up), for a few layers (rows) and heads (columns).

    A level is grey before its bucket has ever been filled. The colours go to the 99th percentile, so that
    single tokens do not flatten the rest.

    Raises:
        ValueError: the model has no level scales.
    """
    if not scales:
        raise ValueError("this model has no level scales (a plain linear mixer or softmax attention)")
    names = list(scales)
    layers = [names[index] for index in _spread(len(names), most_layers)]
    length, heads, levels = scales[layers[0]].shape
    columns = _spread(heads, most_heads)
    reached = np.logical_or.accumulate(buckets_in_use(length, levels), axis=0)
    largest = float(
        np.percentile(np.concatenate([scales[layer][reached.nonzero()[0]].ravel() for layer in layers]), 99)
    )
    colours = colormaps["viridis"].with_extremes(bad="#DDDDDD")
    with plots.style():
        width, height = max(2.6, 8.0 / len(columns)), 1.7
        figure, axes = plots.new_figure(len(layers), len(columns), width, height)
        image = None
        for number, axis in enumerate(axes):
            row, column = divmod(number, len(columns))
            layer, head = layers[row], columns[column]
            values = np.ma.masked_array(scales[layer][:, head].T, mask=np.logical_not(reached.T))
            image = axis.imshow(
                values, cmap=colours, vmin=0, vmax=largest, aspect="auto", origin="lower", interpolation="nearest"
            )
            axis.grid(False)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.set_yticks(_spread(levels, 6))
            if column == 0:
                axis.set_ylabel("level")
            if row == len(layers) - 1:
                axis.set_xlabel("position (tokens)")
        assert image is not None
        figure.colorbar(image, ax=axes, label="level scale λ", shrink=0.8, extend="max")
    return figure
