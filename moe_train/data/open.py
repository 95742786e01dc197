"""The one call that the training room makes: recipe section -> everything it reads from."""

import hashlib
from dataclasses import dataclass

from moe_train.config.schema import DataSection
from moe_train.data.blend import BlendedDataset
from moe_train.data.indexed import IndexedReader
from moe_train.data.prepare import Progress, ensure_prepared
from moe_train.data.sampler import PackedDataset, Split
from moe_train.data.tokenizer import Tokenizer, load_tokenizer
from moe_train.data.vocabulary import check_vocabulary


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Training and held-out samples. `identity` changes with anything that changes what sample i is."""

    train: BlendedDataset
    validation: BlendedDataset | None
    tokenizer: Tokenizer
    identity: str


def open_data(data: DataSection, vocab_size: int, seed: int, progress: Progress | None = None) -> TrainData:
    """Prepare what is not prepared, check it, and open it. `vocab_size` is the model's.

    Safe to call on all ranks at once, and every rank gets the same answer or the same `DataError`. The position in the
    data is one number, the samples consumed: `train.batch(position, count)`.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    readers = []
    for corpus in data.corpora:
        reader = IndexedReader(ensure_prepared(corpus, data, tokenizer, progress))
        check_vocabulary(reader, vocab_size)
        readers.append(reader)

    def blend(split: Split) -> BlendedDataset:
        members = [
            PackedDataset(
                reader,
                split,
                sequence_length=data.sequence_length,
                validation_fraction=data.validation_fraction,
                seed=seed,
                vocab_size=vocab_size,
            )
            for reader in readers
        ]
        return BlendedDataset(members, [corpus.weight for corpus in data.corpora])

    train = blend("train")
    validation = blend("validation") if data.validation_fraction > 0 else None
    both = f"{train.identity} {validation.identity if validation else None}"
    identity = hashlib.sha256(both.encode()).hexdigest()[:16]
    return TrainData(train=train, validation=validation, tokenizer=tokenizer, identity=identity)
