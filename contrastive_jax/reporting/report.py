"""Makes the page of a report: results, training curves, and what each run's encoder does with held-out spans."""

from collections.abc import Sequence

from absl import logging

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.evals.results import Result
from contrastive_jax.reporting import held_out, inputs, page
from contrastive_jax.reporting.curves_section import curves_section
from contrastive_jax.reporting.results_section import results_section
from contrastive_jax.reporting.spans_section import spans_sections


def make_report(names: Sequence[str], data: str | None = None) -> str:
    """Returns the page as HTML; also writes each run's held-out spans to WORKDIR/projector/ for TensorBoard.

    Args:
      names: workdirs of runs, and .json files that `evaluate` wrote.
      data: the folder of a prepared dataset with the held-out pairs; None: that of each run's config.

    Raises:
      UserError: an argument cannot be read; the message names it.
    """
    runs, results = inputs.read_inputs(names)
    if data and not (files.absolute(data) / "manifest.json").exists():
        raise UserError(f"--data={data}: no manifest.json there; give a folder that `python -m contrastive_jax prepare` wrote")
    sections, links = [results_section(results)], [("results", "Results")]
    if runs:
        sections.append(curves_section(runs))
        links.append(("curves", "Training"))
    for number, run in enumerate(runs, 1):
        suffix = f"-{number}" if len(runs) > 1 else ""
        sections.append(page.section(f"run{suffix}", run.label, run_body(run, data, suffix)))
        links.append((f"run{suffix}", run.label))
    return page.html_page(title(runs, results), links, sections)


def run_body(run: inputs.TrainingRun, data: str | None, suffix: str) -> str:
    """Returns the HTML of one run: its held-out spans, or the reason why they cannot be shown.

    Args:
      run: the run.
      data: see `make_report`.
      suffix: the end of all ids in it, different for each run.
    """
    try:
        spans = held_out.embed_held_out(run.workdir, data)
    except UserError as error:
        logging.warning("%s", error)
        return page.paragraph(str(error), "flag")
    try:
        held_out.write_projector(run.workdir, spans)
    except OSError as error:  # somebody else's run may be read-only
        logging.warning("no files for TensorBoard's projector: %s", error)
    return page.paragraph(f"The checkpoint of step {spans.step:,} on held-out spans.") + spans_sections(spans, suffix)


def title(runs: Sequence[inputs.TrainingRun], results: Sequence[Result]) -> str:
    """Returns the title of the page: the runs and the results that belong to none of them."""
    labels = [run.label for run in runs]
    labels += [result.label for result in results if result.label.partition(",")[0] not in labels]
    return page.shorten("Report of " + ", ".join(dict.fromkeys(labels)))
