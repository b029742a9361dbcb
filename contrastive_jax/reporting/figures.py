"""Draws the figures of a report as SVG elements for an HTML page, in the colours and the font of that page.

Equal data give equal SVG. Dimensions: n pairs, s spans.
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

# Placeholder colours, #0102xx: `to_svg` replaces them by the CSS variables of the page, which has a light and a dark theme.
INK, RULE = "#010200", "#010201"
SERIES = [f"#0102{16 + number:02x}" for number in range(8)]
# The markers of a map and their glyphs in a legend: the next one after each round of colours. Likewise the lines of curves.
MARKERS, MARKER_GLYPHS = "o^sDv", "●▲■◆▼"
LINE_STYLES, LINE_GLYPHS = ("-", "--"), "━╍"
MATRIX_SIZE = 64  # queries and keys in the image of a matrix; more could not be distinguished

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


def css_colour(placeholder: re.Match) -> str:
    """Returns the CSS colour for a placeholder colour, matched with its last two digits as group 1."""
    number = int(placeholder[1], 16)
    return {0: "currentColor", 1: "var(--rule)"}.get(number, f"var(--series-{number - 16})")


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Returns a figure as an SVG element.

    Args:
      figure: drawn under `STYLE`.
      name: different for each figure of the page; all ids in the SVG begin with it.
      label: a description of the figure for screen readers.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"#0102([0-9a-f]{2})\b", css_colour, body)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--letters)", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    head = f'<svg role="img" aria-label="{html.escape(label)}" {view[0] if view else ""}>'
    return head + body.strip()


def curves(name: str, metric: str, runs: Sequence[tuple[list[int], list[float]]]) -> str:
    """Draws one metric of several runs against the step.

    Args:
      name: different for each figure of the page; see `to_svg`.
      metric: the name of the metric, for the label that screen readers read.
      runs: (steps, values) of each run; empty lists for a run without the metric, so that later runs keep their colours.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 2.1), layout="constrained")
        axis = figure.subplots()
        for number, (steps, values) in enumerate(runs):
            marker = "o" if len(steps) < 8 else None
            style = LINE_STYLES[number // len(SERIES) % len(LINE_STYLES)]
            axis.plot(steps, values, style, color=SERIES[number % len(SERIES)], marker=marker, markersize=3)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        last = ", ".join(f"{values[-1]:.4g}" if values else "–" for _, values in runs)
        return to_svg(figure, name, f"{metric} against the step; last values: {last}")


def legend_glyphs(count: int, glyphs: str) -> list[tuple[str, int]]:
    """Returns (glyph, number of its colour) for each of `count` entries of a legend; each round of colours has its glyph."""
    return [(glyphs[number // len(SERIES) % len(glyphs)], number % len(SERIES)) for number in range(count)]


def histogram(name: str, positives: np.ndarray, negatives: np.ndarray) -> str:
    """Draws histograms of positive similarities [n] and negative similarities [n (n - 1)], each normalised to 100 %."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axis = figure.subplots()
        both = np.concatenate([positives, negatives])
        edges = np.linspace(both.min() - 1e-3, both.max() + 1e-3, 61)
        for colour, label, values in ((SERIES[1], "negatives", negatives), (SERIES[0], "positives", positives)):
            percent = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
            axis.stairs(percent, edges, fill=True, color=colour, alpha=0.25)
            axis.stairs(percent, edges, color=colour, linewidth=1.2, label=label)
        axis.set_xlabel("cosine similarity")
        axis.set_ylabel("% of positives, of negatives")
        axis.legend(loc="upper right")
        means = f"{positives.mean():.2f} of positives, {negatives.mean():.2f} of negatives" if len(negatives) else "one pair"
        return to_svg(figure, name, f"Histogram of similarities; means: {means}")


def matrix(name: str, similarity: np.ndarray) -> str:
    """Draws the first queries (rows) and keys (columns) of similarity [n n] as an image."""
    shown = similarity[:MATRIX_SIZE, :MATRIX_SIZE]
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
        correct = 100 * (shown.argmax(axis=1) == np.arange(len(shown))).mean()
        return to_svg(
            figure,
            name,
            f"Similarity of {len(shown)} queries and their keys; in {correct:.0f} % of the rows the positive is the largest",
        )


def scatter(name: str, points: np.ndarray, domain: np.ndarray) -> str:
    """Draws points float32[s 2] in the plane, coloured by domain int64[s]; `legend_glyphs` gives the legend."""
    present = np.unique(domain)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axis = figure.subplots()
        for number, index in enumerate(present):
            marker = MARKERS[number // len(SERIES) % len(MARKERS)]
            colour = SERIES[number % len(SERIES)]
            x, y = points[domain == index].T
            axis.scatter(x, y, s=9, marker=marker, color=colour, alpha=0.75, linewidths=0)
        axis.set_xticks([])  # the coordinates of t-SNE mean nothing
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_aspect("equal", "datalim")
        axis.margins(0.01)
        return to_svg(figure, name, f"Map of {len(points)} spans in {len(present)} domains")
