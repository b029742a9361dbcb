"""Near-duplicates: signatures, groups, and which document of a group is kept."""

import numpy as np
import pytest

from contrastive_jax.data.clean import near_duplicates, ngrams
from contrastive_jax.data.clean.near_duplicates import ROW, Bands, Signatures, band_shape
from contrastive_jax.data.preparation.dedup import TRAIN_FLAG
from contrastive_jax.data.preparation.work import Work

THRESHOLD = 0.6


def changed(words: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the words with a share of them replaced by others."""
    return np.where(rng.random(len(words)) < share, rng.integers(0, 1 << 64, len(words), np.uint64), words)


def documents(seed: int = 0) -> list[np.ndarray]:
    """Returns 60 documents as hashes of words: 40 unlike each other, and 20 copies of the first of which a tenth is changed."""
    rng = np.random.default_rng(seed)
    originals = [rng.integers(0, 1 << 64, int(size), np.uint64) for size in rng.integers(100, 400, 40)]
    return originals + [changed(original, 0.05, rng) for original in originals[:20]]


def dropped(root, documents, pieces, threshold=THRESHOLD, memory=1 << 30, validation=()) -> set[int]:
    """Returns the numbers of the documents that are dropped, if document i lies in piece pieces[i] at the place i."""
    work = Work(root)
    rows = 0
    for piece in sorted(set(pieces)):
        signatures = Signatures(work, piece, threshold)
        for number in (i for i, of_document in enumerate(pieces) if of_document == piece):
            signatures.add(number, number not in validation, documents[number])
        rows += signatures.close()
    found = set()
    tasks = near_duplicates.partitions(rows, max(pieces) + 1, memory)
    for task in tasks:
        name = near_duplicates.drop_near_duplicates(str(root), threshold, task)["dropped"]
        for piece in set(pieces):
            found |= set(work.read_groups(name, piece, piece + 1, np.dtype("<u4")).tolist())
    assert len(tasks) > 1 or memory == 1 << 30
    return found


def test_copies_are_dropped_and_others_kept(tmp_path):
    assert dropped(tmp_path, documents(), [0] * 60) == set(range(40, 60))


def test_the_partitions_and_the_size_of_batches_and_files_do_not_matter(tmp_path, monkeypatch):
    expected = dropped(tmp_path / "a", documents(), [i // 20 for i in range(60)])
    assert dropped(tmp_path / "b", documents(), [i // 20 for i in range(60)], memory=10_000) == expected
    monkeypatch.setattr(near_duplicates, "_DOCUMENTS_PER_BATCH", 7)
    monkeypatch.setattr(near_duplicates, "_ROWS_PER_FILE", 100)
    assert dropped(tmp_path / "c", documents(), [i // 20 for i in range(60)]) == expected == set(range(40, 60))


def test_the_validation_copy_is_kept_whichever_comes_first(tmp_path):
    assert dropped(tmp_path, documents(), [0] * 40 + [1] * 20, validation=range(40, 60)) == set(range(20))


def test_every_dropped_document_has_an_earlier_one_that_is_similar_and_no_two_kept_ones_are_equal(tmp_path):
    rng = np.random.default_rng(3)
    chain = [rng.integers(0, 1 << 64, 300, np.uint64)]
    for _ in range(30):  # each is like the one before it, and less and less like the first
        chain.append(changed(chain[-1], 0.04, rng))
    gone = dropped(tmp_path, chain, [0] * len(chain))
    assert 0 not in gone
    assert len(gone) > 25
    copies = [*chain, *chain]
    assert dropped(tmp_path / "twice", copies, [0] * len(copies)) >= set(range(len(chain), len(copies)))


def test_similarity_estimates_and_candidates_follow_the_s_curve():
    rng = np.random.default_rng(1)
    bands = band_shape(THRESHOLD)
    estimates, candidates = [], 0
    for _ in range(300):
        shared = rng.integers(0, 1 << 64, 150, np.uint64)
        pairs = [np.concatenate([shared, rng.integers(0, 1 << 64, 50, np.uint64)]) for _ in range(2)]
        slots = np.array([near_duplicates.signature(words, bands) for words in pairs], np.uint32)
        cut, sketches = near_duplicates.split_signatures(slots, bands)
        estimates.append(near_duplicates.similarities(sketches[:1], sketches[1:])[0])
        candidates += (cut[0] == cut[1]).any()
    similarity = 149 / (2 * 199 - 149)
    assert abs(np.mean(estimates) - similarity) < 0.03
    assert abs(candidates / 300 - near_duplicates.candidate_probability(similarity, bands)) < 0.05


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
def test_bands_find_nine_tenths_of_the_pairs_at_the_threshold(threshold):
    bands = band_shape(threshold)
    assert near_duplicates.candidate_probability(threshold, bands) >= 0.9
    assert bands.number <= near_duplicates.MAX_BANDS or bands.rows == 1


def test_signatures_are_those_that_stored_rows_were_made_with():
    words = ngrams.words_of("The quick brown fox jumps over the lazy dog, again and again.").hashes
    slots = near_duplicates.signature(words, Bands(2, 2))
    assert slots[:4] == [3304766973, 3273453678, 608629880, 3286094037]
    assert len(near_duplicates.signature(words[:1], Bands(2, 2))) == 4 + near_duplicates.SKETCH_BITS


def test_documents_without_words_have_no_rows(tmp_path):
    signatures = Signatures(Work(tmp_path), 0, THRESHOLD)
    signatures.add(0, True, np.zeros(0, np.uint64))
    assert signatures.close() == 0
    assert not len(near_duplicates.repeats_of(np.zeros(0, ROW), THRESHOLD))


def test_of_a_group_only_those_that_are_similar_to_a_leader_are_dropped():
    sketches = np.array([0, 0, 2**64 - 1, 2**64 - 1, 0x5555555555555555], np.uint64)
    rows = np.zeros(5, ROW)
    rows["sketch"], rows["place"], rows["piece"] = sketches, [4, 3, 2, 1, 0], TRAIN_FLAG
    assert sorted(near_duplicates.repeats_of(rows, 0.5)["place"].tolist()) == [2, 4]
