"""Shrunk recipe -> the question for the oracle, with a batch whose routing no rounding can flip -> its answer."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from moe_train.config import Recipe
from moe_train.errors import ConfigError
from moe_train.model import aux_loss_coef, build_model, load_model_config, num_experts_of
from moe_train.model.build import find_blocks, hash_table, meta_model
from moe_train.model.family import jitter_noise
from moe_train.model.forced import forced_shares
from moe_train.model.initialize import draw_expert, seed_of
from moe_train.model.profiles import profile_of
from moe_train.moe import ResidentExperts, SlotPlan
from moe_train.moe.balanced_choice import SINKHORN_ROUNDS
from moe_train.optim import lr_factor
from moe_train.parallel import Topology, build_groups
from moe_train.verify.bounds import RoundingBounds
from moe_train.verify.oracle import Question, answer
from moe_train.verify.record import Truth

MIN_MARGIN = 2e-5
"""Between scores of at most 1: twenty times what float32 rounding, carried through three steps, moves a score here."""
MAX_DRAWS = 20
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shrunk recipe, the tokens of its steps [steps, sequences, length + 1] and what must come out.

    truths: by micro-batch size, which a loss over micro-batches is meant to depend on; else the same one for all.
    draw: how many batches were thrown away because a routing decision was too close. roundings: by device, what bf16
    costs there, once it has been measured.
    """

    recipe: Recipe
    tokens: np.ndarray = field(repr=False)
    truths: dict[int, Truth] = field(repr=False)
    draw: int
    roundings: dict[str, RoundingBounds] = field(default_factory=dict, repr=False)

    @property
    def truth(self) -> Truth:
        """Of micro-batches of one sequence."""
        return self.truths[1]

    @property
    def margin(self) -> float:
        """Of the nearest routing decision of any of them."""
        return min(truth.margin for truth in self.truths.values())


def prepare_case(recipe: Recipe) -> Case:
    """Ask the oracle about batches until one has no near-tie.

    Raises `ConfigError` if there is none, as with a router whose scores are all alike.
    """
    state, experts = initial_state(recipe)
    margin = 0.0
    for draw in range(MAX_DRAWS):
        question = ask(recipe, state, experts, draw_tokens(recipe, draw))
        case = Case(recipe=recipe, tokens=question.tokens, truths=_answers(question), draw=draw)
        if case.margin > MIN_MARGIN:
            return case
        margin = max(margin, case.margin)
    raise ConfigError(
        f"seed ({recipe.seed}): in each of {MAX_DRAWS} batches two experts' scores lie closer than {MIN_MARGIN} (best "
        f"{margin:.1e}), so that rounding could decide: set another seed"
    )


def _answers(question: Question) -> dict[int, Truth]:
    """By micro-batch size, of those that divide the global batch."""
    sequences = question.tokens.shape[1]
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
    if question.aux_loss != "micro_batch":
        return dict.fromkeys(sizes, answer(question))
    return {size: answer(replace(question, micro_size=size)) for size in sizes}


def initial_state(recipe: Recipe) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
    """Initial weights of the whole model by Hugging Face name, and which of them are stacked experts."""
    config = load_model_config(recipe)
    plan = SlotPlan(num_experts_of(config), 1)
    built = build_model(recipe, config, build_groups(Topology(world=1, expert=1)), plan, CPU, _KeepsNothing())
    state = {name: tensor.clone() for name, tensor in built.model.state_dict().items()}
    meta = meta_model(recipe, config)
    experts: set[str] = set()
    for block in find_blocks(meta):
        draw = partial(draw_expert, meta, block.experts, block.experts_name, device=CPU, seed=recipe.seed)
        drawn = [draw(expert=expert) for expert in range(num_experts_of(config))]
        stacked = {f"{block.experts_name}.{key}": torch.stack([one[key] for one in drawn]) for key in drawn[0]}
        state |= stacked
        experts |= set(stacked)
    return state, frozenset(experts)


class _KeepsNothing:
    def experts(self, block, draw, plan):
        return ResidentExperts(torch.zeros(0), torch.zeros(0))

    def shared(self, block, draw):
        raise AssertionError("one process keeps its shared experts in the model")


def draw_tokens(recipe: Recipe, draw: int) -> np.ndarray:
    """[steps, sequences, length + 1]; frequent and rare tokens, as in text."""
    generator = np.random.default_rng([recipe.seed, draw])
    size = (recipe.train.steps, recipe.batch.global_size, recipe.data.sequence_length + 1)
    vocab = load_model_config(recipe).vocab_size
    return (vocab * generator.random(size) ** 2).astype(np.int64)


def ask(recipe: Recipe, state: dict[str, torch.Tensor], experts: frozenset[str], tokens: np.ndarray) -> Question:
    """Everything the oracle may know, as plain values."""
    config = load_model_config(recipe)
    profile = profile_of(config.model_type)
    spec = profile.spec(config)
    blocks = find_blocks(meta_model(recipe, config))
    optimizer, steps = recipe.optimizer, recipe.train.steps
    return Question(
        config=config,
        state=state,
        experts=experts,
        routers=tuple(f"{block.name}.{profile.names.router}" for block in blocks),
        bias=profile.names.bias,
        score=spec.score,
        normalize=spec.normalize,
        norm_eps=spec.eps,
        scale=spec.scale,
        tables=tuple(
            hash_table(block, recipe, config).numpy() if block.index < recipe.moe.hash_layers else None
            for block in blocks
        ),
        top_k=spec.top_k,
        num_groups=spec.num_groups,
        topk_groups=spec.topk_groups,
        router="forced" if recipe.moe.force_load else recipe.moe.router,
        sinkhorn_rounds=SINKHORN_ROUNDS,
        forced=forced_shares(recipe, config),
        jitter=jitter_noise(config),
        jitter_key=seed_of(recipe.seed, "router jitter"),
        capacity_factor=recipe.moe.capacity_factor,
        drop=recipe.moe.drop,
        aux_coef=aux_loss_coef(recipe, config),
        aux_loss=recipe.moe.aux_loss,
        micro_size=1,
        z_coef=recipe.moe.z_loss_coef,
        bias_rate=recipe.moe.bias_update_rate,
        bias_update=recipe.moe.bias_update,
        rates=tuple(optimizer.lr * lr_factor(recipe.schedule, step, steps) for step in range(steps)),
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        no_decay=optimizer.no_decay,
        grad_clip=optimizer.grad_clip,
        tokens=tokens,
    )
