"""Prompts of a source of pairs: a run, its export and sentence-transformers send the ids that training saw."""

import json
import pathlib

import pytest
from conftest import recipe, shrink

import contrastive_jax
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.data.preparation import prepare
from contrastive_jax.inference import export, text_model

ROWS = [{"query": f"the cat {i}", "document": f"A dog {i * i} ran on a mat"} for i in range(60)]


@pytest.mark.filterwarnings("default")  # torch's and transformers' own
@pytest.mark.parametrize("document_prompt", ["a text: ", ""])
def test_all_sides_send_the_ids_that_training_saw(document_prompt: str, dataset: pathlib.Path, tmp_path: pathlib.Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    source = f'[pets]\nfiles = "rows.jsonl"\nquery_prompt = "ask: "\ndocument_prompt = "{document_prompt}"'
    (tmp_path / "pairs.toml").write_text(source)
    prepare.prepare(
        tmp_path / "data", pairs=str(tmp_path / "pairs.toml"), tokenizer=str(dataset), workers=1, validation_fraction=0.2
    )
    config = shrink(recipe("bert_base"), dataset)
    config.update(steps=2)
    config.model.update(dtype="float32", max_length=48)
    config.data.update(dir=str(tmp_path / "data"), sampler="fields", length=48, max_span=46)
    contrastive_jax.train(config, tmp_path / "run")
    batch = next(pipeline.batches(prepared.open_split(config.data.dir, "train"), config.data, 0))
    seen = {tuple(row[row > 0].tolist()) for view in (0, 1) for row in batch.tokens[:, view, 0]}
    model = text_model.load(str(tmp_path / "run"))
    export.export(model, tmp_path / "out")
    theirs = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    export.export(model, tmp_path / "documents", "document")
    alone = st.SentenceTransformer(str(tmp_path / "documents"), device="cpu")
    assert alone.prompts[alone.default_prompt_name or "document"] == alone.prompts["document"] == document_prompt
    found = 0
    for row in ROWS:
        for view, key in (("query", "query"), ("document", "document")):
            (ids,) = model.tokenize([row[key]], view)
            sent = theirs.tokenize([theirs.prompts[view] + row[key]])["input_ids"][0].tolist()
            assert sent == list(ids), (sent, ids)
            found += tuple(ids) in seen
    assert found == len(seen) == 2 * config.data.batch_size
