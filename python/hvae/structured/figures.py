"""The learned graph as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from hvae.runs import writing


def draw_graph(path: Path, graph: Tensor, title: str) -> None:
    """Nodes on a circle, arrows from parents; open gates drawn through, closed ones dotted, each with its probability.

    Args:
        path: of the picture.
        graph: probabilities and gates ``(2, N, N)``, from nodes to parents.
        title: above it.
    """
    from matplotlib.figure import Figure

    probabilities, gates = graph.tolist()
    count = len(gates)
    angles = [math.pi / 2 + 2 * math.pi * (n + 1) / count for n in range(count)]  # the root on top
    places = [(math.cos(angle), math.sin(angle)) for angle in angles]
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    for n in range(count):
        for parent in range(n + 1, count):
            style = {"color": "black"} if gates[n][parent] else {"color": "silver", "linestyle": ":"}
            arrow = {"arrowstyle": "-|>", "shrinkA": 20, "shrinkB": 20, **style}
            axes.annotate("", places[n], places[parent], arrowprops=arrow)
            x, y = (0.3 * a + 0.7 * b for a, b in zip(places[n], places[parent], strict=True))
            axes.text(
                x,
                y,
                f"{probabilities[n][parent]:.2f}",
                ha="center",
                va="center",
                fontsize="small",
                color=style["color"],
                bbox={"pad": 1, "facecolor": "white", "lw": 0},
            )
    for n, (x, y) in enumerate(places):
        circle = {"boxstyle": "circle,pad=0.5", "facecolor": "white", "edgecolor": "black"}
        axes.text(x, y, f"$z_{n + 1}$", ha="center", va="center", bbox=circle)
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", title=title)
    axes.set_axis_off()
    with writing(path) as partial:
        figure.savefig(partial, dpi=120)
