"""The experts as one operator against nested loops in float64, and what it saves."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe_train.kernels import RowMaps, local_experts, row_maps
from moe_train.kernels.grouped_gemm import empty_rows, row_groups
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


@pytest.mark.parametrize("elsewhere", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_copies_of_other_ranks_have_no_rows(dtype, elsewhere, device, poisoned):
    """Maps that end where the rows do, as a rank has them under expert parallelism."""
    leaves, dy, ids = draw(37, 3, 4, 16, 8, dtype, device)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)).to(device) < elsewhere] = -1
    maps = row_maps(ids.reshape(-1), 4)
    rows = int((ids >= 0).sum())
    x, weights, gate_up, down = leaves
    short = RowMaps(order_R=maps.order_R[:rows], place_R=maps.place_R, counts_D=maps.counts_D)
    y = local_experts(x, weights, short, gate_up, down, "silu")
    y.backward(dy)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = loops(wide, ids, F.silu)
    expected.backward(dy.double())
    assert_close(y.detach(), expected.detach(), "y", dtype=dtype)
    for leaf, w, what in zip(leaves, wide, ("dx", "d weights", "d gate_up", "d down"), strict=True):
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


@pytest.mark.parametrize(
    ("device", "with_gaps"), [("reference", False), ("triton", False), ("triton", True)], indirect=["device"]
)
def test_operators_pass_torchs_own_checks(device, with_gaps, request):
    """With gaps between rows too a compiler is told where they really begin."""
    if with_gaps:
        request.getfixturevalue("gaps")
    (x, weights, gate_up, down), _, ids = draw(6, 2, 3, 8, 8, FP32, device)
    maps: RowMaps = row_maps(ids.reshape(-1), 3)
    ops, logits = torch.ops.moe_train, torch.randn(6, 3, device=device)
    place = maps.place_R.view(6, 2)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    groups = row_groups(maps.counts_D, 12)
    torch.library.opcheck(ops.row_groups.default, (torch.tensor([2, 0, 4]), 6), test_utils=tests)
    arguments = (x, weights, maps.order_R, place, *groups, gate_up, down, "silu")
    torch.library.opcheck(ops.experts.default, arguments, test_utils=tests)
    given = (weights.detach(), maps.order_R, place, *groups)
    h, dy = torch.randn(12, 16), torch.randn(6, 8)
    plain = [each.detach() for each in (gate_up, down)]
    torch.library.opcheck(ops.experts_h_backward.default, (dy, h, *given, plain[1], "silu"), test_utils=tests)
    both = (torch.randn(12, 8), torch.randn(12, 8))
    torch.library.opcheck(ops.experts_down_backward.default, (*both, groups[0]), test_utils=tests)
    torch.library.opcheck(ops.experts_x_backward.default, (h, plain[0], *given[2:]), test_utils=tests)
    torch.library.opcheck(ops.experts_gate_up_backward.default, (h, x.detach(), *given[2:4]), test_utils=tests)
    rows = torch.randn(12, 8, device=device, requires_grad=True)
    torch.library.opcheck(ops.weighted_sum.default, (rows, place, weights, True), test_utils=tests)
    torch.library.opcheck(ops.sum_copies.default, (rows, place, True), test_utils=tests)
    torch.library.opcheck(ops.copy_tokens.default, (x, place, 12, True), test_utils=tests)
    rule = ("softmax", 2, True, 0.0, 0.0, 1.0, 1, 1, True)
    leaf = logits.requires_grad_()
    torch.library.opcheck(ops.route.default, (leaf, None, None, None, 2, *rule), test_utils=tests)
    torch.library.opcheck(ops.row_maps.default, (ids.reshape(-1), 3, True), test_utils=tests)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rows_with_gaps_between_them_give_the_same(dtype, device, request):
    leaves, dy, ids = draw(37, 3, 7, 24, 40, dtype, device, padding=True)
    x, weights, gate_up, down = leaves

    def call():
        y = local_experts(x, weights, row_maps(ids.reshape(-1), 7), gate_up, down, "silu")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    dense = call()
    request.getfixturevalue("gaps")
    assert empty_rows(2, 80, x).stride(0) == (96 if dtype == FP32 else 128)
    assert all(torch.equal(a, b) for a, b in zip(dense, call(), strict=True))
