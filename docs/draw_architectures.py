"""Draws docs/images/architectures.svg: how DnD-Transformer and RQ-Transformer predict the codes of one position.

python docs/draw_architectures.py
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


matplotlib.rcParams["svg.fonttype"] = "path"  # looks the same where the font is missing
matplotlib.rcParams["svg.hashsalt"] = "dnd_hf"

INK, BODY, HEAD, CODE = "#1f2937", "#dbeafe", "#fde68a", "#bbf7d0"


def box(axes: Axes, x: float, y: float, text: str, color: str, width: float = 2.6, height: float = 0.62) -> None:
    """A labelled box whose centre is (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=1))
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0, dashed: bool = False
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=10,
            color=INK,
            linewidth=1.1,
            linestyle="--" if dashed else "-",
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def note(axes: Axes, x: float, y: float, text: str, align: str = "center") -> None:
    axes.text(x, y, text, ha=align, va="center", fontsize=8, color=INK, style="italic")


def draw_dnd(axes: Axes) -> None:
    axes.set_title("DnD-Transformer: one stack, heads between its layers", fontsize=11, color=INK)
    box(axes, 3, 0.6, "sum of the code embeddings\nof the previous position", "white", 3.6, 0.8)
    heights = [2.0, 4.2, 6.4]
    names = ["layers 1 … a", "layers a+1 … b", "layers b+1 … n"]
    below = 1.0
    for k, (height, name) in enumerate(zip(heights, names), start=1):
        box(axes, 3, height, name, BODY)
        arrow(axes, (3, below), (3, height - 0.31))
        box(axes, 6.1, height + 0.75, f"head {k}", HEAD, 1.3)
        box(axes, 8.2, height + 0.75, f"code {k}", CODE, 1.3)
        arrow(axes, (4.3, height + 0.1), (5.45, height + 0.75))
        arrow(axes, (6.75, height + 0.75), (7.55, height + 0.75))
        if k < len(heights):
            axes.plot([3, 3], [height + 0.31, height + 0.93], color=INK, linewidth=1.1)
            axes.text(3, height + 1.1, "+", ha="center", va="center", fontsize=15, color=INK)
            arrow(axes, (8.2, height + 1.06), (3.22, height + 1.12), bend=0.22, dashed=True)
            below = height + 1.3
    note(axes, 5.7, 3.95, "embedding of code 1")
    note(axes, 5.7, 6.15, "embedding of code 2")
    note(axes, 4.6, 8.0, "one forward pass per position: all codes, one cache")


def draw_rq(axes: Axes) -> None:
    axes.set_title("RQ-Transformer: a body over positions, a second stack over depths", fontsize=11, color=INK)
    box(axes, 4.6, 0.6, "sum of the code vectors\nof the previous position", "white", 3.6, 0.8)
    box(axes, 4.6, 2.0, "body transformer", BODY, 3.0)
    arrow(axes, (4.6, 1.0), (4.6, 1.69))
    note(axes, 6.4, 2.0, "once per position", "left")
    for k, x in enumerate((1.6, 4.6, 7.6), start=1):
        text = "context" if k == 1 else "code 1" if k == 2 else "codes 1 + 2"
        box(axes, x, 3.6, text, "white", 2.1)
        box(axes, x, 5.0, "depth transformer", BODY, 2.4)
        box(axes, x, 6.2, "classifier", HEAD, 1.7)
        box(axes, x, 7.3, f"code {k}", CODE, 1.5)
        arrow(axes, (x, 3.91), (x, 4.69))
        arrow(axes, (x, 5.31), (x, 5.89))
        arrow(axes, (x, 6.51), (x, 6.99))
        if k < 3:
            axes.plot([x + 0.75, x + 1.5, x + 1.5], [7.3, 7.3, 3.6], color=INK, linewidth=1.1, linestyle="--")
            arrow(axes, (x + 1.5, 3.6), (x + 1.95, 3.6), dashed=True)
            arrow(axes, (x + 1.2, 5.0), (x + 1.8, 5.0))
    arrow(axes, (4.6, 2.31), (1.6, 3.29))
    note(axes, 4.6, 8.0, "one body pass and d depth passes per position, two caches")


def main() -> None:
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 2), (draw_dnd, draw_rq)):
        draw(axes)
        axes.set(xlim=(0, 9.3), ylim=(0, 8.4))
        axes.axis("off")
    figure.savefig(Path(__file__).parent / "images" / "architectures.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
