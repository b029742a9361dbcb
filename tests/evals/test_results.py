"""Results and their protocols."""

import json
import pathlib

import pytest
from etils import epath

from contrastive_jax.config import UserError
from contrastive_jax.evals import results


def test_results_of_two_protocols_are_not_put_side_by_side(tmp_path: pathlib.Path) -> None:
    def result(name: str, pooling: str, score: float, task: str = "sts") -> results.Result:
        path = epath.Path(tmp_path / name)
        results.write_result(path, task, {"test": {"spearman": score}}, {"model": name, "pooling": pooling})
        return results.read_result(path, name)

    a, b, c = result("a", "mean", 0.81), result("b", "mean", 0.82), result("c", "cls", 0.83)
    assert a.stamp == b.stamp != c.stamp
    shown = results.compare_results([a, b], any_protocol=False)
    assert "81.00" in shown and "82.00" in shown and "note" not in shown
    with pytest.raises(UserError, match=r"a and c were measured differently: pooling \('mean', 'cls'\); --any_protocol"):
        results.compare_results([a, b, c], any_protocol=False)
    shown = results.compare_results([a, c], any_protocol=True)
    assert "83.00" in shown and "note: a and c were measured differently" in shown
    with pytest.raises(UserError, match="give two files or more"):
        results.compare_results([a], any_protocol=False)
    with pytest.raises(UserError, match="a is of sts, d of knn"):
        results.compare_results([a, result("d", "mean", 0.5, "knn")], any_protocol=False)
    (tmp_path / "e").write_text("{}")
    with pytest.raises(UserError, match="e: not what evaluate writes"):
        results.read_result(epath.Path(tmp_path / "e"), "e")


def test_older_query_key_results_are_read_as_todays(tmp_path: pathlib.Path) -> None:
    today, older = epath.Path(tmp_path / "today.json"), epath.Path(tmp_path / "older.json")
    protocol = {"model": "a", "pooling": "mean", "pairs": 40}
    rows = {"mean": {"top1": 0.75}, "chance: mean": {"top1": 0.25}}
    results.write_result(today, "query_key", rows, protocol | {"input": "tokens"})
    nested = {"chance": {"mean": {"top1": 0.25}}, "step 10": {"mean": {"top1": 0.75}}}
    older.write_text(json.dumps({"task": "query_key", "protocol": protocol, "protocol_hash": "0" * 16, "results": nested}))
    both = [results.read_result(path, path.stem) for path in (today, older)]
    assert both[0]._replace(label="") == both[1]._replace(label="")
    assert "chance: mean, × 100" in results.compare_results(both, any_protocol=False)
