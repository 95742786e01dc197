"""One corpus -> packed samples. Sample i is a function of (corpus, split, sequence length, seed, i) and nothing else.

Legend: N tokens of the split, L sequence length, S = (N - 1) // L samples per epoch.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from moe_train.data.indexed import IndexedReader
from moe_train.data.shuffle import hashed, permutation
from moe_train.data.vocabulary import outside_error
from moe_train.errors import DataError

Split = Literal["train", "validation"]

HELD_OUT_SALT = 0x4D6F4521
"""Fixed for ever: which documents are held out must not depend on the seed of a run."""
CHUNK_TOKENS = 1 << 20


class _Epoch(NamedTuple):
    """Order of an epoch: spans [num_spans, 2], where each begins in the stream [num_spans + 1], samples [S]."""

    spans: np.ndarray
    begins: np.ndarray
    samples: np.ndarray | None


class PackedDataset:
    """Documents of one split, shuffled and laid end to end, cut into samples of L + 1 tokens that overlap by one.

    Every token of an epoch but the first is the label of exactly one sample; the fewer than L tokens after the last
    sample wait for another epoch, which has another order. Training documents and samples are shuffled per epoch by
    `seed`; validation is in file order and wraps around. Held-out documents are chosen by a hash of their number, at
    least one on each side; of a corpus that is a single document the last part is held out.

    Raises `DataError` when the split has fewer than L + 1 tokens.
    """

    def __init__(
        self,
        reader: IndexedReader,
        split: Split,
        *,
        sequence_length: int,
        validation_fraction: float,
        seed: int,
        vocab_size: int,
    ):
        self.reader = reader
        self.split: Split = split
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self._seed = seed
        self._spans = split_spans(reader, split, validation_fraction)
        self.num_tokens = int((self._spans[:, 1] - self._spans[:, 0]).sum())
        if self.num_tokens < sequence_length + 1:
            raise DataError(
                f"{reader.bin_path}: the {split} split has {self.num_tokens} tokens in {len(self._spans)} documents, "
                f"data.sequence_length ({sequence_length}) needs at least {sequence_length + 1}; shorten the sequence, "
                f"change data.validation_fraction ({validation_fraction}) or add text"
            )
        self.num_samples = (self.num_tokens - 1) // sequence_length
        """Samples per epoch."""
        settings = (split, sequence_length, validation_fraction, seed if split == "train" else 0)
        self.identity = hashlib.sha256(f"{corpus_identity(reader)} {settings}".encode()).hexdigest()[:16]
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def sample(self, index: int) -> np.ndarray:
        """Tokens of sample `index` of the endless stream, [L + 1] int64: inputs are [:-1], labels [1:]."""
        assert index >= 0, index
        number, position = divmod(index, self.num_samples)
        epoch = self._epoch(number)
        if epoch.samples is not None:
            position = int(epoch.samples[position])
        tokens = self._stream(epoch, position * self.sequence_length, self.sequence_length + 1)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:  # the file was changed after it was opened
            raise outside_error(self.reader, self.vocab_size)
        return tokens

    def batch(self, start: int, count: int) -> np.ndarray:
        """Samples start..start+count-1, [count, L + 1] int64."""
        out = np.empty((count, self.sequence_length + 1), dtype=np.int64)
        for row in range(count):
            out[row] = self.sample(start + row)
        return out

    def token_chunks(self) -> Iterator[np.ndarray]:
        """All tokens of the split, in file order, in arrays of about CHUNK_TOKENS, of the file's dtype."""
        pieces, num_tokens = [], 0  # short documents are gathered: millions of tiny arrays would take minutes
        for begin, end in self._spans.tolist():
            for start in range(begin, end, CHUNK_TOKENS):
                pieces.append(self.reader.tokens[start : min(start + CHUNK_TOKENS, end)])
                num_tokens += len(pieces[-1])
                if num_tokens >= CHUNK_TOKENS:
                    yield np.concatenate(pieces)
                    pieces, num_tokens = [], 0
        if pieces:
            yield np.concatenate(pieces)

    def _epoch(self, number: int) -> _Epoch:
        if self.split == "validation":
            number = 0  # every pass is the same
        if number not in self._epochs:
            self._epochs[number] = self._order(number)
            if len(self._epochs) > 2:  # a batch may straddle two epochs
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _order(self, number: int) -> _Epoch:
        spans, samples = self._spans, None
        if self.split == "train":
            spans = spans[permutation(len(spans), self._seed, number, 0)]
            samples = permutation(self.num_samples, self._seed, number, 1)
        begins = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
        return _Epoch(spans, begins, samples)

    def _stream(self, epoch: _Epoch, start: int, length: int) -> np.ndarray:
        """Tokens start..start+length-1 of the documents laid end to end."""
        out = np.empty(length, dtype=np.int64)
        filled = 0
        document = int(np.searchsorted(epoch.begins, start, side="right")) - 1
        while filled < length:
            first = int(epoch.spans[document, 0]) + start + filled - int(epoch.begins[document])
            part = self.reader.tokens[first : min(int(epoch.spans[document, 1]), first + length - filled)]
            out[filled : filled + len(part)] = part
            filled += len(part)
            document += 1
        return out


def split_spans(reader: IndexedReader, split: Split, validation_fraction: float) -> np.ndarray:
    """Token ranges [num_spans, 2] (first, past the last) of the split's documents, in file order, none empty."""
    starts, ends = reader.document_offsets[:-1], reader.document_offsets[1:]
    spans = np.stack([starts, ends], axis=1)[ends > starts]
    if validation_fraction == 0:
        return spans if split == "train" else spans[:0]
    if len(spans) == 1:
        begin, end = spans[0].tolist()
        cut = end - max(1, round((end - begin) * validation_fraction))
        return np.array([[begin, cut]] if split == "train" else [[cut, end]])
    draws = hashed(np.flatnonzero(ends > starts), HELD_OUT_SALT)
    held_out = draws < np.uint64(int(validation_fraction * 2**64))
    held_out[np.argmin(draws)] = True
    held_out[np.argmax(draws)] = False
    return spans[held_out] if split == "validation" else spans[~held_out]


def corpus_identity(reader: IndexedReader) -> str:
    """A hash of the index, of the size of the ids, and of 16 pages of them; checkpoints keep it."""
    digest = hashlib.sha256(f"{reader.dtype.str} {reader.num_tokens} ".encode())
    for part in (reader.sequence_lengths, reader.document_indices):
        digest.update(np.ascontiguousarray(part).data)
    # an edit that keeps every length leaves the index as it was: look at some of the ids too
    for start in np.linspace(0, max(reader.num_tokens - 2048, 0), 16).astype(np.int64).tolist():
        digest.update(np.ascontiguousarray(reader.tokens[start : start + 2048]).data)
    return digest.hexdigest()[:16]
