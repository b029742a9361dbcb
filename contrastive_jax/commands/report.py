"""Makes one HTML page of training runs and results of evaluations.

    contrastive-jax report --output=report.html runs/a runs/b results.json

Each argument is the workdir of a run, or a .json file that `evaluate` wrote. The page shows the results (those measured by
different protocols in different tables), the training curves of all runs, and what each run's newest checkpoint does with its
held-out pairs: histograms of similarities, a map, and nearest neighbours. It is one file that needs no network. The same spans
are written to WORKDIR/projector/ for TensorBoard's projector.
"""

from absl import flags, logging

from contrastive_jax import files
from contrastive_jax.config import UserError
from contrastive_jax.files import transfer
from contrastive_jax.reporting import report
from contrastive_jax.runtime import processes

POSITIONAL = True


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("output", None, "The page to write, FILE.html.", required=True)
    flags.DEFINE_string("data", None, "Prepared dataset with the held-out pairs; by default the one of each run.")


def main(arguments: list[str]) -> None:
    """Makes the page and writes it."""
    processes.enable_compilation_cache()
    values = flags.FLAGS
    output = files.absolute(values.output)
    if values.output.startswith("--"):
        raise UserError(f"--output={values.output}: give --output=FILE.html")
    transfer.check_output(output, ".html")
    html = report.make_report(arguments, values.data)
    files.write_text(output, html)
    logging.info("written to %s, %.1f MB", output, len(html.encode()) / 1e6)
