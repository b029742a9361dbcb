"""The figures of a report: each an SVG for the middle of an HTML page, whose colours and letters are those of the page.

Equal figures are equal texts. Dimensions: n pairs, s spans.
"""

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

# Colours that the page sets, in light and in dark: matplotlib draws with stand-ins, #0102xx.
INK, RULE = "#010200", "#010201"
SERIES = [f"#0102{16 + number:02x}" for number in range(8)]
# Of a map, a round of colours each; and those of a legend.
MARKERS, GLYPHS = "o^sDv", "●▲■◆▼"
LINES = "━╍"  # of curves, likewise
MATRIX = 64  # queries and keys of a matrix: more are no longer told apart

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def variable(found: re.Match) -> str:
    """What a stand-in stands for."""
    number = int(found[1], 16)
    return {0: "currentColor", 1: "var(--rule)"}.get(number, f"var(--series-{number - 16})")


def inline(figure: Figure, name: str, label: str) -> str:
    """The SVG of a figure.

    Args:
      figure: drawn under `STYLE`.
      name: another for each figure of the page: it begins the ids within.
      label: what there is to see, for those who do not.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"#0102([0-9a-f]{2})\b", variable, body)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--letters)", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    head = f'<svg role="img" aria-label="{html.escape(label)}" {view[0] if view else ""}>'
    return head + body.strip()


def curves(name: str, metric: str, runs: Sequence[tuple[list[int], list[float]]]) -> str:
    """One metric of several runs, (steps, values) each, over one another; a run without it is empty."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.1), layout="constrained")
        axis = figure.subplots()
        for number, (steps, values) in enumerate(runs):
            marker = "o" if len(steps) < 8 else None
            style = "-" if number < len(SERIES) else "--"
            axis.plot(steps, values, style, color=SERIES[number % len(SERIES)], marker=marker, markersize=3)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        last = ", ".join(f"{values[-1]:.4g}" for _, values in runs if values)
        return inline(figure, name, f"{metric} against the step; at the end {last}")


def glyphs(count: int, kinds: str) -> list[tuple[str, int]]:
    """What stands for each of so many things in a legend: a glyph, the next one with each round of colours, and a colour."""
    return [(kinds[number // len(SERIES) % len(kinds)], number % len(SERIES)) for number in range(count)]


def histogram(name: str, positives: np.ndarray, negatives: np.ndarray) -> str:
    """Similarities of pairs [n] and of what is no pair [n (n - 1)], each as shares of its own number."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axis = figure.subplots()
        both = np.concatenate([positives, negatives])
        edges = np.linspace(both.min() - 1e-3, both.max() + 1e-3, 61)
        for colour, label, values in ((SERIES[1], "negatives", negatives), (SERIES[0], "positives", positives)):
            share = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
            axis.stairs(share, edges, fill=True, color=colour, alpha=0.25)
            axis.stairs(share, edges, color=colour, linewidth=1.2, label=label)
        axis.set_xlabel("cosine similarity")
        axis.set_ylabel("% of each kind")
        axis.legend(loc="upper right")
        means = f"{positives.mean():.2f} of positives, {negatives.mean():.2f} of negatives" if len(negatives) else "one pair"
        return inline(figure, name, f"Histogram of similarities; means: {means}")


def matrix(name: str, similarity: np.ndarray) -> str:
    """The first queries (rows) × keys (columns) of similarity [n n] as an image."""
    shown = similarity[:MATRIX, :MATRIX]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(5, 4.4), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(shown, cmap="viridis", interpolation="none")
        axis.set_xlabel("key")
        axis.set_ylabel("query")
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axis, label="cosine similarity", shrink=0.9)
        bar.outline.set_visible(False)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)
        right = 100 * (shown.argmax(axis=1) == np.arange(len(shown))).mean()
        return inline(
            figure, name, f"Similarity of {len(shown)} queries and their keys; the largest of {right:.0f} % of rows is its key"
        )


def scatter(name: str, places: np.ndarray, domain: np.ndarray) -> str:
    """Places float32[s 2] in the plane, coloured by domain int64[s]; see `glyphs`."""
    present = np.unique(domain)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axis = figure.subplots()
        for number, kind in enumerate(present):
            marker = MARKERS[number // len(SERIES) % len(MARKERS)]
            colour = SERIES[number % len(SERIES)]
            x, y = places[domain == kind].T
            axis.scatter(x, y, s=9, marker=marker, color=colour, alpha=0.75, linewidths=0)
        axis.set_xticks([])  # the coordinates of a map mean nothing
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_aspect("equal", "datalim")
        axis.margins(0.01)
        return inline(figure, name, f"Map of {len(places)} spans in {len(present)} domains")
