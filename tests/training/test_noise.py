"""Noise has the distributions of its sources, and touches neither delimiters nor padding."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RESERVED, VOCAB, recipe, shrink
from ml_collections import ConfigDict
from scipy import stats

from contrastive_jax.config import UserError, default_config
from contrastive_jax.data import pieces, pipeline, prepared
from contrastive_jax.models.dropout import Noise
from contrastive_jax.objectives.tokens import Targets
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build, noise, views
from contrastive_jax.training.noise import Vocabulary, apply_noise

N, L = 2000, 100
RATES = {name: 0.3 for name in noise.OPS} | {"ngram": 5.0}
# One piece in three begins a word, one in twenty ends a sentence.
WORD_START, SENTENCE_END = np.arange(VOCAB) % 3 == 0, np.arange(VOCAB) % 20 == 2
TABLES = pieces.Tables(WORD_START, SENTENCE_END, np.zeros(VOCAB, bool))
PLAIN, WORDS = Vocabulary(VOCAB, RESERVED), Vocabulary(VOCAB, RESERVED, TABLES)


def noise_config(*ops: tuple[str, float], **changes: object) -> ConfigDict:
    config = default_config().noise
    config.update(ops=ops, **changes)
    return config


def packed_rows(n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Two texts of 40 places between delimiters, the second one before the first, and padding."""
    tokens = np.random.default_rng(0).integers(8, VOCAB, (n, L)).astype(np.int32)
    segment = np.tile(np.repeat([2, 1, 0], [40, 40, 20]).astype(np.int32), (n, 1))
    tokens[:, [0, 40]], tokens[:, [39, 79]], tokens[segment == 0] = 4, 5, 0
    return tokens, segment


def one_text(n: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one text without delimiters, whose tokens are all different: 8, 9, ..."""
    return np.tile(np.arange(8, 8 + length, dtype=np.int32), (n, 1)), np.ones((n, length), np.int32)


def apply(
    config: ConfigDict, rows: tuple[np.ndarray, np.ndarray], vocabulary: Vocabulary = PLAIN, seed: int = 0, view: int = 0
) -> tuple[np.ndarray, np.ndarray, Targets]:
    tokens, segment = rows
    numbers = np.arange(len(tokens), dtype=np.int32)
    of_views = np.full(len(tokens), view, np.int32)
    run = jax.jit(lambda *arrays: apply_noise(config, *arrays, Noise(jax.random.key(seed), numbers), vocabulary, of_views))
    return jax.tree.map(np.asarray, run(tokens, segment))


def free_places(tokens: np.ndarray, segment: np.ndarray) -> np.ndarray:
    return (segment > 0) & (tokens >= 8)


def test_row54_every_operation_is_the_identity_at_rate_0_and_in_other_views() -> None:
    rows = packed_rows(4)
    for name in noise.OPS:
        for config, view in ((noise_config((name, 0.0)), 0), (noise_config((name, RATES[name]), views=(1,)), 0)):
            tokens, segment, targets = apply(config, rows, WORDS, view=view)
            np.testing.assert_array_equal(tokens, rows[0])
            np.testing.assert_array_equal(segment, rows[1])
            assert not targets.picked.any() and (targets.token == tokens).all()


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("name", noise.OPS)
def test_row54_delimiters_and_padding_are_spared_and_spans_stay_contiguous(name: str, unit: str) -> None:
    tokens, segment = packed_rows(200)
    noised, new_segment, targets = apply(noise_config((name, RATES[name]), unit=unit), (tokens, segment), WORDS)
    assert (noised != tokens).any()
    for row, number in zip(noised, new_segment, strict=True):
        size = [int((number == 2).sum()), int((number == 1).sum())]
        assert (number == np.repeat([2, 1, 0], [*size, L - sum(size)])).all()
        assert (row[[0, size[0]]] == 4).all() and (row[[size[0] - 1, sum(size) - 1]] == 5).all()
        assert not row[sum(size) :].any() and np.isin(row[: sum(size)], [4, 5]).sum() == 4
    assert not (targets.picked & ~(new_segment > 0)).any() and not (targets.picked & np.isin(noised, [4, 5])).any()
    assert (targets.real == (new_segment > 0)).all()
    # A row's noise depends on its number alone.
    one = Noise(jax.random.key(0), np.array([7], np.int32))
    config = noise_config((name, RATES[name]), unit=unit)
    alone = apply_noise(config, tokens[7:8], segment[7:8], one, WORDS)[0]
    np.testing.assert_array_equal(alone, noised[7:8])


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("name", "share"), [("mask", 0.15), ("replace", 0.1)])
def test_row47_row53_the_share_is_picked_and_divided(name: str, share: float, exact: bool) -> None:
    rows = packed_rows(4 * N)
    noised, segment, targets = apply(noise_config((name, share), exact=exact), rows)
    free, picked = free_places(*rows), targets.picked
    assert (segment == rows[1]).all() and not picked[~free].any()
    np.testing.assert_array_equal(noised[~picked], rows[0][~picked])
    np.testing.assert_array_equal(targets.token, rows[0])
    if exact:
        assert (picked.sum(1) == int(share * 76 + 0.5)).all()
    else:
        assert abs(picked[free].mean() - share) < 3 * np.sqrt(share * (1 - share) / free.sum())
    if name == "mask":  # a random token is the text's own once in 312 times
        kept = noised[picked] == targets.token[picked]
        counts = np.array([(noised[picked] == 3).sum(), kept.sum(), 0])
        counts[2] = picked.sum() - counts.sum()
        expected = np.array([0.8, 0.1 + 0.1 / 312, 0.1 * 311 / 312]) * picked.sum()
        assert stats.chisquare(counts, expected).pvalue > 1e-4
    else:
        assert stats.chisquare(np.bincount(noised[picked], minlength=VOCAB)[8:]).pvalue > 1e-4
    assert stats.chisquare(picked.sum(0)[free[0]]).pvalue > 1e-4


def test_row53_whole_words_are_picked_or_not() -> None:
    tokens, segment = packed_rows()
    _, _, targets = apply(noise_config(("mask", 0.3), unit="word"), (tokens, segment), WORDS)
    free = free_places(tokens, segment)
    starts = free & (WORD_START[tokens] | ~np.pad(free[:, :-1], ((0, 0), (1, 0))))
    word = np.cumsum(starts, 1)
    for i in range(0, N, 20):
        hidden = [targets.picked[i][free[i] & (word[i] == w)] for w in range(1, word[i].max() + 1)]
        assert all(x.all() or not x.any() for x in hidden)
        assert sum(x.any() for x in hidden) == int(0.3 * len(hidden) + 0.5)


def test_row57_a_share_of_the_rows_has_no_noise_wherever_they_lie() -> None:
    rows = packed_rows()
    config = noise_config(("mask", 0.3), ("delete", 0.2))
    every, half = (apply(noise_config(*config.ops, clean_rows=share), rows) for share in (0.0, 0.4))
    noised = (half[0] != rows[0]).any(1)
    assert abs(noised.mean() - 0.6) < 4 * np.sqrt(0.24 / N)
    assert not half[2].picked[~noised].any() and not half[2].real[~noised].any()
    for got, whole in zip(jax.tree.leaves(half), jax.tree.leaves(every), strict=True):
        np.testing.assert_array_equal(got[noised], whole[noised])  # the others have the very noise that they had
    numbers, reverse = np.arange(N, dtype=np.int32), slice(None, None, -1)
    noise_of_rows = Noise(jax.random.key(0), numbers[reverse])
    config.clean_rows = 0.4
    turned = jax.jit(lambda *x: apply_noise(config, *x, noise_of_rows, PLAIN)[0])(*(x[reverse] for x in rows))
    np.testing.assert_array_equal(turned[reverse], half[0])


def test_row57_a_text_that_is_divided_among_its_copies_has_noise_in_all_of_them() -> None:
    config = default_config()
    config.data.update(sampler="span", copies=2)
    config.noise.ops = (("sentinel", 0.1),)
    views.make_views(config, PLAIN)
    for changes in ({"clean_rows": 0.5}, {"views": (0,)}):
        changed = config.copy_and_resolve_references()
        changed.noise.update(changes)
        with pytest.raises(UserError, match=r"^config.noise.ops: 'sentinel' .* and config.noise.clean_rows=0$"):
            views.make_views(changed, PLAIN)


def test_row53_spans_have_the_lengths_of_spanbert() -> None:
    """Lengths laid one after another by a loop; a span next to another one looks longer, as in the reference."""
    rng, length, n = np.random.default_rng(0), 90, 20_000
    _, _, targets = apply(noise_config(("mask", 0.15), unit="span"), one_text(n, length))
    budget = int(0.15 * length + 0.5)
    assert (targets.picked.sum(1) == budget).all()
    chances = noise.GEOMETRIC / noise.GEOMETRIC.sum()
    assert abs(chances @ np.arange(1, 11) - 3.80) < 0.005
    expected: Counter = Counter()
    for _ in range(n):
        sizes, left = [], budget
        while left:
            sizes.append(min(left, int(rng.choice(10, p=chances)) + 1))
            left -= sizes[-1]
        items = [0] * (length - budget) + sizes
        rng.shuffle(items[: length - budget])
        kept = length - budget
        slots = np.sort(rng.choice(kept + len(sizes), len(sizes), replace=False))
        row, slot_of = [], dict(zip(slots.tolist(), rng.permutation(sizes).tolist(), strict=True))
        for slot in range(kept + len(sizes)):
            row += [1] * slot_of[slot] if slot in slot_of else [0]
        expected.update(runs(np.array(row)))
    found = Counter(itertools.chain.from_iterable(runs(row) for row in targets.picked))
    table = np.array([[counter[k] for k in range(1, 14)] for counter in (found, expected)])
    assert stats.chi2_contingency(table).pvalue > 1e-4


def runs(picked: np.ndarray) -> list[int]:
    """The lengths of the runs of ones."""
    return [len(list(group)) for value, group in itertools.groupby(picked) if value]


def test_row53_what_becomes_of_a_span_is_decided_once() -> None:
    noised, _, targets = apply(noise_config(("mask", 0.15), unit="span", kept_share=0.3, random_share=0.3), one_text(500, 60))
    for row, picked in zip(noised, targets.picked, strict=True):
        edges = np.flatnonzero(np.diff(np.pad(picked.astype(int), 1)))
        for begin, end in edges.reshape(-1, 2):
            kinds = np.where(row[begin:end] == 3, 0, np.where(row[begin:end] == np.arange(begin, end) + 8, 1, 2))
            changes = (np.diff(kinds) != 0).sum()
            assert changes <= 3  # two or more spans may touch
    assert targets.picked.any()


def test_row54_deletion_keeps_the_order_and_the_count() -> None:
    noised, segment, _ = apply(noise_config(("delete", 0.6)), one_text(N, 50))
    assert ((segment > 0).sum(1) == 20).all()
    assert (np.diff(noised[:, :20], axis=1) > 0).all()
    counts = np.bincount(noised[:, :20].ravel(), minlength=58)[8:]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_row54_sentences_are_permuted_whole_and_all_orders_are_equally_likely() -> None:
    tokens = np.tile(np.array([8, 9, 22, 12, 10, 42, 15, 62], np.int32), (6000, 1))  # 3 sentences: 22, 42, 62 end them
    rows = (tokens, np.ones_like(tokens))
    sentences = ([8, 9, 22], [12, 10, 42], [15, 62])
    orders = {tuple(itertools.chain(*order)) for order in itertools.permutations(sentences)}
    noised, _, targets = apply(noise_config(("permute", 1.0)), rows, WORDS)
    counts = Counter(map(tuple, noised.tolist()))
    assert counts.keys() == orders and stats.chisquare(list(counts.values())).pvalue > 1e-4
    np.testing.assert_array_equal(targets.token, noised)
    two_thirds = Counter(map(tuple, apply(noise_config(("permute", 0.67)), rows, WORDS)[0].tolist()))
    assert len(two_thirds) == 4  # the identity and three swaps: two of the three are permuted


def test_row54_a_text_is_rotated_to_each_token_equally() -> None:
    noised, _, _ = apply(noise_config(("rotate", 0.5)), one_text(12_000, 12))
    start = noised[:, 0] - 8
    np.testing.assert_array_equal(noised, (start[:, None] + np.arange(12)) % 12 + 8)
    expected = np.full(12, 500.0)
    expected[0] += 6000
    assert stats.chisquare(np.bincount(start, minlength=12), expected).pvalue > 1e-4


def test_row54_infilling_puts_one_mask_in_the_place_of_a_span_and_inserts_some() -> None:
    n, length = 5000, 80
    noised, segment, targets = apply(noise_config(("infill", 0.3)), one_text(n, length))
    real, masks = segment > 0, noised == 3
    assert (targets.picked == masks).all()
    kept = real & ~masks
    assert (kept.sum(1) == length - 24).all()  # tokens kept + masks = what is left of the row
    inserted = 0
    for row, keep in zip(noised, kept, strict=True):
        tokens = row[keep]
        assert (np.diff(tokens) > 0).all()
        gaps = np.diff(tokens) > 1
        between = np.diff(np.flatnonzero(keep)) - 1  # masks between two tokens that are kept
        inserted += int(((between > 0) & ~gaps).sum())
        assert (between[gaps] > 0).all()
    chances = stats.poisson(3).pmf(np.arange(1, 19)) / stats.poisson(3).sf(0)
    rng, spans, per_row = np.random.default_rng(0), 0, 400
    for _ in range(per_row):
        left = 24
        while left > 0:
            left, spans = left - int(rng.choice(18, p=chances / chances.sum())) - 1, spans + 1
    assert abs(masks.sum() / n - spans / per_row * (1 + np.exp(-3) / (1 - np.exp(-3)))) < 0.25
    assert 0.5 * np.exp(-3) < inserted / masks.sum() < 1.5 * np.exp(-3)  # P(0) of Poisson(3), up to those beside a span


def test_row54_masks_are_inserted_after_spans_of_two_words_or_more_alone() -> None:
    """Two tokens per word in place of one change nothing, since lengths are those of words."""
    masks = []
    for tokens_per_word in (1, 2):
        tables = pieces.Tables(np.arange(VOCAB) % tokens_per_word == 0, SENTENCE_END, np.zeros(VOCAB, bool))
        rows = one_text(4000, 24 * tokens_per_word)
        noised, _, _ = apply(noise_config(("infill", 0.3), unit="word"), rows, Vocabulary(VOCAB, RESERVED, tables))
        masks.append((noised == 3).sum() / 4000)
    assert abs(masks[1] / masks[0] - 1) < 0.03


def test_row54_sentinels_equal_the_references_random_segmentation() -> None:
    """All masks of 12 tokens with 5 hidden in 2 spans, each as likely as in T5's random_spans_noise_mask."""
    noised, segment, targets = apply(noise_config(("sentinel", 5 / 12), span_mean=2.5), one_text(20_000, 12))
    target, _, _ = apply(noise_config(("sentinel", 5 / 12), span_mean=2.5), one_text(20_000, 12), view=1)
    first, second = VOCAB + 99, VOCAB + 98
    masks: Counter = Counter()
    for row, of_target, picked, real in zip(noised.tolist(), target.tolist(), targets.picked, segment > 0, strict=True):
        own = [token for token, is_real in zip(row, real, strict=True) if is_real]
        hidden = tuple(token not in own for token in range(8, 20))
        masks[hidden] += 1
        assert [t for t in own if t >= VOCAB] == [first, second] and picked.sum() == 2
        assert [t for t in of_target if 8 <= t < VOCAB] == [t for t in range(8, 20) if t not in own]
        assert of_target[0] == first and [t for t in of_target if t >= VOCAB] == [first, second]
    compositions = {
        (False,) * k + (True,) * h + (False,) * (7 - k) + (True,) * (5 - h) for k in range(1, 7) for h in range(1, 5)
    }
    assert masks.keys() == compositions and stats.chisquare(list(masks.values())).pvalue > 1e-4


def test_row52_an_ngram_is_hidden_in_one_copy_and_alone_in_the_other() -> None:
    config, rows = noise_config(("ngram", 5.0)), one_text(N, 20)
    first, _, targets = apply(config, rows, view=0)
    second, segment, other = apply(config, rows, view=1)
    assert not other.picked.any()
    for row, picked, alone, real in zip(first, targets.picked, second, segment > 0, strict=True):
        np.testing.assert_array_equal(row, np.where(picked, 3, rows[0][0]))
        np.testing.assert_array_equal(alone[real], rows[0][0][picked])
        assert runs(picked) == [real.sum()]
    lengths = np.bincount((segment > 0).sum(1), minlength=6)[1:]
    assert len(lengths) == 5 and stats.chisquare(lengths).pvalue > 1e-4


def test_operations_follow_one_another_and_targets_move_along() -> None:
    config = noise_config(("permute", 1.0), ("mask", 0.2), ("delete", 0.3), kept_share=0.0, random_share=0.0)
    tokens, segment = packed_rows(50)
    noised, new_segment, targets = apply(config, (tokens, segment), WORDS)
    kept = (new_segment > 0) & (noised >= 8)
    np.testing.assert_array_equal(targets.token[kept], noised[kept])
    assert (noised[targets.picked] == 3).all() and (targets.token[targets.picked] >= 8).all()
    for i in range(50):
        left = Counter(targets.token[i][new_segment[i] == 1])
        assert not left - Counter(tokens[i][segment[i] == 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": (("blur", 0.1),)}, r"config.noise.ops: no operation 'blur'; there are mask, replace, delete, .*"),
        ({"ops": (("mask", 0.1),), "views": (2,)}, r"config.noise.views=\(2,\): there are the views 0 to 1"),
        ({"ops": (("mask", -0.1),)}, r"config.noise.ops: 'mask' has a share of -0.1, and needs one in \[0, 1\]"),
        (
            {"ops": (("mask", 0.1),), "random_share": 0.5, "kept_share": 0.6},
            r"config.noise.random_share=0.5, config.noise.kept_share=0.6: together they must not be above 1",
        ),
        ({"ops": (("ngram", 5.0),)}, r"config.noise.ops: 'ngram' divides one text among its copies; set .*'span', .*"),
    ],
)
def test_noise_that_does_not_go_with_the_views_is_refused(changes: dict, message: str) -> None:
    config = default_config()
    config.noise.update(changes)
    with pytest.raises(UserError, match=f"^{message}$"):
        views.make_views(config, PLAIN)


@pytest.mark.parametrize("name", ["mlm", "replaced"])
@pytest.mark.parametrize("ops", [(), (("mask", 0.0),), (("delete", 0.6), ("rotate", 0.5))])
def test_row47_row53_a_loss_of_picked_tokens_needs_noise_that_picks(name: str, ops: tuple) -> None:
    config = default_config()
    config.noise.ops, config.tokens.name = ops, name
    with pytest.raises(UserError, match=rf"config.tokens.name='{name}' predicts what noise has picked; set config.noise.ops"):
        views.make_views(config, PLAIN)


def test_row54_a_text_keeps_one_unit_however_much_is_deleted_by_chance() -> None:
    _, segment, _ = apply(noise_config(("delete", 0.6), exact=False), one_text(4 * N, 4))
    kept = segment.sum(1)
    assert kept.min() == 1
    # Of 4 tokens each stays with probability 0.4, but none only where one more is spared.
    assert abs(kept.mean() - (4 * 0.4 + 0.6**4)) < 3 * np.sqrt(4 * 0.24 / (4 * N))


def test_row54_sentinels_of_most_of_a_text_still_stand_between_kept_tokens() -> None:
    config, rows = noise_config(("sentinel", 0.8), span_mean=1.0), one_text(100, 10)
    noised, _, _ = apply(config, rows)
    assert ((noised == VOCAB + noise.SENTINELS - 1).sum(1) == 1).all()
    is_sentinel = noised >= VOCAB
    assert not is_sentinel[:, 0].any() and not (is_sentinel[:, 1:] & is_sentinel[:, :-1]).any()


def test_compositions_are_all_equally_likely() -> None:
    uniform = np.random.default_rng(0).random((35_000, 8), np.float32)
    parts = noise.composition(jnp.asarray(uniform), np.full((35_000, 1), 7), np.full((35_000, 1), 4))
    counts = Counter(map(tuple, np.asarray(parts).tolist()))
    assert len(counts) == 20 and stats.chisquare(list(counts.values())).pvalue > 1e-4
    assert all(sum(c) == 7 and min(c[:4]) > 0 for c in counts)


@pytest.mark.parametrize(("name", "micro_batch"), [("mlm", 0), pytest.param("replaced", 8, marks=pytest.mark.slow)])
def test_row50_token_heads_run_on_noisy_views_alone_and_change_nothing(
    name: str, micro_batch: int, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shrink(recipe("declutr"), dataset)
    config.tokens.name, config.micro_batch = name, micro_batch
    host = next(pipeline.batches(prepared.open_split(dataset, "train"), config.data, 0))
    mesh, found = sharding.make_mesh(config.mesh, jax.devices()[:1]), []
    assert views.views_with_targets(config, 3) == [0]
    for all_views in (False, True):
        if all_views:
            monkeypatch.setattr(views, "views_with_targets", lambda config, count: [*range(count)])
        run = build.build(config, mesh, 320)
        state, metrics, _ = run.train_step(run.init(), sharding.to_global(host, np.arange(16), 16, mesh))
        terms = [metrics[name] for name in ("loss", "token_loss", "token_accuracy", "gradient_norm")]
        found.append(jax.device_get((terms, state.params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)
