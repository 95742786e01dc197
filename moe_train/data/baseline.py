"""The loss of a model that knows only how frequent each token is: what training has to beat."""

import numpy as np

from moe_train.data.blend import BlendedDataset


def unigram_loss(train: BlendedDataset, validation: BlendedDataset, num_sequences: int | None = None) -> float:
    """Cross-entropy in nats per token of the labels of the first validation samples under training frequencies.

    Frequencies are counted over all training tokens, weighted like the blend, one added to each of vocab_size counts.
    `num_sequences` defaults to the whole validation split.
    """
    logprobs_V = unigram_logprobs(train)
    total, num_labels = 0.0, 0
    for start in range(0, num_sequences or validation.num_samples, 64):
        count = min(64, (num_sequences or validation.num_samples) - start)
        labels = validation.batch(start, count)[:, 1:]
        total -= float(logprobs_V[labels].sum())
        num_labels += labels.size
    return total / num_labels


def unigram_logprobs(train: BlendedDataset) -> np.ndarray:
    """log of the smoothed frequency of each id, [vocab_size] float64."""
    counts_V = np.zeros(train.vocab_size)
    num_tokens = sum(dataset.num_tokens for dataset in train.datasets)
    for dataset, weight in zip(train.datasets, train.weights, strict=True):
        own_V = np.zeros(train.vocab_size, dtype=np.int64)
        for chunk in dataset.token_chunks():
            own_V += np.bincount(chunk, minlength=train.vocab_size)
        # a corpus read twice as often as its size counts twice; for one corpus the factor is 1
        counts_V += own_V * (weight * num_tokens / dataset.num_tokens)
    return np.log((counts_V + 1) / (counts_V.sum() + train.vocab_size))
