"""The experts as one operator against nested loops in float64, and what it saves."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe_train.kernels import RowMaps, expert_rows, local_experts, row_maps
from moe_train.kernels.grouped_gemm import row_groups
from moe_train.testing import assert_close

BF16, FP32 = torch.bfloat16, torch.float32
CASES = [  # tokens, copies, experts, hidden, inner, type, activation, padding
    (1, 1, 1, 8, 8, FP32, "silu", False),
    (37, 3, 7, 16, 8, FP32, "silu", False),
    (37, 3, 7, 16, 8, FP32, "gelu_tanh", True),
    (13, 2, 5, 24, 16, BF16, "silu", True),
    (11, 1, 3, 8, 40, BF16, "relu2", False),
    (0, 2, 4, 8, 8, FP32, "silu", False),
]
ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) ** 2,
}


def draw(tokens, copies, experts, hidden, inner, dtype, device, padding=False):
    """Leaves (x, weights, gate_up, down), dy, and ids: the last expert gets no token unless it must."""
    generator = torch.Generator().manual_seed(tokens + hidden)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    x, dy = normal(tokens, hidden) * hidden**0.5, normal(tokens, hidden) * hidden**0.5
    ids = torch.rand(tokens, max(experts - 1, copies), generator=generator).argsort(dim=1)[:, :copies]
    if padding:
        ids[::3] = -1
    leaves = [x.to(dtype), torch.rand(tokens, copies, generator=generator)]
    leaves += [normal(experts, 2 * inner, hidden).to(dtype), normal(experts, hidden, inner).to(dtype)]
    return [leaf.to(device).requires_grad_() for leaf in leaves], dy.to(device, dtype), ids.to(device)


def loops(leaves, ids, act):
    x, weights, gate_up, down = leaves
    y = torch.zeros_like(x)
    for e in range(len(down)):
        token, copy = torch.where(ids == e)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, -1)
        y = y.index_add(0, token, F.linear(act(gate) * up, down[e]) * weights[token, copy].unsqueeze(1))
    return y


@pytest.mark.parametrize(("tokens", "copies", "experts", "hidden", "inner", "dtype", "name", "padding"), CASES)
def test_output_and_every_gradient_twice(tokens, copies, experts, hidden, inner, dtype, name, padding, device):
    passes = []
    for _ in range(2):
        leaves, dy, ids = draw(tokens, copies, experts, hidden, inner, dtype, device, padding)
        x, weights, gate_up, down = leaves
        y = local_experts(x, weights, row_maps(ids.reshape(-1), experts), gate_up, down, name)
        y.backward(dy)
        passes.append([y.detach(), *[leaf.grad for leaf in leaves]])
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = loops(wide, ids, ACTIVATIONS[name])
    y.backward(dy.double())
    expected = [y.detach(), *[leaf.grad for leaf in wide]]
    for what, actual, wanted in zip(("y", "dx", "d weights", "d gate_up", "d down"), passes[0], expected, strict=True):
        assert_close(actual, wanted, what, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True)), "the same bits twice"


@pytest.mark.parametrize(("rows", "dtype"), [([3, 0, 4], FP32), ([0, 17, 0], BF16), ([0, 0, 0], FP32)])
def test_rows_of_other_ranks(rows, dtype, device):
    (x, _, gate_up, down), dy, _ = draw(sum(rows), 1, 3, 16, 8, dtype, device)
    counts = torch.tensor(rows, device=device)
    y = expert_rows(x, counts, gate_up, down, "silu")
    y.backward(dy)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, gate_up, down)]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(rows)).unsqueeze(1).to(device)
    ones = torch.ones(sum(rows), 1, dtype=torch.float64, device=device)
    expected = loops([wide[0], ones, *wide[1:]], ids, F.silu)
    expected.backward(dy.double())
    assert_close(y.detach(), expected.detach(), "y", dtype=dtype)
    for leaf, w, what in zip((x, gate_up, down), wide, ("dx", "d gate_up", "d down"), strict=True):
        assert_close(leaf.grad, w.grad, what, dtype=dtype)


def test_saves_the_tokens_the_preactivation_weights_and_maps_alone(device):
    tokens, copies, experts, hidden, inner = 64, 4, 5, 32, 16
    (x, weights, gate_up, down), _, ids = draw(tokens, copies, experts, hidden, inner, BF16, device)
    maps = row_maps(ids.reshape(-1), experts)
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        local_experts(x, weights, maps, gate_up, down, "silu")
    given = {t.untyped_storage().data_ptr() for t in (x, weights, gate_up, down, *vars(maps).values())}
    made = [size for place, size in saved.items() if place not in given]
    groups = [each.nbytes for each in row_groups(maps.counts_D, tokens * copies)]
    assert made == [2 * tokens * copies * 2 * inner, *groups], "the pre-activation, and where experts end"


def test_compiles_without_a_break_and_can_be_recomputed(device):
    leaves, dy, ids = draw(9, 2, 4, 16, 8, FP32, device)
    x, weights, gate_up, down = leaves

    def run(x, weights, gate_up, down):
        maps = row_maps(ids.reshape(-1), 4)
        return local_experts(x * 2, weights, maps, gate_up, down, "silu")

    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager"), recomputed(run)):
        y = call(x, weights, gate_up, down)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def recomputed(function):
    return lambda *args: checkpoint(function, *args, use_reentrant=False)


def test_operators_pass_torchs_own_checks(device):
    (x, weights, gate_up, down), _, ids = draw(6, 2, 3, 8, 8, FP32, device)
    maps: RowMaps = row_maps(ids.reshape(-1), 3)
    ops, logits = torch.ops.moe_train, torch.randn(6, 3, device=device)
    place = maps.place_R.view(6, 2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    groups, per_expert = row_groups(maps.counts_D, 12), torch.tensor([2, 0, 4])
    torch.library.opcheck(ops.row_groups.default, (per_expert, 6), test_utils=tests)
    arguments = (x, weights, maps.order_R, place, *groups, gate_up, down, "silu")
    torch.library.opcheck(ops.experts.default, arguments, test_utils=tests)
    given = (*[None] * 3, *row_groups(per_expert, 6))
    torch.library.opcheck(ops.experts.default, (x, *given, gate_up, down, "silu"), test_utils=tests)
    for mapped in (True, False):
        _, weights, order, places, *_, _, _ = arguments
        maps_of = (weights.detach(), order, places, *groups) if mapped else given
        h, dy = torch.randn(12 if mapped else 6, 16), torch.randn(6, 8)
        plain = [each.detach() for each in (gate_up, down)]
        torch.library.opcheck(ops.experts_h_backward.default, (dy, h, *maps_of, plain[1], "silu"), test_utils=tests)
        both = (torch.randn(len(h), 8), torch.randn(len(h), 8))
        torch.library.opcheck(ops.experts_down_backward.default, (*both, maps_of[3]), test_utils=tests)
        torch.library.opcheck(ops.experts_x_backward.default, (h, plain[0], *maps_of[2:]), test_utils=tests)
        torch.library.opcheck(ops.experts_gate_up_backward.default, (h, x.detach(), *maps_of[2:4]), test_utils=tests)
    rows = torch.randn(12, 8, device=device, requires_grad=True)
    torch.library.opcheck(ops.weighted_sum.default, (rows, weights, place), test_utils=tests)
    rule = ("softmax", 2, True, 0.0, 0.0, 1.0, 1, 1, True)
    leaf = logits.requires_grad_()
    torch.library.opcheck(ops.route.default, (leaf, None, None, None, 2, *rule), test_utils=tests)
    torch.library.opcheck(ops.row_maps.default, (ids.reshape(-1), 3), test_utils=tests)
