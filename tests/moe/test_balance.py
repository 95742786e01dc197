"""Router losses against loops, and what they equal at perfect balance."""

import pytest
import torch
from naive_moe import naive_aux_loss

from moe_train.moe import RouterSpec, blend_bias_, route_tokens, update_bias_
from moe_train.moe.balance import (
    global_batch_aux_loss,
    micro_batch_aux_loss,
    quantile_sums,
    score_sums,
    sequence_aux_loss,
    z_loss,
)
from moe_train.moe.sequences import Sequences

SPEC = RouterSpec(num_experts=5, top_k=2, score="softmax", normalize=True)


@pytest.mark.parametrize("sequences", [0, 1, 2])
def test_a_rank_without_tokens_adds_nothing(sequences):
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = sequence_aux_loss(route_tokens(logits, SPEC), SPEC, sequences)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None


def test_aux_loss_and_its_gradient_equal_the_loops():
    torch.manual_seed(0)
    x, router = torch.randn(12, 4).double(), torch.randn(5, 4).double()
    ours_router, naive_router = router.clone().requires_grad_(), router.clone().requires_grad_()
    ours = sequence_aux_loss(route_tokens(x @ ours_router.t(), SPEC), SPEC, num_sequences=3)
    naive = naive_aux_loss(x, naive_router, top_k=2, sequences=3)
    ours.backward()
    naive.backward()
    assert abs(float((ours - naive).detach())) < 1e-12
    assert (ours_router.grad - naive_router.grad).abs().max() < 1e-12


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_aux_loss_is_one_per_sequence_at_perfect_balance(score):
    spec = RouterSpec(num_experts=4, top_k=2, score=score, normalize=True)
    logits = torch.zeros(8, 4)
    ids = torch.tensor([[0, 1], [2, 3]] * 4)
    routing = route_tokens(logits, spec, topk_ids_TK=ids)
    assert float(sequence_aux_loss(routing, spec, num_sequences=2)) == pytest.approx(2.0)


def test_aux_loss_does_not_depend_on_which_sequences_are_together():
    torch.manual_seed(0)
    logits = torch.randn(4 * 6, 5).double()
    whole = sequence_aux_loss(route_tokens(logits, SPEC), SPEC, 4)
    parts = sum(sequence_aux_loss(route_tokens(part, SPEC), SPEC, 1) for part in logits.chunk(4))
    assert abs(float(whole - parts)) < 1e-12


def test_z_loss_is_the_sum_of_squared_log_partition_functions():
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]]).double()
    expected = torch.log(torch.tensor(2.0).double()) ** 2 + torch.log(torch.exp(logits[1]).sum()) ** 2
    assert float(z_loss(logits)) == pytest.approx(float(expected), rel=1e-14)


def test_bias_rises_for_starved_experts_and_falls_for_busy_ones():
    bias = torch.tensor([0.5, 0.0, -0.25])
    update_bias_(bias, torch.tensor([9, 3, 0]), rate=0.125)
    assert bias.tolist() == [0.375, 0.125, -0.125]
    update_bias_(bias, torch.tensor([4, 4, 4]), rate=0.125)
    assert bias.tolist() == [0.375, 0.125, -0.125]


def test_aux_loss_of_a_micro_batch_looks_at_its_sequences_as_one():
    torch.manual_seed(0)
    x, router = torch.randn(12, 4).double(), torch.randn(5, 4).double()
    ours_router, naive_router = router.clone().requires_grad_(), router.clone().requires_grad_()
    ours = micro_batch_aux_loss(route_tokens(x @ ours_router.t(), SPEC), SPEC, num_sequences=3)
    naive = 3 * naive_aux_loss(x, naive_router, top_k=2, sequences=1)
    ours.backward()
    naive.backward()
    assert abs(float((ours - naive).detach())) < 1e-12
    assert (ours_router.grad - naive_router.grad).abs().max() < 1e-12


@pytest.mark.parametrize("cuts", [(12,), (4, 4, 4), (5, 0, 7)])
def test_parts_of_the_global_batch_add_up_however_it_is_cut(cuts):
    """Two layers, each with its own counts."""
    torch.manual_seed(0)
    x, router = torch.randn(12, 4).double(), torch.randn(2, 5, 4).double()
    ours_router, naive_router = router.clone().requires_grad_(), router.clone().requires_grad_()
    routed = [[route_tokens(part @ layer.t(), SPEC) for layer in ours_router] for part in x.split(cuts)]
    counts = torch.stack([
        torch.cat([parts[layer].topk_ids_TK for parts in routed]).flatten().bincount(minlength=5) for layer in range(2)
    ])  # fmt: skip
    for parts in routed:
        sums = {layer: score_sums(routing, SPEC) for layer, routing in enumerate(parts)}
        global_batch_aux_loss(sums, counts, top_k=2, num_sequences=1).backward(retain_graph=True)
    naive = sum(naive_aux_loss(x, layer, top_k=2, sequences=1) for layer in naive_router)
    naive.backward()
    assert (ours_router.grad - naive_router.grad).abs().max() < 1e-12


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_every_form_is_one_per_sequence_at_perfect_balance(score):
    spec = RouterSpec(num_experts=4, top_k=2, score=score, normalize=True)
    routing = route_tokens(torch.zeros(8, 4), spec, topk_ids_TK=torch.tensor([[0, 1], [2, 3]] * 4))
    assert float(micro_batch_aux_loss(routing, spec, num_sequences=2)) == pytest.approx(2.0)
    counts = torch.full((1, 4), 12)  # three such micro-batches in all
    part = global_batch_aux_loss({0: score_sums(routing, spec)}, counts, top_k=2, num_sequences=6)
    assert float(part) == pytest.approx(2.0)


def test_centred_steps_keep_the_sum_of_the_biases():
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    update_bias_(bias, torch.tensor([9, 1, 1, 1]), rate=0.25, form="zero_mean_sign")  # -1, 1, 1, 1 less 1/2
    assert bias.tolist() == [0.125, 0.125, -0.125, 0.125]


def test_proportional_steps_are_shares_of_the_mean_load():
    bias = torch.zeros(3)
    update_bias_(bias, torch.tensor([9, 3, 0]), rate=0.5, form="proportional")
    assert bias.tolist() == [-0.625, 0.125, 0.5]
    small = torch.zeros(3)
    update_bias_(small, torch.tensor([900, 300, 0]), rate=0.5, form="proportional")
    assert torch.equal(small, bias), "ten times the batch is the same violation"
    update_bias_(bias, torch.zeros(3, dtype=torch.int64), rate=0.5, form="proportional")
    assert torch.equal(small, bias), "nothing routed, nothing learned"


def sequences_of(*lengths: int) -> Sequences:
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Sequences(count=len(lengths), index_T=index, ragged=True)


def test_quantiles_of_each_sequence_against_loops():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(23, 5, generator=generator, dtype=torch.float64)
    bias = torch.tensor([0.1, -0.1, 0.3, 0.0, -0.2])
    expected, start = torch.zeros(5, dtype=torch.float64), 0
    for length in (9, 0, 12, 2):
        part = scores[start : start + length].tolist()
        start += length
        cutoffs = [sorted((s + float(b) for s, b in zip(row, bias, strict=True)), reverse=True)[2] for row in part]
        for expert in range(5):
            excess = sorted((row[expert] - cutoff for row, cutoff in zip(part, cutoffs, strict=True)), reverse=True)
            if excess:
                expected[expert] -= excess[length * 2 // 5]
    found = quantile_sums(scores.float(), bias, 2, sequences_of(9, 0, 12, 2))
    assert (found - expected).abs().max() < 1e-6


def test_quantile_biases_even_out_a_skewed_sequence():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(400, 5, generator=generator) + torch.tensor([0.9, 0.5, 0.0, 0.0, -0.4])
    bias, one = torch.zeros(5), sequences_of(400)

    def loads():
        return (scores + bias).topk(2, dim=1).indices.flatten().bincount(minlength=5)

    assert loads().max() > 350
    for _ in range(30):
        blend_bias_(bias, quantile_sums(scores, bias, 2, one), rate=1.0)
    assert (loads() - 160).abs().max() <= 2
    assert abs(float(bias.mean())) < 1e-6


def test_a_bias_goes_its_part_of_the_way():
    bias = torch.tensor([1.0, -1.0])
    blend_bias_(bias, torch.tensor([3.0, 1.0], dtype=torch.float64), rate=0.25)
    assert bias.tolist() == [1.0, -1.0], "less the mean it is there"
    blend_bias_(bias, torch.tensor([0.0, 4.0], dtype=torch.float64), rate=0.25)
    assert bias.tolist() == [0.25, -0.25]
