"""The mutation proof: each classic error, planted alone in the workers, must fail its certificate."""

import itertools
from dataclasses import replace

import planted
import pytest
from rich.console import Console
from rich.table import Table
from small_configs import FAMILIES, small_recipe

from moe_train.verify import Layout, check_layout, prepare_case, shrink

QWEN3, QWEN2, DEEPSEEK, HASHED = "qwen3_moe", "qwen2_moe", "deepseek_v3", "olmoe"
GLOBAL, MICRO, CENTRED, CAPACITY = "global batch", "micro-batch", "centred bias", "capacity"
EXPERTS_CHOOSE, SINKHORN, JITTER = "expert choice", "sinkhorn", "jitter and drop by position"
QUANTILE, FORCED = "quantile", "forced load"
"""Cases of other forms of the losses, the bias and the choice."""
WORLDS = (1, 2)


def layout(
    expert: int,
    stage: int = 0,
    accumulation: int = 1,
    precision: str = "fp64",
    recompute: bool = False,
    world: int = 2,
    tensor: int = 1,
    **division,
) -> Layout:
    """8 sequences."""
    per_rank = 8 * tensor // world
    return Layout(
        world=world,
        expert=expert,
        stage=stage,
        split="whole" if accumulation == 1 else "between",
        micro_size=per_rank // accumulation,
        accumulation=accumulation,
        recompute=recompute,
        backend="loop",
        precision=precision,  # type: ignore[arg-type]
        tensor=tensor,
        **division,
    )


# family, the layout that exposes it, the quantity that must differ first, and a part of the cause that is named
CASES = {
    "expert gradients ep times too large": (
        QWEN3,
        layout(2, 1, precision="fp32"),
        "gradient",
        "2 x what it should be = ep",
    ),
    "expert gradients divided by the number of copies": (
        QWEN3,
        layout(2, 2, 2),
        "gradient",
        "2 x what it should be = ep",
    ),
    "expert gradients not summed over copies": (QWEN3, layout(1, precision="fp32"), "gradient", ""),
    "only the last micro-batch's expert gradient kept": (QWEN3, layout(2, 0, 2, "fp32"), "gradient", ""),
    "first expert tensor frozen: in no optimizer": (
        QWEN3,
        layout(2, 2, precision="fp32"),
        "gradient",
        "hold 6144 nowhere",
    ),
    "experts left out of the norm": (QWEN3, layout(2, 2, precision="fp32"), "gradient norm", "experts are left out"),
    "copies of experts counted once each in the norm": (
        QWEN3,
        layout(1),
        "gradient norm",
        "experts are counted 2 times",
    ),
    "experts not clipped": (QWEN3, layout(2, 3, precision="fp32"), "gradient", "1 / clip factor"),
    "weights not published after the step": (QWEN3, layout(1, 1, precision="fp32"), "loss", ""),
    "no weight decay on experts": (QWEN3, layout(2, 1, precision="fp32"), "loss", ""),
    "learning rate does not reach the experts": (QWEN3, layout(2, precision="fp32"), "loss", ""),
    "initial weights drawn by position in the slice": (QWEN3, layout(2, precision="fp32"), "initial weights", ""),
    "auxiliary loss scaled by the number of ranks": (QWEN3, layout(2, 2, precision="fp32"), "gradient", ""),
    "z-loss summed over layers, not averaged": (QWEN3, layout(1, 1, precision="fp32"), "gradient", ""),
    "auxiliary loss per micro-batch, not per sequence": (QWEN3, layout(1, 1, 2, "fp32"), "auxiliary loss", ""),
    "global-batch loss with the counts so far": (GLOBAL, layout(2, 0, 2), "auxiliary loss", ""),
    "global-batch loss with this rank's counts": (GLOBAL, layout(1, 2, precision="fp32"), "auxiliary loss", ""),
    "global-batch loss averaged per micro-batch": (
        GLOBAL,
        layout(2, 1, precision="fp32"),
        "auxiliary loss",
        "2 x what it should be",
    ),
    "tokens of the forwards that only count are counted in the step": (GLOBAL, layout(2, 0, 2), "counts", ""),
    "micro-batch loss per sequence": (MICRO, layout(2, 0, 2), "auxiliary loss", ""),
    "proportional bias step in tokens, not in shares of the mean": (GLOBAL, layout(2), "bias", ""),
    "steps of the bias not centred": (CENTRED, layout(2), "bias", ""),
    "loss averaged per rank, then summed": (QWEN3, layout(1, 3, precision="fp32"), "gradient", ""),
    "counts committed again in recompute": (QWEN3, layout(2, recompute=True), "counts", "2 x"),
    "bias updated per micro-batch": (DEEPSEEK, layout(2, 1, 2, "fp32"), "logits", ""),
    "bias updated from this rank's counts alone": (DEEPSEEK, layout(2), "bias", ""),
    "bias added to the weights, not only to the choice": (DEEPSEEK, layout(1), "loss", ""),
    "bias left out of the choice": (DEEPSEEK, layout(2), "loss", ""),
    "gate detached from the output": (QWEN3, layout(2), "gradient", ""),
    "router computed in bf16": (QWEN3, layout(2), "logits", ""),
    "capacity over the tokens of a micro-batch, not of a sequence": (CAPACITY, layout(2, 0, 2), "logits", ""),
    "pads counted in capacity": (CAPACITY, layout(2, 1, precision="fp32"), "logits", ""),
    "weights scaled up after a drop": (CAPACITY, layout(1, 3, precision="fp32"), "logits", ""),
    "bias and loads from what found room": (CAPACITY, layout(2), "auxiliary loss", ""),
    "quantiles over the tokens of a micro-batch": (QUANTILE, layout(2), "bias", ""),
    "quantiles counted by every tensor rank": (QUANTILE, layout(2, tensor=2), "bias", "2 x"),
    "quantiles of the biased scores": (QUANTILE, layout(2, 1, precision="fp32"), "bias", ""),
    "experts choose among all tokens of a micro-batch": (EXPERTS_CHOOSE, layout(2, 0, 2), "logits", ""),
    "a token keeps top-k of the experts that took it": (EXPERTS_CHOOSE, layout(1, 1, precision="fp32"), "logits", ""),
    "sinkhorn over the tokens of a micro-batch": (SINKHORN, layout(2, 2, 2, "fp32"), "logits", ""),
    "sinkhorn's shifts in the weights too": (SINKHORN, layout(2), "logits", ""),
    "jitter by the place in a rank's own batch": (JITTER, layout(1, 0, 2), "logits", ""),
    "forced load by the place in a rank's own batch": (FORCED, layout(1, 0, 2), "logits", ""),
    "jitter of the router's input alone": (JITTER, layout(2), "logits", ""),
    "jitter drawn anew in recompute": (JITTER, layout(2, recompute=True), "gradient", ""),
    "shared expert counted twice": (QWEN2, layout(2, 1, precision="fp32"), "logits", ""),
    "all_to_all backward with split sizes not swapped": (QWEN3, layout(2, precision="fp32"), "gradient", ""),
    "combine without putting rows back in order": (QWEN3, layout(1), "logits", ""),
    "rows not sorted by expert": (QWEN3, layout(1), "logits", ""),
    "rows of two experts swapped": (QWEN3, layout(2, 2, precision="fp32"), "logits", ""),
    "one row of a micro-batch lost": (DEEPSEEK, layout(1, 1, precision="fp32"), "logits", ""),
    "received tokens and their copies' numbers in different orders": (
        QWEN3,
        layout(2, 3, precision="fp32"),
        "logits",
        "",
    ),
    "gradients of weights that other ranks applied lost": (QWEN3, layout(2), "gradient", ""),
    "what other ranks make of a token lost": (QWEN3, layout(2), "logits", ""),
    "every rank reads the first rank's samples": (QWEN3, layout(2), "logits", ""),
    "gradients of redundant copies not brought home": (QWEN3, layout(2, 1, 2, "fp32", redundant=3), "gradient", ""),
    "redundant copies stale after the step": (QWEN3, layout(2, 3, precision="fp32", redundant=3), "loss", ""),
    "new plan for the rows, old weights in the slots": (QWEN3, layout(2, redundant=3), "loss", ""),
    "external shared expert averaged over the ranks that hold it": (
        QWEN2,
        layout(2, 2, world=4, precision="fp32", shared="external"),
        "gradient",
        "0.5 x what it should be",
    ),
    "external shared expert also on the other ranks": (QWEN2, layout(2, shared="external"), "logits", ""),
    "tensor peers dispatch the same tokens": (
        QWEN3,
        layout(2, 1, precision="fp32", tensor=2),
        "counts",
        "2 x what it should be = ep = tp",
    ),
    "pad rows routed, counted and lost": (QWEN3, layout(2), "auxiliary loss", ""),
    "gradient summed where tokens leave the layer, not sliced": (QWEN3, layout(2, tensor=2), "gradient", ""),
    "gate gradient not summed over tensor ranks": (QWEN3, layout(2, 3, tensor=2, after=True), "gradient", ""),
    "parts of experts: gradients of their inputs not summed": (QWEN3, layout(1, expert_tensor=2), "gradient", ""),
    "split shared expert: sum over ranks left out": (QWEN2, layout(2, tensor=2, shared="split"), "logits", ""),
    "tokens counted on every tensor rank": (QWEN3, layout(1, tensor=2, expert_tensor=2), "counts", "2 x"),
    "auxiliary loss scaled by tp": (QWEN3, layout(2, 1, precision="fp32", tensor=2), "gradient", ""),
    "hash table drawn from another seed than the recipe's": (HASHED, layout(2), "logits", ""),
}


BIAS = {"aux_loss_coef": 0.02, "bias_update_rate": 0.02}
RECIPES: dict[str, tuple[str, dict]] = {
    QWEN3: (QWEN3, {"aux_loss_coef": 0.02, "z_loss_coef": 0.01}),
    QWEN2: (QWEN2, {"aux_loss_coef": 0.02}),
    DEEPSEEK: (DEEPSEEK, BIAS),
    HASHED: (HASHED, {"aux_loss_coef": 0.02, "hash_layers": 1}),
    GLOBAL: (DEEPSEEK, BIAS | {"aux_loss": "global_batch", "bias_update": "proportional"}),
    MICRO: (QWEN3, {"aux_loss_coef": 0.02, "aux_loss": "micro_batch"}),
    CENTRED: (DEEPSEEK, BIAS | {"bias_update": "zero_mean_sign"}),
    CAPACITY: (DEEPSEEK, BIAS | {"capacity_factor": 1.0, "aux_loss": "global_batch"}),
    EXPERTS_CHOOSE: (QWEN2, {"router": "expert_choice", "z_loss_coef": 0.01}),
    SINKHORN: (QWEN3, {"router": "sinkhorn"}),
    FORCED: (QWEN3, {"force_load": {"zipf": 1.0}}),
    QUANTILE: (DEEPSEEK, BIAS | {"bias_update_rate": 0.7, "bias_update": "quantile", "aux_loss": "global_batch"}),
    JITTER: ("mixtral", {"capacity_factor": 1.0, "drop": "position", "aux_loss_coef": 0.02}),
}
"""Case -> family and what its recipe says of `moe`: every loss and the bias on."""


class Prepared(dict):
    """Cases by name, each prepared when it is first asked for."""

    def __missing__(self, name: str):
        family, options = RECIPES[name]
        more = {JITTER: {"router_jitter_noise": 0.1}, QUANTILE: {"n_group": 1, "topk_group": 1}}.get(name, {})
        recipe = small_recipe(family, moe=options, model={"config": FAMILIES[family] | more})
        self[name] = prepare_case(shrink(recipe, WORLDS))
        return self[name]


@pytest.fixture(scope="module")
def cases():
    return Prepared()


@pytest.fixture(scope="module")
def caught():
    """Filled by the tests below; printed at the end (pytest -s)."""
    found = Table("planted error", "caught by", "step", "error", "bound", "named cause")
    yield found
    Console(width=180).print(found)


def test_every_planted_error_has_a_case():
    assert set(CASES) == set(planted.ERRORS)
    assert len(CASES) >= 15


@pytest.mark.parametrize("name", CASES)
def test_planted_error_is_caught(name, cases, caught):
    family, exposed, quantity, cause = CASES[name]
    result = check_layout(cases[family], exposed, planted.ERRORS[name])
    assert not result.crash, result.crash
    first = result.comparison.first
    assert first is not None, "the certificate is green"
    caught.add_row(name, first.quantity, str(first.step), f"{first.error:.1e}", f"{first.bound:.0e}", first.cause)
    assert first.quantity == quantity, result.verdict
    assert cause in first.cause, result.verdict
    assert first.error > 10 * first.bound, "caught, but hardly"


def bf16(expert: int, *args, **division) -> Layout:
    return layout(expert, *args, precision="bf16", **division)


# the same where bounds are what bf16 costs: family, layout, the quantity that must differ first
IN_BF16 = {
    "expert gradients ep times too large": (QWEN3, bf16(2, 1), "gradient"),
    "only the last micro-batch's expert gradient kept": (QWEN3, bf16(1, 0, 2, world=1), "gradient"),
    "first expert tensor frozen: in no optimizer": (QWEN3, bf16(1, world=1), "gradient"),
    "experts not clipped": (QWEN3, bf16(2, 3), "gradient"),
    "experts left out of the norm": (QWEN3, bf16(1, world=1), "gradient norm"),
    "weights not published after the step": (QWEN3, bf16(1, 1), "logits"),
    "learning rate does not reach the experts": (DEEPSEEK, bf16(1, 1, world=1), "logits"),
    "auxiliary loss scaled by the number of ranks": (QWEN3, bf16(2, 2), "gradient"),
    "counts committed again in recompute": (QWEN3, bf16(1, world=1, recompute=True), "counts"),
    "bias left out of the choice": (QUANTILE, bf16(1, world=1), "choices"),
    "gate detached from the output": (QWEN3, bf16(2), "gradient"),
    "rows of two experts swapped": (QWEN3, bf16(2, 1), "logits"),
    "one row of a micro-batch lost": (DEEPSEEK, bf16(1, 0, 8, world=1), "logits"),
    "combine without putting rows back in order": (QWEN3, bf16(1, world=1), "logits"),
    "gradients of weights that other ranks applied lost": (QWEN3, bf16(2), "gradient"),
    "what other ranks make of a token lost": (QWEN3, bf16(2), "logits"),
    "shared expert counted twice": (QWEN2, bf16(2, 1), "logits"),
    "all_to_all backward with split sizes not swapped": (QWEN3, bf16(2), "gradient"),
    "gradients of redundant copies not brought home": (QWEN3, bf16(2, 2, redundant=3), "gradient"),
    "redundant copies stale after the step": (QWEN3, bf16(2, 3, redundant=3), "logits"),
    "tensor peers dispatch the same tokens": (QWEN3, bf16(2, 1, tensor=2), "counts"),
    "external shared expert averaged over the ranks that hold it": (
        QWEN2,
        bf16(2, 2, world=4, shared="external"),
        "gradient",
    ),
    "hash table drawn from another seed than the recipe's": (HASHED, bf16(2), "choices"),
}


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_bounds_still_catch_it(name, cases, caught):
    family, exposed, quantity = IN_BF16[name]
    result = check_layout(cases[family], exposed, planted.ERRORS[name])
    assert not result.crash, result.crash
    first = result.comparison.first
    assert first is not None, "the certificate is green"
    caught.add_row(
        f"{name} [bf16]", first.quantity, str(first.step), f"{first.error:.1e}", f"{first.bound:.0e}", first.cause
    )
    assert first.quantity == quantity, result.verdict
    assert max(found.badness for found in result.comparison.worst.values()) > 1.3, "caught, but hardly"


RIGHT = [
    layout(1, 2, 2, "fp64", expert_tensor=2, recompute=True),
    layout(2, 3, 2, "fp32", tensor=2, redundant=3, after=True),
    layout(2, 1, 2, "bf16", tensor=2, redundant=3),
    layout(2, 1, 2, "fp32"),
    layout(1, 0, 2, "fp64", recompute=True),
]


@pytest.mark.parametrize(
    ("family", "exposed"),
    [
        # the first three have all that the other choices depend on
        *itertools.product((QWEN3, QWEN2, DEEPSEEK, HASHED, GLOBAL, MICRO), RIGHT),
        *itertools.product((CAPACITY, EXPERTS_CHOOSE, SINKHORN, JITTER, QUANTILE), RIGHT[:3]),
    ],
)
def test_without_a_planted_error_the_same_layouts_pass(family, exposed, cases):
    if cases[family].recipe.moe.whole_sequences:
        exposed = replace(exposed, after=False)
    result = check_layout(cases[family], exposed)
    assert result.passed, result.verdict
