"""The sections of a report about one run's encoder: similarities, a map, and nearest neighbours of held-out spans.

Dimensions: n pairs, e embedding.
"""

import numpy as np
from absl import logging

from contrastive_jax.reporting import figures, page, projection
from contrastive_jax.reporting.held_out import HeldOutSpans

QUERY_SPANS, NEIGHBOURS = 8, 3  # rows of the table of neighbours: so many spans, with so many neighbours each


def spans_sections(spans: HeldOutSpans, suffix: str) -> str:
    """Returns all sections about the spans of one run; `suffix` ends their ids."""
    similarity = spans.z[:, 0] @ spans.z[:, 1].T
    return "".join(
        [
            page.section(
                f"histogram{suffix}",
                "Similarity of positives and of negatives",
                histogram_figure(similarity, f"histogram{suffix}"),
                level=3,
            ),
            page.section(f"matrix{suffix}", "Queries × keys", matrix_figure(similarity, f"matrix{suffix}"), level=3),
            page.section(f"map{suffix}", "Map", *map_figure(spans, f"map{suffix}"), level=3),
            page.section(
                f"neighbours{suffix}",
                "Nearest neighbours",
                page.paragraph(
                    f"Among all {len(spans.texts):,} spans, by cosine similarity; ✓ marks the other span of the same pair. "
                    f"Texts are truncated to {page.MAX_CHARACTERS} characters."
                ),
                neighbours_table(spans),
                level=3,
            ),
        ]
    )


def histogram_figure(similarity: np.ndarray, name: str) -> str:
    """Returns the HTML of a histogram of a similarity matrix [n n], whose diagonal holds the positives.

    `name` distinguishes the figure from the others of the page; see `figures.to_svg`.
    """
    n = len(similarity)
    positives, negatives = np.diagonal(similarity), similarity[~np.eye(n, dtype=bool)]
    caption = f"{n:,} pairs of neighbouring held-out spans. Negatives: each query with all other keys."
    return page.figure(figures.histogram(name, positives, negatives), caption)


def matrix_figure(similarity: np.ndarray, name: str) -> str:
    """Returns the image of the first rows and columns of a similarity matrix [n n]."""
    count = min(len(similarity), figures.MATRIX_SIZE)
    caption = f"The first {count} pairs; the positives lie on the diagonal."
    return page.figure(figures.matrix(name, similarity), caption, "square")


def map_figure(spans: HeldOutSpans, name: str) -> tuple[str, str]:
    """Draws a t-SNE scatter plot of all spans, coloured by domain.

    Args:
      spans: the spans with their embeddings and domains.
      name: different for each figure of the page; see `figures.to_svg`.

    Returns:
      (the HTML of the plot, the HTML of its legend).
    """
    count = len(spans.texts)
    logging.info("map of %d spans by t-SNE", count)
    points = projection.project_to_plane(spans.z.reshape(count, -1))  # [n 2 e] -> [2n e]
    domain_of_span = np.repeat(spans.domain, 2)  # both spans of a pair share its domain
    caption = (
        f"{count:,} held-out spans by domain: PCA to at most {projection.PCA_DIMS} coordinates, then t-SNE with a fixed seed. "
        "The map shows which spans are neighbours; distances between groups and the sizes of groups mean nothing."
    )
    domain_names = [spans.domains[index] for index in np.unique(spans.domain)]
    legend = page.legend(domain_names, figures.legend_glyphs(len(domain_names), figures.MARKER_GLYPHS))
    return page.figure(figures.scatter(name, points, domain_of_span), caption), legend


def neighbours_table(spans: HeldOutSpans) -> str:
    """Returns the HTML of a table: a few queries, from as many domains as possible, and the nearest other spans of each."""
    # The spans lie as query 0, key 0, query 1, key 1, ...: pair i has the spans 2 i and 2 i + 1.
    z = spans.z.reshape(len(spans.texts), -1)  # [n 2 e] -> [2n e]
    domain_name_of_span = [spans.domains[index] for index in np.repeat(spans.domain, 2)]
    queries = 2 * projection.choose_across_domains(spans.domain, QUERY_SPANS)
    similarities, neighbours = projection.nearest_neighbours(z, queries, min(NEIGHBOURS, len(z) - 1))
    rows: list[list[str | float]] = []
    for query, query_similarities, query_neighbours in zip(queries, similarities, neighbours, strict=True):
        for rank, (similarity, neighbour) in enumerate(zip(query_similarities, query_neighbours, strict=True)):
            # A query is named in its first row only; the next rows continue it.
            query_cells = [domain_name_of_span[query], spans.texts[query]] if rank == 0 else ["", ""]
            same_pair = "✓" if neighbour == query + 1 else ""
            rows.append([*query_cells, f"{similarity:.3f}", same_pair, spans.texts[neighbour], domain_name_of_span[neighbour]])
    return page.table(["domain", "span", "similarity", "pair", "nearest other spans", "domain"], rows, kind="texts")
