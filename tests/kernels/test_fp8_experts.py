"""The experts in FP8: against their own numbers, stood for and multiplied exactly, and against exact experts."""

import pytest
import torch
from test_experts import ACTIVATIONS, draw, loops, recomputed

from moe_train.kernels import (
    Fp8Gemms,
    choose,
    experts,
    fp8_experts,
    fp8_local_experts,
    local_experts,
    quantise_weights,
    row_maps,
)
from moe_train.kernels.fp8 import GEMMS
from moe_train.kernels.grouped_gemm import row_groups
from moe_train.kernels.reference.quantise import rounded

BF16 = torch.bfloat16
WHAT = ("y", "dx", "d weights", "d gate_up", "d down")
CASES = [  # tokens, copies, experts, hidden, inner, activation, padding, products in FP8
    (1, 1, 1, 16, 16, "silu", False, GEMMS),
    (29, 3, 7, 48, 32, "silu", True, GEMMS),
    (13, 2, 5, 32, 16, "relu2", False, GEMMS),
    (13, 2, 5, 32, 48, "gelu_tanh", False, ("h", "dX")),
    (11, 2, 3, 32, 48, "silu", True, ("y", "dA")),
    (0, 2, 4, 16, 16, "silu", False, GEMMS),
]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if error == error else float("inf")


def passes(leaves, dy, ids, experts, name, gemms: Fp8Gemms | None, cached=True):
    x, weights, gate_up, down = leaves
    maps = row_maps(ids.reshape(-1), experts)
    if gemms is None:
        y = local_experts(x, weights, maps, gate_up, down, name)
    else:
        quantised = quantise_weights(gate_up, down, gemms) if cached else ()
        y = fp8_local_experts(x, weights, maps, gate_up, down, name, gemms, quantised)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def stood_for(rows: torch.Tensor) -> torch.Tensor:
    """As many rows in FP8 say, in float64."""
    found = rounded(rows.float())
    return found.values.double() * found.scales.double().unsqueeze(-1)


def own_numbers(leaves, dy, ids, act, gemms):
    """Expert by expert in float64 with the operands rounded where the operator rounds them."""
    x, weights, gate_up, down = (leaf.detach() for leaf in leaves)

    def product(name, rows, weight_NK):
        if name in gemms:
            return (stood_for(rows) @ stood_for(weight_NK).t()).to(BF16)
        return (rows.to(BF16).double() @ weight_NK.double().t()).to(BF16)

    y, dx = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    dweights = torch.zeros_like(weights)
    dgate_up, ddown = (torch.zeros_like(leaf, dtype=torch.float64) for leaf in (gate_up, down))
    for e in range(len(down)):
        token, copy = torch.where(ids == e)
        h = product("h", x[token], gate_up[e]).double().requires_grad_()
        weight = weights[token, copy].double().requires_grad_()
        gate, up = h.chunk(2, -1)
        a = act(gate) * up * weight.unsqueeze(1)
        y.index_add_(0, token, product("y", a.detach(), down[e]).double())
        da = product("dA", dy[token], down[e].t())
        dh, dw = torch.autograd.grad(a, (h, weight), da.double())
        dx.index_add_(0, token, product("dX", dh, gate_up[e].t()).double())
        dweights[token, copy] = dw.float()
        dgate_up[e], ddown[e] = dh.to(BF16).double().t() @ x[token].double(), dy[token].double().t() @ a.detach()
    return [y, dx, dweights, dgate_up, ddown]


@pytest.mark.parametrize(
    ("tokens", "copies", "experts", "hidden", "inner", "name", "padding", "names"), CASES, ids=lambda value: str(value)
)
def test_output_and_every_gradient(tokens, copies, experts, hidden, inner, name, padding, names, device):
    leaves, dy, ids = draw(tokens, copies, experts, hidden, inner, BF16, device, padding)
    gemms = Fp8Gemms(names)
    found = passes(leaves, dy, ids, experts, name, gemms)
    own = own_numbers(leaves, dy, ids, ACTIVATIONS[name], names)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = loops(wide, ids, ACTIVATIONS[name])
    exact = [exact.detach(), *torch.autograd.grad(exact, wide, dy.double())]
    for what, actual, mine, wanted in zip(WHAT, found, own, exact, strict=True):
        assert relative(actual, mine) <= 1.5e-2, f"{what}: not the operator's own numbers"
        if tokens > 1:  # of one token, d weights is a single sum of both signs
            assert relative(actual, wanted) <= 0.15, f"{what}: far from exact"
            reached = what != "d down" or "h" in names  # which is made of h and dY alone
            assert (relative(actual, wanted) > 0.005) == reached, f"{what}: what is rounded to FP8 is seen"
    for again in (passes(leaves, dy, ids, experts, name, gemms), passes(leaves, dy, ids, experts, name, gemms, False)):
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same bits again"


def test_without_products_in_fp8_it_is_the_operator_in_bf16(device):
    leaves, dy, ids = draw(13, 2, 5, 32, 16, BF16, device, padding=True)
    found = passes(leaves, dy, ids, 5, "silu", Fp8Gemms(()))
    for a, b in zip(found, passes(leaves, dy, ids, 5, "silu", None), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ids", [[[0, 2], [1, 0], [0, 1], [2, 0], [3, 2]], [[3, 2], [2, 3], [3, 2]]])
def test_an_expert_makes_the_same_on_any_rank(ids, device):
    """Four experts on one rank, and two and two, where the copies of the others have no rows."""
    copies = torch.tensor(ids, device=device)
    leaves, dy, _ = draw(len(copies), 2, 4, 32, 16, BF16, device)
    for gemms in (None, Fp8Gemms()):
        whole = passes(leaves, dy, copies, 4, "silu", gemms)
        halves = []
        for first in (0, 2):
            mine = torch.where((copies // 2) == first // 2, copies - first, -1)
            part = [*leaves[:2], *(leaf.detach()[first : first + 2].clone().requires_grad_() for leaf in leaves[2:])]
            halves.append(passes(part, dy, mine, 2, "silu", gemms))
        for what, value, *parts in zip(WHAT, whole, *halves, strict=True):
            if what in ("y", "dx"):  # each rank's sum is rounded by itself
                assert relative(sum(part.double() for part in parts), value) <= 6e-3
            else:
                assert torch.equal(value, sum(parts) if what == "d weights" else torch.cat(parts)), what


@pytest.mark.parametrize("where", ["x", "dy", "gate_up", "down"])
@pytest.mark.parametrize("what", [float("inf"), float("nan")])
def test_what_is_not_finite_is_seen(where, what, device):
    (x, weights, gate_up, down), dy, ids = draw(9, 2, 4, 16, 16, BF16, device)
    {"x": x, "dy": dy, "gate_up": gate_up, "down": down}[where].data.view(-1)[0] = what
    y, dx, _, dgate_up, ddown = passes((x, weights, gate_up, down), dy, ids, 4, "silu", Fp8Gemms())
    reached = {"x": (y, dx, dgate_up), "dy": (dx, ddown), "gate_up": (y, dx), "down": (y, dx)}[where]
    assert not any(torch.isfinite(value).all() for value in reached)
    mine = (ids == 0).any(dim=1) if where in ("gate_up", "down") else torch.arange(9) == 0
    assert torch.isfinite(y[~mine]).all(), "tokens of others are not touched"


def test_saves_no_more_than_the_operator_in_bf16(device):
    (x, weights, gate_up, down), _, ids = draw(64, 4, 5, 32, 16, BF16, device)
    maps, gemms = row_maps(ids.reshape(-1), 5), Fp8Gemms()
    quantised = quantise_weights(gate_up, down, gemms)
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fp8_local_experts(x, weights, maps, gate_up, down, "silu", gemms, quantised)
    given = (x, weights, gate_up, down, *vars(maps).values(), *quantised)
    made = [size for place, size in saved.items() if place not in {t.untyped_storage().data_ptr() for t in given}]
    groups = [each.nbytes for each in row_groups(maps.counts_D, 64 * 4)]
    assert made == [2 * 64 * 4 * 2 * 16, *groups], "the pre-activation, and where experts end"


def test_compiles_without_a_break_and_can_be_recomputed(device):
    leaves, dy, ids = draw(9, 2, 4, 16, 16, BF16, device)
    gemms = Fp8Gemms()
    quantised = quantise_weights(leaves[2], leaves[3], gemms)

    def run(x, weights, gate_up, down):
        maps = row_maps(ids.reshape(-1), 4)
        return fp8_local_experts(x * 2, weights, maps, gate_up, down, "silu", gemms, quantised)

    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager"), recomputed(run)):
        y = call(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("device", "with_gaps"), [("reference", False), ("triton", False), ("triton", True)], indirect=["device"]
)
def test_operators_pass_torchs_own_checks(device, with_gaps, request):
    if with_gaps:
        request.getfixturevalue("gaps")
    (x, weights, gate_up, down), _, ids = draw(6, 2, 3, 16, 16, BF16, device)
    maps, quantised = row_maps(ids.reshape(-1), 3), quantise_weights(gate_up, down, Fp8Gemms())
    ops, place = torch.ops.moe_train, maps.place_R.view(6, 2)
    for given in (quantised, []):
        tests = ("test_autograd_registration", "test_faketensor")
        if not given:
            tests = ("test_schema", *tests)  # which multiplies what it is given, and torch multiplies no e4m3
        arguments = (
            x,
            weights,
            maps.order_R,
            place,
            *row_groups(maps.counts_D, 12),
            gate_up,
            down,
            given,
            "silu",
            "h y dA dX",
        )
        torch.library.opcheck(ops.fp8_experts.default, arguments, test_utils=tests)
        for gemms in ("h y dA dX", "h y"):
            for number in (12,) if with_gaps else (12, 0):  # torch's checker clones no rows with gaps if there are none
                h, dy = torch.randn(number, 32, dtype=BF16), torch.randn(6, 16, dtype=BF16)
                groups = row_groups(maps.counts_D if number else torch.zeros_like(maps.counts_D), number)
                places = place if number else torch.full_like(place, -1)
                of_rows = (weights.detach(), maps.order_R[:number], places, *groups)
                backward = (dy, h, *of_rows, down.detach(), given, "silu", gemms)
                torch.library.opcheck(ops.fp8_experts_h_backward.default, backward, test_utils=tests[-1:])
                dh, *dh8, _, _, _ = ops.fp8_experts_h_backward(*backward)
                rest = (dh, *dh8, gate_up.detach(), places, *groups, given, gemms)
                torch.library.opcheck(ops.fp8_experts_x_backward.default, rest, test_utils=tests[-1:])


@pytest.mark.parametrize("module", [experts, fp8_experts], ids=["bf16", "fp8"])
def test_what_is_used_up_is_gone_when_the_large_gradients_are_made(module, monkeypatch):
    monkeypatch.setattr(choose, "runs_triton", lambda device: False)  # its interpreter keeps what it was given last
    (x, weights, gate_up, down), dy, ids = draw(6, 2, 3, 16, 16, BF16, torch.device("cpu"))
    maps, alive, left = row_maps(ids.reshape(-1), 3), {}, {}

    def spy(name: str, given: dict[int, str], made: dict[int, str]) -> None:
        """Note tensors that an operator of `module` is given and gives, and what is left of those noted before."""
        operator = getattr(module, name)

        def call(*inputs):
            left[name] = {what for what, memory in alive.items() if not torch.UntypedStorage._expired(memory)}
            alive.update({what: inputs[place].untyped_storage()._weak_ref() for place, what in given.items()})
            outputs = operator(*inputs)
            alive.update({what: outputs[place].untyped_storage()._weak_ref() for place, what in made.items()})
            return outputs

        monkeypatch.setattr(module, name, call)

    fp8 = module is fp8_experts
    made = {-2: "rows of dy", -1: "activation"}
    spy("_h_backward", {1: "h"}, made | {1: "dh in fp8"} if fp8 else made)
    for name in ("DOWN_BACKWARD", "_x_backward", "GATE_UP_BACKWARD"):
        spy(name, {}, {})
    if fp8:
        y = fp8_local_experts(x, weights, maps, gate_up, down, "silu", Fp8Gemms())
    else:
        y = local_experts(x, weights, maps, gate_up, down, "silu")
    y.backward(dy)
    once = {"dh in fp8"} if fp8 else set()
    assert left["DOWN_BACKWARD"] == {"rows of dy", "activation"} | once
    assert left["_x_backward"] == once
    assert left["GATE_UP_BACKWARD"] == set()


@pytest.mark.parametrize("gemms", [None, Fp8Gemms(), Fp8Gemms(("h", "y"))], ids=["bf16", "fp8", "dX in bf16"])
def test_the_activation_of_backward_may_lie_where_its_gradient_was(gemms, device, monkeypatch):
    (x, weights, gate_up, down), dy, ids = draw(6, 2, 3, 16, 16, BF16, device)
    maps, asked = row_maps(ids.reshape(-1), 3), []
    for name in ("activation", "fp8_activation"):
        kernel = choose.implementation(name, device)

        def backward(*given, original=kernel.backward, **options):
            asked.append(options)
            return original(*given, **options)

        monkeypatch.setattr(kernel, "backward", backward)
    if gemms is None:
        y = local_experts(x, weights, maps, gate_up, down, "silu")
    else:
        y = fp8_local_experts(x, weights, maps, gate_up, down, "silu", gemms)
    y.backward(dy)
    assert asked[0] == {"in_place": True}  # the reference of FP8 calls that of bf16 in turn


def test_h_in_fp8_is_made_once(monkeypatch):
    """Room for dH in FP8, which is the largest thing beside it, where no kernel makes it."""
    made = []
    original = fp8_experts._dh_in_fp8
    monkeypatch.setattr(fp8_experts, "_dh_in_fp8", lambda *given: made.append(given[1]) or original(*given))
    (x, weights, gate_up, down), dy, ids = draw(6, 2, 3, 16, 16, BF16, torch.device("cpu"))
    maps = row_maps(ids.reshape(-1), 3)
    for gemms in (Fp8Gemms(), Fp8Gemms(("h", "y"))):
        fp8_local_experts(x, weights, maps, gate_up, down, "silu", gemms).backward(dy)
    assert made == [Fp8Gemms(("h", "y"))]


def test_rows_with_gaps_between_them_give_the_same(device, request):
    leaves, dy, ids = draw(37, 3, 7, 48, 80, BF16, device, padding=True)
    dense = passes(leaves, dy, ids, 7, "silu", Fp8Gemms())
    request.getfixturevalue("gaps")
    assert all(torch.equal(a, b) for a, b in zip(dense, passes(leaves, dy, ids, 7, "silu", Fp8Gemms()), strict=True))
