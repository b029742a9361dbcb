"""Runs and results as one page: `python -m contrastive_jax.report --out=report.html runs/a runs/b results.json`.

Each argument is the workdir of a run, or a .json that evaluate wrote. The page has the results, those of another protocol
apart; the training curves of all runs over one another; and, of each run's newest checkpoint on its held-out pairs, how similar
pairs are and what is no pair, a map of the spans, and the neighbours of a few. It is one file that needs no network. The same
spans go to WORKDIR/projector/, where TensorBoard's projector finds them.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict
from tensorboard.plugins import projector

from contrastive_jax import cli, processes, text_model
from contrastive_jax import results as results_lib
from contrastive_jax.data import pipeline, tokenizer
from contrastive_jax.evals import embed, projection, query_key
from contrastive_jax.reporting import figures, page, written

FIRST = ("loss", "in_batch_top1", "query_key/top1", "query_key/top5", "temperature", "gradient_norm")  # the rest folds away
PAIRS = 1000  # shown of a run
NEIGHBOURS, TEXTS, LETTERS = 3, 8, 160


class Spans(NamedTuple):
    """Held-out pairs as a run's encoder sees them.

    Attributes:
      step: of the checkpoint.
      z: float32[n 2 e], unit vectors.
      domain: int64[n], index into `domains`.
      domains: names.
      texts: 2 n texts: of each pair the query, the key.
    """

    step: int
    z: np.ndarray
    domain: np.ndarray
    domains: list[str]
    texts: list[str]


def define_flags() -> None:
    """The flags of the command."""
    flags.DEFINE_string("out", None, "The page, an .html.", required=True)
    flags.DEFINE_string("data", None, "Prepared dataset of the held-out pairs; by default each run's own.")


def differences(protocol: dict[str, Any], first: dict[str, Any]) -> str:
    """Which keys of how it was measured differ from those of another protocol, and their values there."""

    def shown(value: Any) -> str:
        return cut(value if isinstance(value, str) else json.dumps(value), 40)

    rows = results_lib.differences(protocol, first)
    return "; ".join(f"`{key}` is {shown(ours)}, there {shown(other)}" for key, ours, other in rows)


def results_section(results: Sequence[results_lib.Result]) -> str:
    """A table for each task and protocol."""
    if not results:
        return page.section(
            "results", "Results", page.paragraph("None of these runs was evaluated: `evaluate --model=WORKDIR`.")
        )
    sections = []
    groups: dict[str, dict[str, list[results_lib.Result]]] = {}
    for result in results:
        groups.setdefault(result.task, {}).setdefault(result.stamp, []).append(result)
    for task, protocols in groups.items():
        parts = []
        first = next(iter(protocols.values()))[0]
        for stamp, members in protocols.items():
            if stamp != first.stamp:
                differ = differences(members[0].protocol, first.protocol)
                kind = "Other data" if differ.startswith("`data`") and ";" not in differ else "Another protocol"
                parts.append(page.paragraph(f"{kind} than {first.stamp}, not to be compared: {differ}", "flag"))
            measures = list(dict.fromkeys(measure for member in members for row in member.rows for measure in row[2]))
            rows: list[list[str | float]] = []
            for member in members:
                for number, (name, direction, found) in enumerate(member.rows):
                    cells = [100 * found[key] if key in found else "–" for key in measures]
                    again = number > 0 and member.rows[number - 1][0] == name
                    rows.append(["" if number else member.label, "" if again else name, direction, *cells])
            head = ["model", "row", "direction", *measures]
            if not any(row[2] for row in rows):
                head, rows = head[:2] + head[3:], [row[:2] + row[3:] for row in rows]
            parts.append(page.table(head, rows, "results", f"Protocol {stamp}, × 100"))
        sections.append(page.section(f"results-{task}", task, *parts, level=3))
    return page.section("results", "Results", *sections)


def curves_section(runs: Sequence[written.Run]) -> str:
    """Each metric of all runs over one another; what is looked at first comes first."""
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    if not names:
        return page.section("curves", "Training", page.paragraph("No `metrics.jsonl` with a number in it."))
    logging.info("%d training curves", len(names))

    def drawn(chosen: Iterable[str]) -> str:
        svgs = [
            (name, figures.curves(f"curve-{names.index(name)}", name, [run.curves.get(name, ([], [])) for run in runs]))
            for name in chosen
        ]
        return '<div class="grid">' + "".join(page.figure(svg, name, "curve", above=True) for name, svg in svgs) + "</div>"

    rest = sorted(name for name in names if name not in FIRST)
    more = f"<details><summary>{len(rest)} more</summary>{drawn(rest)}</details>" if rest else ""
    legend = page.legend([run.label for run in runs], figures.glyphs(len(runs), figures.LINES))
    return page.section("curves", "Training", legend, drawn(name for name in FIRST if name in names), more)


def cut(text: str, size: int) -> str:
    """A text in one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= size else line[: size - 1].rstrip() + "…"


def look(run: written.Run, data: str | None) -> Spans:
    """Embeds the first held-out pairs of a run's own query-key test.

    Raises:
      ValueError: the data or a checkpoint is missing or cannot be read; the message says what to give.
    """
    config = ConfigDict(json.loads((run.path / "config.json").read_text()))
    folder = epath.Path(data or config.data.dir)
    if not (folder / "manifest.json").exists():
        raise ValueError(f"{run.path}: its data was not found in {folder}; say where a prepared dataset is: `--data=DIR`")
    model = text_model.open_model(str(run.path))
    words = tokenizer.load(folder)
    if text_model.words_of(run.path, config).sha256 != words.sha256:
        raise ValueError(
            f"{folder}: its tokenizer is not that of {run.path}; give `--data=DIR` of a dataset prepared with that"
        )
    windows = pipeline.open_split(folder, "validation")
    pairs = query_key.make_pairs(windows, config.eval, config.data)
    tokens, mask = pairs.tokens[:PAIRS], pairs.mask[:PAIRS]
    n, v, length = tokens.shape
    logging.info("%s: embedding %d held-out pairs", run.path, n)
    z = embed.embed(model.forward, tokens.reshape(n * v, length), mask.reshape(n * v, length), config.eval.batch_size)
    texts = [cut(words.decode(span), LETTERS) for pair in pairs.spans[:PAIRS] for span in pair]
    domain = windows.domain[pairs.record[:PAIRS]].astype(np.int64)
    return Spans(model.protocol["step"], z.reshape(n, v, -1), domain, windows.domains, texts)


def write_projector(workdir: epath.Path, spans: Spans) -> None:
    """The spans for TensorBoard's projector: WORKDIR/projector/ and the file that points there."""
    folder = workdir / "projector"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tensors.tsv").open("w") as file:
        np.savetxt(file, spans.z.reshape(len(spans.texts), -1), fmt="%.5g", delimiter="\t")
    names = [spans.domains[kind] for kind in np.repeat(spans.domain, 2)]
    lines = [f"{cut(name, LETTERS)}\t{text}\n" for name, text in zip(names, spans.texts, strict=True)]
    (folder / "metadata.tsv").write_text("domain\ttext\n" + "".join(lines))
    config = projector.ProjectorConfig()
    config.embeddings.add(
        tensor_name=f"held-out spans, step {spans.step}",
        tensor_path="projector/tensors.tsv",
        metadata_path="projector/metadata.tsv",
    )
    projector.visualize_embeddings(str(workdir), config)
    logging.info("the same spans in TensorBoard: tensorboard --logdir=%s, PROJECTOR", workdir)


def neighbours_table(spans: Spans) -> str:
    """A few spans, of as many domains as there are, and the nearest others of each."""
    z = spans.z.reshape(len(spans.texts), -1)
    chosen = 2 * projection.one_of_each(spans.domain, TEXTS)
    similarity, places = projection.neighbours(z, chosen, min(NEIGHBOURS, len(z) - 1))
    rows: list[list[str | float]] = []
    for query, found, where in zip(chosen, similarity, places, strict=True):
        for rank, (near, place) in enumerate(zip(found, where, strict=True)):
            begin = [spans.domains[spans.domain[query // 2]], spans.texts[query]] if rank == 0 else ["", ""]
            pair = "✓" if place == query + 1 else ""
            rows.append([*begin, f"{near:.3f}", pair, spans.texts[place], spans.domains[spans.domain[place // 2]]])
    return page.table(["domain", "span", "similarity", "pair", "nearest other spans", "domain"], rows, "texts")


def spans_sections(spans: Spans, suffix: str) -> str:
    """What one run's encoder does with held-out spans; `suffix` ends the ids."""
    n = len(spans.domain)
    similarity = spans.z[:, 0] @ spans.z[:, 1].T
    positives, negatives = np.diagonal(similarity), similarity[~np.eye(n, dtype=bool)]

    def titled(name: str, title: str, *parts: str) -> str:
        return page.section(name + suffix, title, *parts, level=3)

    logging.info("map of %d spans by t-SNE", 2 * n)
    places = projection.plane(spans.z.reshape(2 * n, -1))
    histogram = figures.histogram(f"histogram{suffix}", positives, negatives)
    matrix = figures.matrix(f"matrix{suffix}", similarity)
    scatter = figures.scatter(f"map{suffix}", places, np.repeat(spans.domain, 2))
    present = [spans.domains[kind] for kind in np.unique(spans.domain)]
    return "".join(
        [
            titled(
                *("histogram", "Similarity of positives and of negatives"),
                page.figure(
                    histogram, f"{n:,} pairs of neighbouring held-out spans; negatives: each query with all other keys."
                ),
            ),
            titled(
                *("matrix", "Queries × keys"),
                page.figure(matrix, f"The first {min(n, figures.MATRIX)} pairs: the diagonal is right.", "square"),
            ),
            titled(
                *("map", "Map"),
                page.figure(
                    scatter,
                    f"{2 * n:,} held-out spans by domain: PCA to at most {projection.PCA_DIMS} coordinates, then t-SNE with a "
                    "fixed seed. Who is whose neighbour may be read; distances between groups and their sizes may not.",
                ),
                page.legend(present, figures.glyphs(len(present), figures.GLYPHS)),
            ),
            titled(
                *("neighbours", "Nearest neighbours"),
                page.paragraph(f"Among all {2 * n:,} spans, by cosine similarity; texts end at {LETTERS} characters."),
                neighbours_table(spans),
            ),
        ]
    )


def make(names: Sequence[str], data: str | None = None) -> str:
    """The page.

    Raises:
      ValueError: an argument is not as it should be; the message names it.
    """
    runs, results = written.read(names)
    if data and not (epath.Path(data) / "manifest.json").exists():
        raise ValueError(f"--data={data}: no manifest.json there; give a folder that `python -m contrastive_jax.prepare` wrote")
    sections, links = [results_section(results)], [("results", "Results")]
    if runs:
        sections.append(curves_section(runs))
        links.append(("curves", "Training"))
    for number, run in enumerate(runs, 1):
        suffix = f"-{number}" if len(runs) > 1 else ""
        try:
            spans = look(run, data)
        except ValueError as error:
            logging.warning("%s", error)
            body = page.paragraph(str(error), "flag")
        else:
            try:
                write_projector(run.path, spans)
            except OSError as error:  # a run of somebody else may be read only
                logging.warning("no files for TensorBoard's projector: %s", error)
            body = page.paragraph(f"The checkpoint of step {spans.step:,} on held-out spans.") + spans_sections(spans, suffix)
        sections.append(page.section(f"run{suffix}", run.label, body))
        links.append((f"run{suffix}", run.label))
    labels = [run.label for run in runs]
    alone = [result.label for result in results if result.label.partition(",")[0] not in labels]
    title = "Report of " + ", ".join(dict.fromkeys(labels + alone))
    return page.document(cut(title, LETTERS), links, sections)


def main(argv: list[str]) -> None:
    """The command."""
    processes.enable_compilation_cache()
    given = flags.FLAGS
    with cli.user_errors():
        out = epath.Path(given.out)
        if out.suffix != ".html" or given.out.startswith("--") or not out.parent.is_dir():
            raise ValueError(f"--out={given.out}: give it as --out=FILE.html, in a folder that is there")
        out.write_text(make(argv[1:], given.data))
        logging.info("written to %s, %.1f MB", out, out.stat().length / 1e6)


if __name__ == "__main__":
    define_flags()
    cli.run(main, positional=True)
