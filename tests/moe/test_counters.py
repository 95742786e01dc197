"""What moves no counter: evaluation, recompute, padding, and how a batch is accumulated; with every kind of choice."""

import pytest
import torch
from small_configs import FAMILIES, build_alone, small_recipe

CHOICES = {
    "top_k": {},
    "by probability": {"capacity_factor": 0.7},
    "by position, hashed": {"capacity_factor": 0.7, "drop": "position", "hash_layers": 1},
    "expert choice": {"router": "expert_choice"},
    "sinkhorn": {"router": "sinkhorn"},
    "forced": {"force_load": {"zipf": 1.0}},
}


def built(options: dict, **model):
    model = {"model_type": "qwen3_moe", "config": FAMILIES["qwen3_moe"], **model}
    return build_alone(small_recipe("qwen3_moe", moe=options, model=model))[0]


def counters(found, *batches: torch.Tensor, backward: bool = False):
    """(asked for, kept) after these forwards; the numbers start again at zero."""
    start = 0
    for batch in batches:
        with found.context.micro_batch(start):
            loss = found.model(input_ids=batch).logits.sum()
            if backward:
                loss.backward()
        start += len(batch)
    kept = found.context.take_kept()
    return found.context.take_counts(), kept


def same(one, other) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(params=CHOICES)
def options(request):
    return CHOICES[request.param]


@pytest.fixture
def ids():
    return torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))


def test_recompute_and_accumulation(options, ids):
    plain = counters(built(options), ids)
    assert plain[0].sum() == 2 * 4 * 16 * 2 or options.get("router") == "expert_choice"
    assert (plain[1] is not None) == ("capacity_factor" in options)
    if plain[1] is not None:
        assert plain[1].sum() < plain[0].sum(), "something is dropped"
    assert same(counters(built(options, activation_checkpointing=True), ids, backward=True), plain)
    assert same(counters(built(options), *ids.split(1)), plain)


def test_evaluation(options, ids):
    found = built(options)
    found.model.eval()
    in_evaluation = found.model(input_ids=ids).logits
    assert not counters(found)[0].any()
    # and it computes what the stock choice does
    as_the_family = built({"aux_loss_coef": 0.0, "hash_layers": options.get("hash_layers", 0)})
    as_the_family.model.eval()
    assert torch.equal(in_evaluation, as_the_family.model(input_ids=ids).logits)


def test_padding(options):
    """The counts of sequences of 5, 16 and 9 real tokens are those of each alone."""
    found = built(options)
    layer = found.layers[-1]
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(16) < torch.tensor([[5], [16], [9]])
    with found.context.micro_batch():
        y = layer(x, token_mask=mask)
    together = found.context.take_counts(), found.context.take_kept()
    assert not y[~mask].any()
    alone = []
    for number, length in enumerate((5, 16, 9)):
        with found.context.micro_batch(number):
            alone.append(layer(x[number : number + 1, :length]))
    assert same((found.context.take_counts(), found.context.take_kept()), together)
    assert (torch.cat([part[0] for part in alone]) - y[mask]).abs().max() < 1e-5
