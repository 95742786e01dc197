"""The loss made in the head, against cross-entropy of the logits of all tokens."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from small_configs import FAMILIES, build_alone, small_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_train.kernels import cross_entropy
from moe_train.model import head
from moe_train.testing import assert_close

TOKENS, HIDDEN, VOCABULARY = 23, 7, 11


@pytest.fixture(params=[2, 5, 23], ids=lambda rows: f"{rows} rows at once")
def rows(request, monkeypatch) -> int:
    """How many tokens' logits are made at a time."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", request.param * VOCABULARY)
    monkeypatch.setattr(head, "FEWEST_ROWS", 2)
    return request.param


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (2 * torch.randn(VOCABULARY, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[[0, 9, 10, 22]] = -100
    return x, weight, labels


@pytest.mark.parametrize(
    ("dtype", "fused"),
    [
        (torch.float64, False),  # the kernel computes in float32
        (torch.float32, False),
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ],
)
def test_loss_and_gradients(rows, dtype, fused, monkeypatch):
    triton = importlib.import_module("moe_train.kernels.triton.cross_entropy")  # under its interpreter here
    monkeypatch.setattr(cross_entropy, "dense_implementation", lambda name, x: triton)
    x, weight, labels = drawn(dtype)
    loss = head.linear_cross_entropy(x, weight, labels, fused)
    (loss * 0.37).backward()
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy(wide_x @ wide_weight.t(), labels, reduction="sum")
    (expected * 0.37).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(loss.detach(), expected.detach(), "loss", dtype=dtype)
    assert_close(x.grad, wide_x.grad, "dx", dtype=dtype)
    assert_close(weight.grad, wide_weight.grad, "d weight", dtype=dtype)
    assert not x.grad[labels == -100].any()


@pytest.mark.parametrize(("for_x", "for_weight"), [(True, False), (False, True)])
def test_only_what_is_wanted(rows, for_x, for_weight):
    x, weight, labels = drawn(torch.float64)
    head.linear_cross_entropy(x, weight, labels).backward()
    one_x, one_weight = x.detach().requires_grad_(for_x), weight.detach().requires_grad_(for_weight)
    head.linear_cross_entropy(one_x, one_weight, labels).backward()
    assert (one_x.grad is None) != for_x
    assert (one_weight.grad is None) != for_weight
    assert_close((one_x if for_x else one_weight).grad, (x if for_x else weight).grad)


def test_a_small_change_of_a_sure_token_is_not_rounded_away():
    """The slope at the label is p - 1, and p is 1 in bf16."""
    x = torch.full((1, 1), 7.0, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    head.linear_cross_entropy(x, weight, torch.tensor([0])).backward()
    assert_close(x.grad, torch.tensor([[-1 / (1 + torch.e**7)]]), dtype=torch.bfloat16)


def test_nothing_counts():
    x, weight, labels = drawn(torch.float32)
    loss = head.linear_cross_entropy(x, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not weight.grad.any()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned, and how many GEMMs ran."""

    elements = gemms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.gemms += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_logits_of_all_tokens_are_never_there(monkeypatch):
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 4 * 50)
    monkeypatch.setattr(head, "FEWEST_ROWS", 4)
    x, weight = torch.randn(40, 3, requires_grad=True), torch.randn(50, 3, requires_grad=True)
    labels = torch.arange(40)
    with Largest() as seen:
        head.linear_cross_entropy(x, weight, labels).backward()
    assert seen.elements == 4 * 50
    assert seen.gemms == 3 * 10
    with Largest() as seen, torch.no_grad():
        head.linear_cross_entropy(x, weight, labels)
    assert seen.gemms == 10, "an evaluation makes no gradients"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_labels_gives_the_loss_and_without_them_logits(family, tied):
    recipe = small_recipe(family, model={"config": FAMILIES[family] | {"tie_word_embeddings": tied}})
    built, _ = build_alone(recipe)
    model = built.model
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    with built.context.micro_batch():
        logits = model(input_ids=ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with built.context.micro_batch():
        output = model(input_ids=ids[:, :-1], labels=ids[:, 1:])
        output.loss.backward()
    assert output.logits is None
    assert "logits" not in output
    assert_close(output.loss.detach(), loss.detach())
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], name)
    again = model(input_ids=ids[:, :-1])
    assert again.loss is None
    assert torch.equal(again.logits, logits)
