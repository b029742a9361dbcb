"""Evaluation during training: the scores of tasks, and the best checkpoint stays."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import recipe, shrink
from etils import epath
from ml_collections import ConfigDict

import contrastive_jax
from contrastive_jax.config import UserError
from contrastive_jax.data import tokenizer
from contrastive_jax.evals import in_training
from contrastive_jax.inference import text_model
from contrastive_jax.runtime import checkpoint
from contrastive_jax.training import loop


@pytest.fixture(scope="module")
def data(dataset: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The dataset with a tokenizer, and beside it a task of similarity."""
    root = tmp_path_factory.mktemp("tasks")
    shutil.copytree(dataset, root / "prepared")
    made = tokenizer.train([f"the cat {i} sat on a mat, a dog {i * i} ran" for i in range(80)], 300)
    (root / "prepared" / made.file).write_bytes(made.model)
    (root / "pets").mkdir()
    (root / "pets" / "dev.tsv").write_text("5\tthe cat\tthe cat sat\n1\ta dog ran\tthe cat\n3\ta mat\ta cat sat on a mat\n")
    return root


def config_of(data: pathlib.Path, **more: object) -> ConfigDict:
    config = shrink(recipe("debug"), data / "prepared")
    config.update(steps=6, eval_every=1, checkpoint_every=1, keep=1, **more)
    config.eval.tasks = f"sts={data / 'pets'}"
    return config


def test_scores_reach_the_metrics_and_the_best_checkpoint_stays(
    data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sts-pets/dev/pearson"
    # The task's score is recorded and replaced, so that a step in the middle is the best.
    replaced, scored = iter([0.1, 0.9, 0.2, 0.3]), []
    real = in_training.Evaluator.__call__

    def evaluate(self: in_training.Evaluator, params: object, step: int) -> in_training.Scores:
        scores = real(self, params, step)
        scored.append(scores[name])
        return scores | {name: next(replaced)}

    monkeypatch.setattr(in_training.Evaluator, "__call__", evaluate)
    assert loop.train(contrastive_jax.set_up(config_of(data, keep_best=name), epath.Path(tmp_path)), stop_at=3) == 3
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert steps == [1, 3]  # the best, the newest
    assert text_model.load(f"{tmp_path}@best").step == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line[name] for line in lines if "query_key/mean/mrr" in line] == [0.1, 0.9, 0.2, 0.3]
    # The recorded score is what the checkpoint's vectors give.
    z = text_model.load(str(tmp_path)).encode(["the cat", "a dog ran", "a mat", "the cat sat", "the cat", "a cat sat on a mat"])
    cosine = (z[:3] * z[3:]).sum(-1)
    assert np.corrcoef([5, 1, 3], cosine)[0, 1] == pytest.approx(scored[-1], abs=1e-4)


def test_without_scores_there_is_no_best(tmp_path: pathlib.Path) -> None:
    checkpoints = checkpoint.Checkpoints(epath.Path(tmp_path), keep=1)
    for step, score in ((1, None), (2, 0.5), (3, 0.5), (4, None)):
        assert checkpoints.best() == (2 if step > 2 else None)
        checkpoints.save(step, {"score": score}, params={"x": jax.numpy.ones(2)})
        checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()
    again = checkpoint.Checkpoints(epath.Path(tmp_path), read_only=True)
    assert again.best() == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"keep_best": "sts-pets/test/spearman"},
            "config.keep_best=sts-pets/test/spearman: no such score; there are query_key/query_to_key/top1",
        ),
        ({"keep_best": "loss"}, "config.keep_best=loss: no such score; they begin with query_key, sts-pets"),
        ({"keep_best": "query_key/top5"}, "config.keep_best=query_key/top5: a score is TASK/ROW/MEASURE"),
        ({"keep_best": "query_key/mean/mrr", "eval_every": 0}, "config.keep_best=query_key/mean/mrr: there are no scores"),
        (
            {"keep_best": "query_key/mean/mrr", "eval_every": 2, "checkpoint_every": 3},
            "config.checkpoint_every=3 must be a multiple",
        ),
        ({"eval.tasks": "sts=nowhere"}, "config.eval.tasks=sts=nowhere: --data=nowhere: --tasks=sts needs the folder"),
        ({"eval.tasks": "sts"}, "config.eval.tasks=sts: give the data of sts, sts=DATA"),
        ({"eval.tasks": "sts=a/dev,sts=b/dev"}, "two tasks would be called sts-dev; name their last folders differently"),
        ({"eval.tasks": "glue=x"}, "no task 'glue' in training; give TASK=DATA of query_key, information, sts, "),
    ],
)
def test_what_cannot_be_scored_is_named(
    changed: dict[str, object], message: str, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = config_of(data)
    config.update_from_flattened_dict(changed)
    with pytest.raises(UserError) as error:
        loop.train(contrastive_jax.set_up(config, epath.Path(tmp_path)), stop_at=1)
    assert message in str(error.value)
