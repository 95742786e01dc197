"""Packing, shuffling, splitting and blending against brute force."""

import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.schema import CorpusSection, DataSection
from moe_train.data.baseline import unigram_loss
from moe_train.data.blend import MAX_PERIOD, BlendedDataset, pattern_shares, spread
from moe_train.data.indexed import IndexedReader, IndexedWriter
from moe_train.data.open import open_data
from moe_train.data.sampler import PackedDataset, Split, split_spans
from moe_train.data.shuffle import permutation
from moe_train.data.vocabulary import check_vocabulary
from moe_train.errors import DataError

VOCAB = 40_000


def corpus(prefix: Path, lengths=(7, 1, 30, 0, 12, 5, 64, 2, 9, 18), first_id=0) -> IndexedReader:
    """Documents whose ids count upwards through the corpus: every token of it is another one."""
    with IndexedWriter(prefix, np.dtype("int32")) as writer:
        for length in lengths:
            writer.add_document(np.arange(first_id, first_id + length))
            first_id += length
    return IndexedReader(prefix)


def packed(reader, split: Split = "train", length=5, fraction=0.0, seed=0, vocab=VOCAB) -> PackedDataset:
    return PackedDataset(
        reader, split, sequence_length=length, validation_fraction=fraction, seed=seed, vocab_size=vocab
    )


@pytest.mark.parametrize("length", [1, 2, 5, 16, 147])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_uses_every_token_once_as_a_label(tmp_path, length, epoch):
    """The samples, put back in order, are a walk through whole documents, without the last partial sample."""
    reader = corpus(tmp_path / "c")
    dataset = packed(reader, length=length)
    assert dataset.num_samples == (148 - 1) // length
    rows = dataset.batch(epoch * dataset.num_samples, dataset.num_samples)
    follows = {int(row[0]): row for row in rows}
    assert len(follows) == len(rows)
    starts = set(follows) - {int(row[-1]) for row in rows}
    (token,) = starts
    stream = [token]
    while token in follows:
        stream += follows.pop(token)[1:].tolist()
        token = stream[-1]
    assert not follows
    assert len(set(stream)) == len(stream) == dataset.num_samples * length + 1
    # ids count upwards inside a document: wherever they do not, a document ends and another begins
    ends = {int(end) - 1 for end in reader.document_offsets[1:]}
    begins = {int(begin) for begin in reader.document_offsets[:-1]}
    assert stream[0] in begins
    for left, right in pairwise(stream):
        assert right == left + 1 or (left in ends and right in begins)


def test_samples_do_not_depend_on_the_order_of_access(tmp_path):
    reader = corpus(tmp_path / "c")
    forward = packed(reader).batch(0, 200)
    dataset = packed(reader)
    for index in np.random.default_rng(0).permutation(200):
        np.testing.assert_array_equal(dataset.sample(int(index)), forward[index])
    np.testing.assert_array_equal(packed(reader).batch(10**9, 3), packed(reader).batch(10**9 - 1, 4)[1:])


def test_seed_and_epoch_change_the_order(tmp_path):
    reader = corpus(tmp_path / "c")
    one, two = packed(reader), packed(reader, seed=1)
    count = one.num_samples
    assert not np.array_equal(one.batch(0, count), two.batch(0, count))
    assert not np.array_equal(one.batch(0, count), one.batch(count, count))
    assert not np.array_equal(one.batch(0, count), np.sort(one.batch(0, count), axis=0))
    whole = packed(reader, length=147)  # one sample an epoch: only the order of the documents is left to differ
    assert len({tuple(whole.sample(epoch)) for epoch in range(5)}) == 5
    assert {tuple(sorted(whole.sample(epoch))) for epoch in range(5)} == {tuple(range(148))}


def test_the_order_is_pinned():
    """A changed order would silently change every resumed run: these numbers must never move."""
    assert permutation(8, 0, 0, 0).tolist() == [2, 1, 5, 7, 0, 3, 4, 6]
    assert permutation(8, 1234, 5, 1).tolist() == [7, 3, 0, 2, 1, 5, 6, 4]
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))


def test_a_new_process_reads_the_same_samples(tmp_path):
    corpus(tmp_path / "c")
    code = (
        "import sys; from moe_train.data.indexed import IndexedReader;"
        "from moe_train.data.sampler import PackedDataset;"
        "d = PackedDataset(IndexedReader(sys.argv[1]), 'train', sequence_length=5, validation_fraction=0.3, seed=9,"
        " vocab_size=40000); print(d.batch(17, 40).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "c"], capture_output=True, text=True, check=True)
    mine = packed(IndexedReader(tmp_path / "c"), fraction=0.3, seed=9).batch(17, 40)
    assert run.stdout.strip() == str(mine.tolist())


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_share_the_stream_without_repeats(tmp_path, num_ranks):
    """Global batches of 4 cut into contiguous parts, one a rank: together the first samples of the stream."""
    dataset = packed(corpus(tmp_path / "c"), length=3)
    steps = dataset.num_samples // 4
    labels = []
    for rank in range(num_ranks):
        own = 4 // num_ranks
        for step in range(steps):
            labels += dataset.batch(step * 4 + rank * own, own)[:, 1:].ravel().tolist()
    assert len(labels) == len(set(labels)) == steps * 4 * 3
    assert set(labels) == set(packed(corpus(tmp_path / "d"), length=3).batch(0, steps * 4)[:, 1:].ravel().tolist())


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.5, 0.95])
def test_held_out_documents(tmp_path, fraction):
    reader = corpus(tmp_path / "c")
    train, held_out = split_spans(reader, "train", fraction), split_spans(reader, "validation", fraction)
    tokens = [{t for begin, end in spans for t in range(begin, end)} for spans in (train, held_out)]
    assert tokens[0]
    assert tokens[1]
    assert not tokens[0] & tokens[1]
    assert tokens[0] | tokens[1] == set(range(148))
    whole = {(int(b), int(e)) for b, e in zip(reader.document_offsets, reader.document_offsets[1:], strict=False)}
    assert {tuple(span) for span in [*train.tolist(), *held_out.tolist()]} <= whole


def test_held_out_samples_are_sequential_and_the_same_for_every_seed(tmp_path):
    reader = corpus(tmp_path / "c")
    stream = np.concatenate([np.arange(*span) for span in split_spans(reader, "validation", 0.5).tolist()])
    for seed in (0, 1, 99):
        dataset = packed(reader, "validation", fraction=0.5, seed=seed)
        for index in range(2 * dataset.num_samples):  # and wraps around
            start = index % dataset.num_samples * 5
            np.testing.assert_array_equal(dataset.sample(index), stream[start : start + 6])
        train = packed(reader, "train", fraction=0.5, seed=seed)
        assert not set(train.batch(0, train.num_samples).ravel().tolist()) & set(stream.tolist())


def test_the_held_out_share_is_near_the_fraction(tmp_path):
    reader = corpus(tmp_path / "c", lengths=[1] * 20_000)
    assert len(split_spans(reader, "validation", 0.1)) == pytest.approx(2000, abs=150)


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    reader = corpus(tmp_path / "c", lengths=[200])
    assert split_spans(reader, "train", 0.1).tolist() == [[0, 180]]
    assert split_spans(reader, "validation", 0.1).tolist() == [[180, 200]]


def test_a_sequence_longer_than_the_corpus_is_refused(tmp_path):
    reader = corpus(tmp_path / "c")
    assert packed(reader, length=147).num_samples == 1
    with pytest.raises(
        DataError, match=r"c\.bin: the train split has 148 tokens .*sequence_length \(148\) needs at least 149"
    ):
        packed(reader, length=148)


def test_an_id_outside_the_vocabulary_is_found(tmp_path):
    corpus(tmp_path / "c", lengths=[50, 60])
    reader = IndexedReader(tmp_path / "c")
    check_vocabulary(reader, 110)
    for _ in range(2):  # scanned, and from the note
        with pytest.raises(DataError, match=r"c\.bin: token 100 \(byte 400\) has id 100, but the vocabulary has 100"):
            check_vocabulary(reader, 100)
    with IndexedWriter(tmp_path / "n", np.dtype("int32")) as writer:
        writer.add_document(np.array([3, -7, 500]))
    with pytest.raises(DataError, match=r"token 1 \(byte 4\) has id -7"):
        check_vocabulary(IndexedReader(tmp_path / "n"), 100)


def test_the_note_of_the_largest_id_is_not_believed_for_another_file(tmp_path):
    check_vocabulary(corpus(tmp_path / "c", lengths=[50]), 50)
    with pytest.raises(DataError, match=r"token 0 .* has id 1000"):
        check_vocabulary(corpus(tmp_path / "c", lengths=[50], first_id=1000), 50)
    (tmp_path / "c.range.json").write_text("{")
    with pytest.raises(DataError, match="has id 1000"):
        check_vocabulary(IndexedReader(tmp_path / "c"), 50)


def test_ids_that_change_after_opening_are_refused_in_the_batch(tmp_path):
    reader = corpus(tmp_path / "c", lengths=[50])
    dataset = packed(reader, vocab=50)
    dataset.batch(0, dataset.num_samples)
    with (tmp_path / "c.bin").open("r+b") as stream:
        stream.seek(4 * 20)
        stream.write(np.int32(77).tobytes())
    with pytest.raises(DataError, match=r"token 20 .* has id 77"):
        dataset.batch(0, dataset.num_samples)


def test_numbers_that_are_no_ids_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "f", np.dtype("float32")) as writer:
        writer.add_document(np.array([1.0, 2.0]))
    with pytest.raises(DataError, match=r"f\.bin: holds float32 numbers"):
        check_vocabulary(IndexedReader(tmp_path / "f"), 100)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7))
def test_every_prefix_of_the_pattern_is_within_one_of_the_shares(shares):
    pattern = spread(shares)
    period = sum(shares)
    counts = np.cumsum(pattern[:, None] == np.arange(len(shares)), axis=0)
    n = np.arange(1, period + 1)[:, None]
    assert (np.abs(counts * period - n * np.array(shares)) < period).all()
    assert counts[-1].tolist() == shares


def test_decimal_weights_are_exact():
    assert pattern_shares([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert pattern_shares([3.0, 1.0]) == [3, 1]
    assert pattern_shares([0.3, 0.3, 0.3]) == [1, 1, 1]
    odd = [0.123456789, 0.7, 1e-12]
    shares = pattern_shares(odd)
    for share, weight in zip(shares, odd, strict=True):
        assert share >= 1
        assert abs(Fraction(share, sum(shares)) - Fraction(weight / sum(odd))) < Fraction(3, MAX_PERIOD)


def test_a_blend_takes_each_set_in_its_own_order_and_share(tmp_path):
    members = [packed(corpus(tmp_path / str(i), first_id=1000 * i)) for i in range(3)]
    weights = [0.5, 0.2, 0.3]
    blend = BlendedDataset(members, weights)
    used = [0, 0, 0]
    for index in range(500):
        which = int(blend.sample(index)[0]) // 1000
        np.testing.assert_array_equal(blend.sample(index), members[which].sample(used[which]))
        used[which] += 1
        for count, weight in zip(used, weights, strict=True):
            assert abs(count - (index + 1) * weight) < 1 + 1e-9
    np.testing.assert_array_equal(blend.batch(123, 9), np.stack([blend.sample(i) for i in range(123, 132)]))
    far = [blend.locate(10**9 + i) for i in range(10)]
    assert sorted(inside for which, inside in far if which == 0) == [500_000_000 + i for i in range(5)]


def test_blend_counts_samples_until_a_member_repeats(tmp_path):
    members = [packed(corpus(tmp_path / str(i), lengths=[n], first_id=1000 * i)) for i, n in enumerate((31, 301))]
    blend = BlendedDataset(members, [1, 3])
    seen = [tuple(blend.sample(i)) for i in range(blend.num_samples + 1)]
    assert blend.num_samples == 24  # 6 samples of the first at a quarter
    assert len(set(seen[:-1])) == 24


def naive_unigram(train: list[int], labels: list[int], vocab_size: int) -> float:
    counts = [1] * vocab_size
    for token in train:
        counts[token] += 1
    return -sum(float(np.log(counts[label] / sum(counts))) for label in labels) / len(labels)


def test_unigram_loss_against_a_loop(tmp_path):
    generator = np.random.default_rng(1)
    with IndexedWriter(tmp_path / "c", np.dtype("uint16")) as writer:
        for _ in range(30):
            writer.add_document(generator.geometric(0.2, size=int(generator.integers(1, 60))) % 50)
    reader = IndexedReader(tmp_path / "c")
    train, held_out = packed(reader, fraction=0.3, vocab=60), packed(reader, "validation", fraction=0.3, vocab=60)
    tokens = [int(t) for b, e in split_spans(reader, "train", 0.3) for t in reader.tokens[b:e]]
    for count in (None, 4):
        labels = held_out.batch(0, count or held_out.num_samples)[:, 1:].ravel().tolist()
        ours = unigram_loss(BlendedDataset([train], [1]), BlendedDataset([held_out], [1]), count)
        assert ours == pytest.approx(naive_unigram(tokens, labels, 60), rel=1e-12)


def test_unigram_loss_weighs_the_training_sets_like_the_blend(tmp_path):
    """500 tokens of id 0 and 100 of id 1, blended half and half: both as frequent, up to the smoothing."""
    for name, length, token in (("a", 500, 0), ("b", 100, 1)):
        with IndexedWriter(tmp_path / name, np.dtype("uint16")) as writer:
            writer.add_document(np.full(length, token))
    blend = BlendedDataset([packed(IndexedReader(tmp_path / name), vocab=2) for name in "ab"], [1, 1])
    assert unigram_loss(blend, blend, 10) == pytest.approx(np.log(2), rel=1e-12)


def test_open_data_from_text_to_batches(tmp_path):
    for index in range(40):
        (tmp_path / f"{index:02d}.txt").write_text(f"document {index} " * (index % 5 + 3))
    section = DataSection(
        corpora=(CorpusSection(text=str(tmp_path), glob="*.txt"),),
        sequence_length=16,
        validation_fraction=0.1,
        cache_dir=str(tmp_path / "cache"),
    )
    data = open_data(section, vocab_size=257, seed=3)
    assert data.validation is not None
    held_out = bytes(data.validation.batch(0, 1)[0].clip(0, 255).astype(np.uint8))
    assert held_out.startswith(b"document ")
    ids = data.train.batch(0, data.train.num_samples)
    assert ids.dtype == np.int64
    assert sorted(np.unique(ids).tolist()) == sorted({*b"document 0123456789", 256})
    assert data.identity == open_data(section, vocab_size=257, seed=3).identity
    changed = [
        open_data(section, 257, seed=4),
        open_data(section.model_copy(update={"sequence_length": 8}), 257, 3),
        open_data(section.model_copy(update={"validation_fraction": 0.0}), 257, 3),
    ]
    assert len({data.identity, *(other.identity for other in changed)}) == 4
    assert changed[-1].validation is None
    with pytest.raises(DataError, match="has id 256, but the vocabulary has 256 ids"):
        open_data(section, vocab_size=256, seed=3)


def test_an_edit_that_keeps_all_lengths_changes_the_identity(tmp_path):
    one, two = corpus(tmp_path / "a"), corpus(tmp_path / "b", first_id=1)
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()
    assert packed(one).identity != packed(two).identity
    assert packed(one).identity == packed(corpus(tmp_path / "again")).identity
