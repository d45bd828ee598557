"""A look inside a model: what it costs, how the past is cut into buckets, and what the level scales λ and the levels
do on a text.

T tokens, M model width, H heads, V value width, L levels
"""

import contextlib
import copy
import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from loglinear import fenwick, plots
from loglinear.layers.recurrent import LevelScales, RecurrentMixer
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.models.cost import cost

COST_LENGTHS = tuple(1024 * scale for scale in (1, 4, 16, 64, 256, 1024))


@dataclass(frozen=True)
class CostRow:
    """Cost of a model at one length. The state is that of a full partition of `length` tokens, `levels` of
    them.

    `state_bytes` is what is allocated, `occupied_state_bytes` what holds tokens on average, both as a model in bfloat16
    keeps them on a GPU; `kv_cache_bytes` is the cache of the softmax model of the same shape (of the attention layers,
    where the model has some), in bfloat16.
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
    """The cost at each length of a model that is made for it, with as many levels as a full partition of that length
    has (one for a plain linear mixer).
    """
    rows = []
    for length in lengths:
        at_length = copy.deepcopy(config)
        at_length.max_position_embeddings = length
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


@dataclass(frozen=True)
class LevelShare:
    """What one level contributes to one head's output over the tokens of a text.

    The output of the operator is a sum over levels, `o_t = Σ_l c_tl` with `c_tl = λ_tl S_t[l]ᵀ q_t`; a bucket that
    holds nothing contributes zero.

    Attributes:
        mean_scale: mean λ over the tokens that found the level filled; None if none did.
        share: mean over all tokens of `‖c_tl‖ / Σ_m ‖c_tm‖` (norms over V), which adds up to 1 over the levels. Tokens
            with an output of zero on every level are left out.
        share_when_filled: the same mean over the tokens that found the level filled; None if none did.
        aligned_share: `Σ_t <c_tl, o_t> / Σ_t ‖o_t‖²`, which adds up to 1 as well, but is negative for a level that
            works against the others.
        tokens: those that found the level filled.
    """

    layer: int
    head: int
    level: int
    mean_scale: float | None
    share: float
    share_when_filled: float | None
    aligned_share: float
    tokens: int


@contextlib.contextmanager
def _operator_outputs(mixer: RecurrentMixer) -> Iterator[list[torch.Tensor]]:
    """Collects what the operator of a mixer puts out, before norm and gate: `[B,T,H,V]` for each call."""
    found: list[torch.Tensor] = []
    finish = mixer.finish

    def keep(o: torch.Tensor, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        found.append(o)
        return finish(o, v, x)

    mixer.finish = keep  # type: ignore[method-assign]  (of this object, until the end of the block)
    try:
        yield found
    finally:
        del mixer.finish


@torch.no_grad()
def level_contributions(mixer: RecurrentMixer, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """What each level puts into the output of a mixer's operator, `c_tl` of `LevelShare`, level after level.

    The operator is linear in λ, so each is its output with the λ of all other levels at zero.

    Args:
        mixer: with level scales.
        x: the layer's input `[1, T, M]`.

    Yields:
        L tensors `[T, H, V]`, which add up to the operator's output.
    """
    scales = mixer.level_scales
    assert scales is not None, "a plain linear mixer has one level"
    for level in range(mixer.num_levels):

        def only(_module, _inputs, output: torch.Tensor, level: int = level) -> torch.Tensor:
            kept = torch.zeros_like(output)
            kept[..., level] = output[..., level]
            return kept

        hook = scales.register_forward_hook(only)
        try:
            with _operator_outputs(mixer) as found:
                mixer(x)
        finally:
            hook.remove()
        yield found[0][0]


@torch.no_grad()
def level_shares_on(model: LogLinearForCausalLM, token_ids: Sequence[int]) -> list[LevelShare]:
    """What the levels of every layer contribute on one text.

    Raises:
        ValueError: no token.
    """
    scales = level_scales_on(model, token_ids)
    every = {layer: block.mixer for layer, block in enumerate(model.model.layers)}
    mixers = {layer: mixer for layer, mixer in every.items() if layer in scales and isinstance(mixer, RecurrentMixer)}
    inputs: dict[int, torch.Tensor] = {}
    hooks = []
    for layer, mixer in mixers.items():

        def keep(_module, arguments, layer: int = layer) -> None:
            inputs[layer] = arguments[0]

        hooks.append(mixer.register_forward_pre_hook(keep))
    try:
        device = next(model.parameters()).device
        model.model(input_ids=torch.tensor([list(token_ids)], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for layer, mixer in mixers.items():
        with _operator_outputs(mixer) as found:
            mixer(inputs[layer])
        whole = found[0][0].double()  # [T, H, V]
        norms, aligned = [], []
        for part in level_contributions(mixer, inputs[layer]):
            norms.append(part.double().norm(dim=-1))
            aligned.append((part.double() * whole).sum((0, 2)))
        rows += _shares(
            layer, scales[layer], torch.stack(norms, -1), torch.stack(aligned, -1), whole.square().sum((0, 2))
        )
    return rows


def _shares(
    layer: int, scales: np.ndarray, norms: torch.Tensor, aligned: torch.Tensor, energy: torch.Tensor
) -> list[LevelShare]:
    """Rows of a layer from its λ [T,H,L], norms of contributions [T,H,L], their products with the output [H,L], and the
    squared norm of the output [H].
    """
    length, heads, levels = scales.shape
    in_use = buckets_in_use(length, levels)
    total = norms.sum(-1, keepdim=True)
    shares = torch.where(total > 0, norms / total, torch.nan).cpu().numpy()
    signed = torch.where(energy[:, None] > 0, aligned / energy[:, None], 0.0).tolist()
    rows = []
    for head in range(heads):
        counted = np.logical_not(np.isnan(shares[:, head, 0]))
        for level in range(levels):
            filled = in_use[:, level]
            own = shares[:, head, level]
            seen = np.logical_and(filled, counted)
            rows.append(
                LevelShare(
                    layer=layer,
                    head=head,
                    level=level,
                    mean_scale=float(scales[filled, head, level].mean()) if filled.any() else None,
                    share=float(own[counted].mean()) if counted.any() else 0.0,
                    share_when_filled=float(own[seen].mean()) if seen.any() else None,
                    aligned_share=signed[head][level],
                    tokens=int(filled.sum()),
                )
            )
    return rows


def mean_by_level(shares: Sequence[LevelShare]) -> list[tuple[float, float | None]]:
    """Mean share of each level, and mean λ (None: no token found it filled), over layers, heads and texts."""
    found = []
    for level in range(1 + max(row.level for row in shares)):
        own = [row for row in shares if row.level == level]
        scales = [row.mean_scale for row in own if row.mean_scale is not None]
        found.append((statistics.fmean(row.share for row in own), statistics.fmean(scales) if scales else None))
    return found


def level_share_table(shares: Sequence[LevelShare]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: share of the output in per cent, mean over heads, by layer and level."""
    levels = sorted({row.level for row in shares})
    lines = []
    for layer in sorted({row.layer for row in shares}):
        line = [str(layer)]
        for level in levels:
            chosen = [row for row in shares if (row.layer, row.level) == (layer, level)]
            reached = any(row.tokens for row in chosen)
            line.append(f"{100 * sum(row.share for row in chosen) / len(chosen):.1f}" if reached else "–")
        lines.append(line)
    return ["layer", *(f"level {level}" for level in levels)], lines


def plot_level_shares(shares: Sequence[LevelShare], most_labels: int = 24) -> Figure:
    """Every head of every layer (down) by level (across): mean λ, the share of the output, and the share where the
    level was filled. Grey: never filled.

    Raises:
        ValueError: no shares.
    """
    if not shares:
        raise ValueError("this model has no level scales (a plain linear mixer or softmax attention)")
    heads = list(dict.fromkeys((row.layer, row.head) for row in shares))
    place = {head: number for number, head in enumerate(heads)}
    levels = max(row.level for row in shares) + 1
    grids = {name: np.full((len(heads), levels), np.nan) for name in ("mean_scale", "share", "share_when_filled")}
    for row in shares:
        for name, grid in grids.items():
            value = getattr(row, name)
            if row.tokens and value is not None:
                grid[place[row.layer, row.head], row.level] = value * (1 if name == "mean_scale" else 100)
    colours = colormaps["viridis"].with_extremes(bad="#DDDDDD")
    titles = {
        "mean_scale": ("Mean level scale", "λ"),
        "share": ("Share of the output", "per cent"),
        "share_when_filled": ("Share where filled", "per cent"),
    }
    with plots.style():
        height = min(9.0, max(2.4, 0.16 * len(heads) + 1.2))
        figure, axes = plots.new_figure(1, 3, max(3.2, 0.22 * levels + 1.6), height)
        for axis, (name, grid) in zip(axes, grids.items(), strict=True):
            title, unit = titles[name]
            image = axis.imshow(grid, cmap=colours, vmin=0, aspect="auto", interpolation="nearest")
            axis.grid(False)
            axis.set_title(title)
            axis.set_xticks(_every(levels, 8))
            axis.set_xlabel("level")
            shown = _spread(len(heads), most_labels)
            axis.set_yticks(shown, [f"{heads[index][0]}.{heads[index][1]}" for index in shown])
            figure.colorbar(image, ax=axis, label=unit)
        axes[0].set_ylabel("layer.head")
    return figure


def write_level_scales(path: str | Path, summaries: Sequence[LevelScaleSummary]) -> Path:
    """Writes the summaries as CSV; a level that no token of the text reached has empty cells."""
    return _write(path, summaries, LevelScaleSummary)


def write_level_shares(path: str | Path, shares: Sequence[LevelShare]) -> Path:
    """Writes the shares as CSV, in the same way."""
    return _write(path, shares, LevelShare)


def _write(path: str | Path, rows: Sequence[LevelScaleSummary] | Sequence[LevelShare], kind: type) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(kind)])
        for row in rows:
            values = astuple(row)
            writer.writerow(["" if v is None else f"{v:.6f}" if isinstance(v, float) else v for v in values])
    return path


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _every(count: int, most: int) -> range:
    """At most `most` of `count` indices at equal distances from 0 on: ticks that can be counted through."""
    return range(0, count, math.ceil(count / most))


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
            axis.set_yticks(_every(levels, 6))
            if column == 0:
                axis.set_ylabel("level")
            if row == len(layers) - 1:
                axis.set_xlabel("position (tokens)")
        assert image is not None
        figure.colorbar(image, ax=axes, label="level scale λ", shrink=0.8, extend="max")
    return figure
