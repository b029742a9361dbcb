"""The section of a report with the training curves: one figure per metric, with the curves of all runs."""

from collections.abc import Iterable, Sequence

from absl import logging

from contrastive_jax.reporting import figures, page
from contrastive_jax.reporting.inputs import TrainingRun

# The metrics that are always visible, in this order; the others are folded away.
MAIN_METRICS = (
    "loss",
    "in_batch_top1",
    "query_key/mean/top1",
    "query_key/mean/top5",
    "temperature",
    "gradient_norm",
)


def curves_section(runs: Sequence[TrainingRun]) -> str:
    """Returns the section with a figure for each metric of these runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    if not names:
        return page.section("curves", "Training", page.paragraph("There is no number in any `metrics.jsonl` of these runs."))
    logging.info("%d training curves", len(names))

    def draw_grid(metrics: Iterable[str]) -> str:
        svgs = [
            (name, figures.curves(f"curve-{names.index(name)}", name, [run.curves.get(name, ([], [])) for run in runs]))
            for name in metrics
        ]
        return '<div class="grid">' + "".join(page.figure(svg, name, "curve", above=True) for name, svg in svgs) + "</div>"

    others = sorted(name for name in names if name not in MAIN_METRICS)
    folded = f"<details><summary>{len(others)} more</summary>{draw_grid(others)}</details>" if others else ""
    legend = page.legend([run.label for run in runs], figures.legend_glyphs(len(runs), figures.LINE_GLYPHS))
    return page.section("curves", "Training", legend, draw_grid(name for name in MAIN_METRICS if name in names), folded)
