"""The order of the data: exact epochs, exact shares, and permutations that have nothing to do with one another."""

import pathlib
import types

import numpy as np
import pytest
from conftest import write_dataset

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import order, pipeline, prepared, store

STEP_PAIRS = 256


def synthetic(records: int, domains: int = 1, **changes: object) -> order.Order:
    """The order of records that do not exist, in chunks of up to 128 whose domains take turns; one in 50 is too short."""
    sizes = np.diff(np.arange(0, records + 128, 128).clip(max=records))
    usable = (sizes - np.arange(len(sizes)) % 50 // 49).astype(np.uint8)
    names = [f"d{i}" for i in range(domains)]
    split = types.SimpleNamespace(
        domains=names, datasets={"all": list(range(domains))}, chunk_domain=(np.arange(len(sizes)) % domains).astype(np.uint16)
    )
    config = default_config().data
    config.update({"batch_size": STEP_PAIRS} | {name: value for name, value in changes.items() if name != "seed"})
    return order.Order(split, config, int(changes.get("seed", 0)), usable)


def record_numbers(data: order.Order, first: int, steps: int, pairs: int = STEP_PAIRS) -> np.ndarray:
    """The records of some steps, counted over those that can be sampled, int64[steps pairs]."""
    base = np.cumsum(data.usable, dtype=np.int64) - data.usable
    located = [data.locate(step, np.arange(pairs)) for step in range(first, first + steps)]
    return np.stack([base[chunk] + number for chunk, number in located])


@pytest.mark.parametrize(
    ("records", "pairs", "shuffled"),
    [(100, 256, 131_072), (14_460, 256, 131_072), (14_460, 48, 4000), (1_000_000, 4096, 131_072)],
)
def test_b2_every_record_comes_exactly_once_per_epoch(records: int, pairs: int, shuffled: int) -> None:
    data = synthetic(records, batch_size=pairs, shuffle_records=shuffled)
    count = int(data.usable.sum(dtype=np.int64))
    numbers = record_numbers(data, 0, 2 * count // pairs + 1, pairs).reshape(-1)
    for epoch in range(2):
        assert (np.bincount(numbers[epoch * count : (epoch + 1) * count], minlength=count) == 1).all()


def test_b2_every_pool_has_exact_epochs_and_an_exact_share() -> None:
    weights = (("d2", 5.0), ("d0", 2.0), ("d1", 1.0))
    data = synthetic(12_000, domains=3, weights=weights, shuffle_records=4000)
    numbers = record_numbers(data, 0, order.BLOCK // STEP_PAIRS)
    domain = np.searchsorted(np.cumsum(data.usable), numbers, side="right") % 3
    assert np.bincount(domain.reshape(-1)).tolist() == [order.BLOCK // 4, order.BLOCK // 8, order.BLOCK // 8 * 5]
    for step in domain:  # evenly spread: within two pairs in each batch
        assert (np.abs(np.bincount(step) - STEP_PAIRS / 8 * np.array([2, 1, 5])) <= 2).all()
    for pool in range(3):
        own = numbers.reshape(-1)[domain.reshape(-1) == pool]
        count = int(data.usable[pool::3].sum())
        assert (np.unique(own[:count], return_counts=True)[1] == 1).all() and len(np.unique(own[:count])) == count


def test_b3_the_permutations_of_epochs_and_seeds_have_nothing_in_common() -> None:
    """Fixed points, XOR masks, and the largest overlap of two batches; of random permutations, 1, 3,400 and 9 to 14."""
    records, pairs = 4096, 128
    for other in (synthetic(records, batch_size=pairs, seed=1), None):
        data = synthetic(records, batch_size=pairs)
        count = int(data.usable.sum())
        one = record_numbers(data, 0, -(-count // pairs), pairs).reshape(-1)[:count]
        if other is None:
            two = record_numbers(data, count // pairs, count // pairs + 2, pairs).reshape(-1)[count % pairs :][:count]
        else:
            two = record_numbers(other, 0, -(-count // pairs), pairs).reshape(-1)[:count]
        assert sorted(one) == sorted(two)
        assert (one == two).sum() <= 7
        place = np.argsort(two)  # of each record
        assert len(np.unique(np.arange(count) ^ place[one])) > 2300
        shared = np.zeros((count // pairs + 1, count // pairs + 1), int)
        np.add.at(shared, (np.arange(count) // pairs, place[one] // pairs), 1)
        assert shared[:-1, :-1].max() < 18


@pytest.mark.parametrize("changes", [{}, {"weights": (("d1", 3.0), ("d0", 1.0))}, {"one_source": "domain"}])
def test_a_process_needs_few_chunks_of_a_window(changes: dict) -> None:
    """The quarter of each batch that one of four processes makes takes about a quarter of the chunks."""
    data = synthetic(40_000, domains=2, shuffle_records=20_000, **changes)
    steps = 20_000 // STEP_PAIRS
    chunks = [set(np.concatenate([data.locate(k, np.arange(a, a + 64))[0] for k in range(steps)])) for a in range(0, 256, 64)]
    everything = set().union(*chunks)
    assert sum(map(len, chunks)) < 1.25 * len(everything)


def test_one_source_takes_each_batch_from_one_domain_in_turns() -> None:
    data = synthetic(30_000, domains=3, one_source="domain", weights=(("d0", 1.0), ("d1", 1.0), ("d2", 2.0)))
    domain = np.searchsorted(np.cumsum(data.usable), record_numbers(data, 0, 64), side="right") % 3
    assert (domain == domain[:, :1]).all()
    assert (np.abs(np.bincount(domain[:, 0]) - [16, 16, 32]) <= 2).all()


def test_five_sources_of_very_different_sizes_have_the_shares_of_alpha() -> None:
    sizes = [10**power for power in (2, 3, 4, 5, 6)]
    chunks = [np.diff(np.arange(0, size + 128, 128).clip(max=size)).astype(np.uint8) for size in sizes]
    domain = np.repeat(np.arange(5), [*map(len, chunks)]).astype(np.uint16)
    split = types.SimpleNamespace(domains=[*"abcde"], datasets={"all": [*range(5)]}, chunk_domain=domain)
    config = default_config().data
    config.update(batch_size=64, one_source="domain", alpha=0.5)
    data, counts = order.Order(split, config, 0, np.concatenate(chunks)), np.zeros(5)
    for step in range(10_000):
        sources = domain[data.locate(step, np.arange(64) if step % 50 == 0 else np.arange(1))[0]]
        assert (sources == sources[0]).all()
        counts[sources[0]] += 1
    shares = np.sqrt(sizes) / np.sqrt(sizes).sum()
    assert (np.abs(counts - 10_000 * shares) <= 2).all()
    whole = data.locate(77, np.arange(64))
    for processes in (2, 4):
        parts = [data.locate(77, own) for own in np.split(np.arange(64), processes)]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_alpha_evens_out_the_domains() -> None:
    sizes = np.array([9_000.0, 1_000.0])
    np.testing.assert_array_equal(order.quotas(sizes**0.0), [order.BLOCK / 2] * 2)
    assert order.quotas(sizes**0.5).tolist() == [order.BLOCK * 3 / 4, order.BLOCK / 4]
    assert order.quotas(np.array([1e9, 1.0, 1.0]), minimum=1).tolist() == [order.BLOCK - 2, 1, 1]
    for count in (1000, order.BLOCK - 1, order.BLOCK):  # with many tiny pools
        quota = order.quotas(np.r_[np.full(count - 1, 1e-3), 1e9], minimum=1)
        assert quota.tolist() == [1] * (count - 1) + [order.BLOCK - count + 1]
    assert order.quotas(np.ones(order.BLOCK), minimum=1).tolist() == [1] * order.BLOCK
    shares = order.quotas(np.r_[np.full(100, 1e-9), 0.75, 0.25], minimum=1)[-2:]
    assert shares.sum() == order.BLOCK - 100 and abs(shares[0] - 3 * shares[1]) <= 2
    even = record_numbers(synthetic(3_200, domains=2, alpha=0.0), 0, 8)
    assert even.shape == (8, STEP_PAIRS)


def test_many_pools_make_each_window_and_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pools have very different shares, so that the windows of some last much longer than those of others."""
    made: list[tuple] = []
    for kind, name in ((order.Order, "_make_window"), (order.Order, "_make_epoch"), (order.Deal, "_make_block")):
        function = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, name=name, function=function: made.append((name, *a[1:])) or function(*a))
    weights = tuple((f"d{i}", 0.001 if i < 8 else 1.0) for i in range(12))
    data = synthetic(60_000, domains=12, weights=weights, shuffle_records=2000, batch_size=2048)
    record_numbers(data, 0, 128, 2048)
    assert len(made) == len(set(made))
    assert {name for name, *_ in made} == {"_make_window", "_make_epoch", "_make_block"}


def test_the_windows_of_many_pools_are_bounded() -> None:
    """Together they have at most five times shuffle_records, or a chunk each; one that needs many blocks is smaller."""
    size = order.window_size
    assert size(131_072, order.BLOCK // 2, 2, one_source=False) == 65_536
    assert size(131_072, 64, 20, one_source=False) == order.MIN_WINDOW
    assert size(131_072, 64, 1024, one_source=False) == 512
    assert size(131_072, 1, order.BLOCK, one_source=True) == store.CHUNK
    assert size(131_072, 2, 20, one_source=False) == 2 * order.MAX_BLOCKS
    assert size(131_072, 2, 20, one_source=True) == order.MIN_WINDOW


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alpha": 0.0, "batch_size": 512}, ""),
        ({"alpha": 0.0, "batch_size": 1000}, "d1 (488 records, 500 pairs)"),
        ({"weights": (("d0", 3.0), ("d1", 1.0)), "batch_size": 768}, "d0 (512 records, 576 pairs)"),
        ({"one_source": "domain", "batch_size": 500}, "d1 (488 records, 500 pairs)"),
        ({"batch_size": 1001}, "the data (1,000 records, 1,001 pairs)"),
    ],
)
def test_pools_that_are_smaller_than_their_share_of_a_batch_are_named(
    changes: dict, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    synthetic(1000, domains=2, **changes)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ([expected] if expected else [])


def test_a_message_lists_few_names() -> None:
    assert order.some_of(["a", "b"]) == "a, b"
    data = types.SimpleNamespace(domains=[f"d{i}" for i in range(1500)], datasets={"all": []})
    with pytest.raises(UserError, match="no domain 'x'; there are d0, d1, .*, d9 and 1,490 more$"):
        order.find_domains(data, "x")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two datasets, "web" and "code", that both have a domain "b"."""
    root = tmp_path_factory.mktemp("two")
    write_dataset(root / "web", {"train": [60] * 300})
    write_dataset(root / "code", {"train": [60] * 100}, seed=1, domains=("b", "c", "web"))
    return f"{root}/web,{root}/code"


def test_several_datasets_are_one_and_have_weights_by_name(two: str) -> None:
    records = prepared.open_split(two, "train")
    assert len(records) == 400 and records.domains == ["web/a", "web/b", "code/b", "code/c", "code/web"]
    hashes = [prepared.load_manifest(folder)["content_hash"] for folder in two.split(",")]
    assert records.manifest["content_hash"] not in hashes
    assert prepared.load_manifest(",".join(two.split(",")[::-1]))["content_hash"] != records.manifest["content_hash"]
    config = default_config().data
    config.update(batch_size=64, length=32, min_span=7, max_span=13)
    for weights, one_source, domains in (
        ((), "", [0, 1, 2, 3, 4]),
        ((("code", 1.0),), "dataset", [2, 3, 4]),
        ((("b", 1.0), ("web/a", 2.0)), "", [0, 1, 2]),
    ):
        config.update(weights=weights, one_source=one_source)
        data = pipeline.open_stream(records, config, 0).order
        chunks = np.concatenate([data.locate(step, np.arange(64))[0] for step in range(8)])
        assert np.unique(records.chunk_domain[chunks]).tolist() == domains
        assert next(pipeline.batches(records, config, 0)).tokens.shape == (64, 2, 1, 32)


@pytest.mark.parametrize(
    ("weights", "one_source", "message"),
    [
        ((("web/a", 1.0), ("web/a", 1.0)), "", "'web/a' is in 'web/a' already; name each domain once"),
        ((("code", 1.0), ("code/b", 1.0)), "", "'code/b' is in 'code' already"),
        ((("web", 1.0),), "", "'web' is a dataset and a domain; name the domain as DATASET/web"),
        ((("b", 1.0),), "domain", "one_source='domain': 'b' in config.data.weights is more than one domain"),
        ((("b", 1.0),), "dataset", "one_source='dataset': 'b' in config.data.weights is more than one dataset"),
    ],
)
def test_b10_names_of_weights_that_are_not_clear_are_refused(two: str, weights: tuple, one_source: str, message: str) -> None:
    records, config = prepared.open_split(two, "train"), default_config().data
    config.update(batch_size=64, length=32, min_span=7, max_span=13, weights=weights, one_source=one_source)
    with pytest.raises(UserError, match=message):
        pipeline.open_stream(records, config, 0)


def test_datasets_with_other_tokenizers_or_equal_names_are_refused(two: str, tmp_path: pathlib.Path) -> None:
    web = two.split(",", maxsplit=1)[0]
    other = write_dataset(tmp_path / "web", {"train": [60] * 20})
    with pytest.raises(UserError, match="two datasets are called 'web'; rename a folder"):
        prepared.open_split(f"{web},{other}", "train")
    renamed = other.rename(tmp_path / "more")
    manifest = (renamed / "manifest.json").read_text()
    (renamed / "manifest.json").write_text(manifest.replace('"vocab_size": 320', '"vocab_size": 321'))
    with pytest.raises(UserError, match="more has another tokenizer than .*web; prepare it with `--tokenizer="):
        prepared.open_split(f"{web},{renamed}", "train")


def test_more_domains_than_have_numbers_are_refused(two: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MAX_DOMAINS", 4)
    with pytest.raises(UserError, match="config.data.dir: 5 domains in the datasets up to .*code, but at most 4 are possible"):
        prepared.open_split(two, "train")


def test_pairs_of_several_datasets_have_the_positives_and_the_negatives_of_all(tmp_path: pathlib.Path) -> None:
    """One with a positive and three negatives, another with three positives: each pair has one positive, and no more."""
    numbers = ["label", "positives", "hard_negatives"]
    for name, positives, negatives in (("a", 1, 3), ("b", 3, 0)):
        texts = {"fields": 1 + positives + negatives, "hard_negatives": negatives}
        write_dataset(tmp_path / name, {"train": [60] * 20}, **texts, numbers=numbers)
    write_dataset(tmp_path / "documents", {"train": [60] * 20})
    both, config = f"{tmp_path}/a,{tmp_path}/b", default_config().data
    manifest = prepared.load_manifest(both)
    assert (manifest["fields"], manifest["hard_negatives"]) == (2, 0)
    config.update(dir=both, batch_size=8, length=64, max_span=62, sampler="fields", views=3)
    with pytest.raises(UserError, match=r"config.data.views=3: some pairs of config.data.dir have 2 texts; lower it"):
        pipeline.open_stream(prepared.open_split(both, "train"), config, 0)
    for first, second, kinds in (("a", "documents", "documents, but .*a pairs"), ("documents", "b", "pairs, but .*documents")):
        with pytest.raises(UserError, match=f"config.data.dir: .*/{second} holds {kinds}.*; leave one of them out"):
            prepared.open_split(f"{tmp_path}/{first},{tmp_path}/{second}", "train")


def test_the_name_of_a_dataset_is_no_glob(tmp_path: pathlib.Path) -> None:
    for name, count in (("pile[12]", 30), ("pile1", 20), ("what?", 10)):
        write_dataset(tmp_path / name, {"train": [60] * count})
        records = prepared.open_split(tmp_path / name, "train")
        assert len(records.read_records(range(count)).token_lists()) == len(records) == count
