"""Draws the pictures of docs/math.md: `python docs/figures/draw.py [FOLDER]` (default: its own folder)."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from loglinear import fenwick

INK, FAINT, PAPER = "#1b1b1b", "#b8b8b8", "#ffffff"
# Levels from near to far, the same in every picture.
COLOURS = ["#f2c14e", "#f78154", "#d1495b", "#8f5db7", "#4d7ea8", "#3b9c87", "#7a8b52"]


def text_on(colour: str) -> str:
    """Ink that can be read on a colour."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return INK if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else PAPER


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, label: str = "", **style
) -> None:
    axes.add_patch(
        Rectangle((x, y), width, height, facecolor=colour, edgecolor=PAPER, linewidth=1.2, **style)
    )
    if label:
        axes.text(
            x + width / 2,
            y + height / 2,
            label,
            ha="center",
            va="center",
            fontsize=8,
            color=text_on(colour),
        )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = {"arrowstyle": "->", "color": INK, "connectionstyle": f"arc3,rad={bend}", "linewidth": 1.1}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def bare(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")


def level_grid(axes: Axes, length: int, num_levels: int) -> None:
    for target in range(length):
        for source in range(target + 1):
            number = int(fenwick.level(target, source, num_levels))
            box(axes, source, length - 1 - target, 1, 1, COLOURS[number], str(number))
    bare(axes, length, length)
    for position in range(0, length, 2):
        axes.text(position + 0.5, -0.2, str(position), ha="center", va="top", fontsize=7, color=INK)
        axes.text(
            -0.2, length - 0.5 - position, str(position), ha="right", va="center", fontsize=7, color=INK
        )
    axes.set_title(f"L = {num_levels}", fontsize=10)


def levels() -> Figure:
    """Level of every source token (columns) seen from every token (rows): full, capped, and one level."""
    length = 16
    full = fenwick.full_num_levels(length)
    figure, row = plt.subplots(1, 3, figsize=(12.5, 4.4))
    for axes, num_levels in zip(row, (full, 3, 1), strict=True):
        level_grid(axes, length, num_levels)
    for axes in row:
        axes.text(length * 0.5, -1.2, "source s", ha="center", va="top", fontsize=9)
    row[0].text(-1.8, length * 0.5, "target t", ha="right", va="center", rotation=90, fontsize=9)
    return figure


def buckets() -> Figure:
    """The buckets that each token reads, as blocks on the line of tokens, with its position in binary."""
    length = 16
    num_levels = fenwick.full_num_levels(length)
    figure, axes = plt.subplots(figsize=(8.6, 6.4))
    for target in range(length):
        y = (length - 1 - target) * 1.0
        numbers = [int(fenwick.level(target, source, num_levels)) for source in range(target + 1)]
        start = 0
        for source in range(1, target + 2):
            if source > target or numbers[source] != numbers[start]:
                number = numbers[start]
                box(
                    axes,
                    start + 0.04,
                    y + 0.12,
                    source - start - 0.08,
                    0.76,
                    COLOURS[number],
                    str(number),
                )
                start = source
        axes.text(-0.4, y + 0.5, f"{target}", ha="right", va="center", fontsize=9)
        axes.text(length + 0.6, y + 0.5, f"{target:04b}", va="center", fontsize=9, family="monospace")
    bare(axes, length + 3, length)
    axes.set_xlim(-1.8, length + 3)
    axes.text(-0.4, length + 0.2, "t", ha="right", va="bottom", fontsize=9)
    axes.text(length + 0.6, length + 0.2, "t in binary", va="bottom", fontsize=9)
    axes.text(
        length / 2,
        length + 0.2,
        "tokens 0 … t, by the bucket they are in",
        ha="center",
        va="bottom",
        fontsize=9,
    )
    return figure


def tree_boxes(axes: Axes, chunks: int, heights: int, gap: float = 1.6) -> None:
    for height in range(heights):
        width = 2**height
        for number in range(chunks // width):
            reads = number % 2 == 0 and (number + 1) * width < chunks
            colour = COLOURS[(height + 2) % len(COLOURS)] if reads else "#e9e9e9"
            box(
                axes,
                number * width + 0.05,
                height * gap,
                width - 0.1,
                0.8,
                colour,
                f"{height}, {number}",
            )


def tree() -> Figure:
    """The tree over eight chunks: at every height the right half of a block reads the state of the left."""
    chunks, heights, gap = 8, 4, 1.6
    figure, axes = plt.subplots(figsize=(9, 5.6))
    tree_boxes(axes, chunks, heights, gap)
    for height in range(heights - 1):
        width = 2**height
        for number in range(0, chunks // width, 2):
            left, right = (number + 0.5) * width, (number + 1.5) * width
            arrow(axes, (right, height * gap + 0.82), (left, height * gap + 0.82), bend=0.35)
        axes.text(
            chunks + 0.2,
            height * gap + 0.4,
            f"height {height}: bit {height} of c",
            va="center",
            fontsize=9,
        )
    axes.text(chunks + 0.2, 3 * gap + 0.4, "root: read by nobody", va="center", fontsize=9)
    for chunk in range(chunks):
        axes.text(chunk + 0.5, -0.35, f"c = {chunk}", ha="center", va="center", fontsize=9)
        axes.text(
            chunk + 0.5, -0.75, f"{chunk:03b}", ha="center", va="center", fontsize=8, family="monospace"
        )
    axes.set_xlim(-0.1, chunks + 3.4)
    axes.set_ylim(-1.1, heights * gap - 0.6)
    axes.axis("off")
    return figure


def chunked() -> Figure:
    """How 32 tokens see each other: token by token inside chunks of 8, by reading nodes beyond."""
    length, chunk = 32, 8
    num_levels = fenwick.full_num_levels(length)
    figure, axes = plt.subplots(figsize=(6.4, 6.4))
    for target in range(length):
        for source in range(target + 1):
            if target // chunk == source // chunk:
                number = int(fenwick.level(target, source, num_levels))
                box(axes, source, length - 1 - target, 1, 1, COLOURS[number])
    for number in range(length // chunk):
        others = number
        height, node = 0, number
        while others:
            if others % 2 == 1:
                left, width = (node - 1) * 2**height * chunk, 2**height * chunk
                colour = COLOURS[4 + height]
                top = length - (number + 1) * chunk
                box(
                    axes,
                    left,
                    top,
                    width,
                    chunk,
                    colour,
                    f"node {height}, {node - 1}\nread by chunk {number}",
                )
            others, node, height = others // 2, node // 2, height + 1
    bare(axes, length, length)
    axes.text(length / 2, -0.8, "source s", ha="center", va="top", fontsize=9)
    axes.text(-0.8, length / 2, "target t", ha="right", va="center", rotation=90, fontsize=9)
    return figure


def capped() -> Figure:
    """Capped last level: bits below the cap read nodes, everything older is one entering state per block."""
    chunks, cap, gap = 8, 1, 1.5
    figure, axes = plt.subplots(figsize=(9, 5.2))
    for chunk in range(chunks):
        colour = COLOURS[2] if chunk % 2 == 0 else "#e9e9e9"
        box(axes, chunk + 0.05, 0, 0.9, 0.8, colour, f"0, {chunk}")
        axes.text(chunk + 0.5, -0.35, f"c = {chunk}", ha="center", va="center", fontsize=9)
    for block in range(chunks // 2):
        left = 2 * block
        arrow(axes, (left + 1.5, 0.82), (left + 0.5, 0.82), bend=0.35)
        box(axes, left + 0.05, gap, 1.9, 0.8, COLOURS[4], f"$E_{block}$ enters block {block}")
        if block:
            arrow(axes, (left - 1.0, gap + 0.86), (left + 0.1, gap + 0.86), bend=-0.35)
            label = f"$(P, U)_{{{cap},{block - 1}}}$"
            axes.text(left - 0.45, gap + 1.3, label, ha="center", va="bottom", fontsize=9)
    axes.text(chunks + 0.2, 0.4, "height 0: own level", va="center", fontsize=9)
    axes.text(
        chunks + 0.2, gap + 0.4, "all older: last level,\none read per chunk", va="center", fontsize=9
    )
    axes.text(-0.3, gap + 0.4, "carried-in\nlast bucket $E_0$", ha="right", va="center", fontsize=9)
    arrow(axes, (-0.28, gap + 0.4), (0.0, gap + 0.4))
    axes.set_xlim(-2.0, chunks + 2.8)
    axes.set_ylim(-0.7, gap + 2.0)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def carried() -> Figure:
    """A call that starts at position 22 with chunks of 8: each bucket is a block of the absolute tree."""
    position, chunk, end, num_levels = 22, 8, 40, 7
    figure, axes = plt.subplots(figsize=(10.5, 2.6))
    used = fenwick.occupied(position, num_levels)
    start = 0
    for bucket in reversed([number for number in range(num_levels) if used[number]]):
        size = 2 ** (bucket - 1)
        label = f"bucket {bucket}: a node of height 1" if size > chunk else str(bucket)
        box(axes, start + 0.05, 1.0, size - 0.1, 1.4, COLOURS[bucket], label)
        start += size
    first_chunk = position // chunk * chunk
    inside = (first_chunk + position) / 2
    axes.text(inside, 2.55, "first chunk", ha="center", va="bottom", fontsize=8)
    box(axes, position + 0.05, 1.0, end - position - 0.1, 1.4, "#e9e9e9", "tokens of this call")
    for edge in range(0, end + 1, chunk):
        axes.plot([edge, edge], [0.45, 0.95], color=INK, linewidth=1.0)
        axes.text(edge, 0.3, str(edge), ha="center", va="top", fontsize=8)
    axes.plot([position, position], [0.45, 3.4], color=INK, linewidth=1.4)
    axes.text(position + 0.3, 3.3, f"position {position} = {position:05b}", va="top", fontsize=9)
    axes.text(end / 2, -0.9, "chunk boundaries at multiples of 8", ha="center", va="top", fontsize=8)
    axes.set_xlim(-0.5, end + 0.5)
    axes.set_ylim(-1.6, 3.6)
    axes.axis("off")
    return figure


def memory() -> Figure:
    """How many buckets are occupied as tokens arrive, and how many there can be."""
    length = 128
    num_levels = fenwick.full_num_levels(length)
    counts = np.array([sum(fenwick.occupied(position, num_levels)) for position in range(length)])
    figure, axes = plt.subplots(figsize=(8, 2.6))
    axes.bar(
        np.arange(length),
        counts,
        width=0.85,
        color=COLOURS[4],
        label="occupied before the token enters",
    )
    possible = [fenwick.full_num_levels(position + 1) - 1 for position in range(length)]
    axes.step(
        np.arange(length),
        possible,
        where="mid",
        color=COLOURS[2],
        label="levels 1 … of a full partition",
    )
    axes.set_xlabel("position")
    axes.set_ylabel("states")
    axes.set_xlim(-1, length)
    axes.set_ylim(0, max(possible) + 2.6)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


PICTURES = (levels, buckets, memory, tree, chunked, capped, carried)


def main(folder: Path) -> None:
    """Writes every picture as `<name>.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        figure = picture()
        figure.savefig(
            folder / f"{picture.__name__}.png",
            dpi=110,
            bbox_inches="tight",
            metadata={"Software": None},
        )
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
