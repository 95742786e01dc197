"""The recipe: every key a YAML file may set, its type, its bound and one line of meaning.

All models are frozen and refuse unknown keys. Rules that need more than one section stand at the
bottom, in `Recipe`. Rules that need the world size or the model's own configuration live where that
knowledge is: `parallel.topology`, `config.batch` and `model.family`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every section: frozen; an unknown key, a number written as text and `true` for 1 are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, strict=True, allow_inf_nan=False)


Unstrict = Field(strict=False)
"""YAML has lists and no tuples; what is inside stays strict."""


class ModelSection(Section):
    """A Hugging Face architecture: `model_type` with `config` fields, a `path` to a config.json, or `weights`."""

    model_type: str | None = None
    """Hugging Face `model_type`, such as qwen3_moe."""
    path: str | None = None
    """A config.json, or a folder that holds one; `config` then overrides its fields."""
    weights: str | None = None
    """A Hugging Face folder to start from: its config.json as `path`, and its safetensors in place of drawn weights."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of the family's configuration class, in Hugging Face's spelling."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Hugging Face `attn_implementation`."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in backward; routing is replayed, not repeated."""
    kernels: Annotated[tuple[Literal["rotary", "cross_entropy"], ...] | None, Unstrict] = None
    """Triton kernels of our own in the place of several of torch's: the rotary embedding, the loss of the logits. Left
    out: both on a GPU, none on a CPU."""
    compile: bool = False
    """`torch.compile` each layer's attention, on a GPU. Beside our kernels little is left for it: measure first."""

    @model_validator(mode="after")
    def _one_source(self):
        if sum(source is not None for source in (self.model_type, self.path, self.weights)) != 1:
            raise ValueError("set exactly one of model.model_type, model.path and model.weights")
        return self


class ForcedLoadSection(Section):
    """Which share of the rows each expert gets in training, whatever its scores: for benchmarks. One of three."""

    balanced: bool = False
    """All alike; also written `moe.force_load: balanced`."""
    zipf: float | None = Field(default=None, ge=0)
    """Expert e gets (1 + e)^-zipf of the rows, at most one row of each token."""
    histogram: str | None = None
    """A JSON list of one number per expert, in proportion to its rows."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any):
        return {"balanced": True} if value == "balanced" else value

    @model_validator(mode="after")
    def _one(self):
        if sum((self.balanced, self.zipf is not None, self.histogram is not None)) != 1:
            raise ValueError("moe.force_load is balanced, {zipf: EXPONENT} or {histogram: FILE}: set exactly one")
        return self

    def __str__(self) -> str:
        if self.balanced:
            return "balanced"
        return f"zipf {self.zipf:g}" if self.zipf is not None else f"histogram {self.histogram}"


class MoESection(Section):
    """The parallel MoE layer."""

    backend: Literal["auto", "hopper", "fused", "grouped", "loop"] = "auto"
    """How experts are computed: QuACK's GEMMs between our Triton kernels (bf16 on a Hopper GPU, extra `hopper`);
    torch's grouped GEMM between them; the grouped GEMM alone; or one GEMM per expert (the reference). auto, on a GPU in
    bf16: fused with SwiGLU, where it was measured, else grouped."""
    aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the auxiliary loss, mean over layers, 1.0 at perfect balance.
    Unset: the model's own `router_aux_loss_coef`, at the strength Hugging Face gives it."""
    aux_loss: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """What it balances: every sequence; every forward of a rank, so that `batch.micro_size` matters; or the whole
    optimizer step over all ranks (arXiv 2501.11873), exactly: where gradients are accumulated, a second forward."""
    z_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the router z-loss: mean over tokens and layers of logsumexp(logits)^2."""
    bias_update_rate: float = Field(default=0.0, ge=0)
    """Auxiliary-loss-free balancing: step of the correction bias per optimizer step; the family must have one."""
    bias_update: Literal["sign", "zero_mean_sign", "proportional", "quantile"] = "sign"
    """That step's direction: the sign of mean load - load (arXiv 2408.15664); less its mean over experts; in
    proportion, (mean load - load) / mean load; or quantile balancing: the rate, at most 1, is the part of the way that
    the bias goes to the one that evens out the step's sequences, on average."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Training drops what an expert gets beyond ceil(factor * tokens * top-k / experts) of a sequence; unset: nothing.
    Evaluations never drop."""
    drop: Literal["probability", "position"] = "probability"
    """Who finds room: the largest weights (which looks at later tokens), or the earliest tokens."""
    router: Literal["top_k", "expert_choice", "sinkhorn"] = "top_k"
    """How training chooses: each token its best experts; each expert its best tokens of a sequence (arXiv 2202.09368);
    each token its best after a sequence's loads are evened out (arXiv 2202.01169). The latter two look at later tokens;
    evaluations and exported models choose by top_k."""
    force_load: ForcedLoadSection | None = None
    """For benchmarks: experts by a token's place, weights as the router's. Marked in every log and checkpoint."""
    hash_layers: int = Field(default=0, ge=0)
    """The first so many MoE layers route by a seeded, balanced table token id -> experts (arXiv 2106.04426)."""
    route_after_dp_transform: bool = False
    """Under tensor parallelism: route the share of the tokens a rank works on, not all it holds. Same numbers."""
    replan_interval: int = Field(default=0, ge=0)
    """Place the redundant experts anew every so many steps, by the loads since the last time; 0: never."""

    @property
    def whole_sequences(self) -> bool:
        """Whether the choice of experts looks at whole sequences."""
        return self.capacity_factor is not None or self.router != "top_k" or self.force_load is not None

    @property
    def not_causal(self) -> list[str]:
        """Settings by which the choice for a token depends on later tokens of its sequence."""
        found = [] if self.router == "top_k" else [f"moe.router ({self.router})"]
        if self.capacity_factor is not None and self.drop == "probability":
            found.append("moe.drop (probability)")
        return found


class ParallelSection(Section):
    """How ranks are divided. Data parallelism is what remains."""

    expert: int | Literal["auto"] = "auto"
    """Ranks that share one set of experts (EP). It need not divide the number of experts."""
    tensor: int = Field(default=1, ge=1)
    """Ranks that share every attention and dense MLP layer, and read the same samples (TP)."""
    expert_tensor: int = Field(default=1, ge=1)
    """Ranks that share every expert, cut along its intermediate size."""
    shared_expert_tensor: bool = False
    """Cut the shared experts over the `tensor` ranks too; their sum over ranks runs beside the routed experts."""
    shared_expert_ranks: int | Literal["auto"] = 0
    """Of each EP group, ranks that hold the shared experts and nothing else of the MoE layers."""
    redundant_experts: int | Literal["auto"] = 0
    """Additional copies of experts in each EP group; their gradients and states are one expert's."""
    timeout_s: int = Field(default=600, ge=1)
    """A collective that waits longer than this ends the run."""

    @model_validator(mode="after")
    def _positive(self):
        if self.expert != "auto" and self.expert < 1:
            raise ValueError(f"parallel.expert ({self.expert}) must be at least 1")
        for name in ("shared_expert_ranks", "redundant_experts"):
            value = getattr(self, name)
            if value != "auto" and value < 0:
                raise ValueError(f"parallel.{name} ({value}) must be at least 0")
        if self.shared_expert_tensor and self.shared_expert_ranks:
            raise ValueError(
                f"parallel.shared_expert_tensor (true) and parallel.shared_expert_ranks ({self.shared_expert_ranks}): "
                "shared experts are either cut over the tensor ranks or kept on ranks of their own; set one"
            )
        if self.expert_tensor > 1 and self.shared_expert_ranks:
            raise ValueError(
                f"parallel.expert_tensor ({self.expert_tensor}) and parallel.shared_expert_ranks "
                f"({self.shared_expert_ranks}): ranks of their own hold whole shared experts; set one of the two to "
                "its default"
            )
        return self


class ZeroSection(Section):
    """Sharding of weights, gradients and optimizer states, of the dense part and the experts alike."""

    stage: int = Field(default=1, ge=0, le=3)
    """0 nothing, 1 optimizer states, 2 and gradients, 3 and weights. In bf16 the dense part of 0 runs as 1."""
    offload: Literal["none", "cpu"] = "none"
    """Keep fp32 master weights and moments in host memory (stage 1 and up)."""

    @model_validator(mode="after")
    def _offload_needs_shards(self):
        if self.offload == "cpu" and self.stage == 0:
            raise ValueError("zero.offload (cpu) needs zero.stage of at least 1, not 0: at stage 0 nothing is sharded")
        return self


class PrecisionSection(Section):
    """Number formats. Master weights and router arithmetic are float32 whatever is set here."""

    compute: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Weights and activations in forward and backward."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Accumulation and reduction of gradients."""
    experts: Literal["bf16", "fp8"] | None = None
    """The routed experts' products in forward, and with gradients of activations in backward: as `compute` (unset), or
    in FP8 where that is faster, e4m3 with a scale per row, on an H100 or H200. Their weights' gradients stay bf16."""

    @model_validator(mode="after")
    def _experts_fit(self):
        if self.experts is not None and self.compute != "bf16":
            raise ValueError(
                f"precision.experts ({self.experts}) needs precision.compute (bf16), not {self.compute}: set that, or "
                "leave precision.experts out"
            )
        return self

    @model_validator(mode="after")
    def _gradients_fit(self):
        if self.gradients == "bf16" and self.compute != "bf16":
            raise ValueError(f"precision.gradients (bf16) needs precision.compute (bf16), not {self.compute}")
        return self


class OptimizerSection(Section):
    """AdamW, by whichever library implements it."""

    name: Literal["adamw", "one_pass_adamw", "deepspeed_fused_adam", "apex_fused_adam"] = "adamw"
    """torch.optim.AdamW, on a GPU fused and with the experts in one pass over memory by a Triton kernel; that pass on a
    CPU too; DeepSpeed's FusedAdam or NVIDIA apex's FusedAdam."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], Unstrict] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of every parameter with two or more dimensions."""
    no_decay: Annotated[tuple[str, ...], Unstrict] = ()
    """Parameters whose Hugging Face name contains one of these also get none, for example `embed_tokens`."""
    grad_clip: float = Field(default=1.0, ge=0)
    """Clip the global norm, experts included; 0 turns clipping off."""
    state_precision: Literal["fp32"] = "fp32"
    """Format of the moments."""

    @model_validator(mode="after")
    def _betas(self):
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"optimizer.betas ({list(self.betas)}) must lie in [0, 1)")
        return self


class ScheduleSection(Section):
    """Learning rate over optimizer steps: a linear warmup, then one of four shapes."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Cosine, warmup-stable-decay, linear decay or constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps from 0 to the peak."""
    decay_steps: int | None = Field(default=None, ge=1)
    """For `wsd`: length of the final decay (unset: a tenth of train.steps)."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""


class CorpusSection(Section):
    """One source of tokens: a prepared Megatron data set, or text that is prepared on first use."""

    prefix: str | None = None
    """Path of a `.bin`/`.idx` pair without the ending."""
    text: str | None = None
    """A text file, a .jsonl file or a folder; `python-stdlib` is the standard library's own sources."""
    glob: str = "**/*"
    """Which files of a folder."""
    jsonl_field: str = "text"
    """The field of a .jsonl file."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this corpus in the blend."""

    @model_validator(mode="after")
    def _one_source(self):
        if (self.prefix is None) == (self.text is None):
            raise ValueError("a corpus sets exactly one of prefix and text")
        return self


class DataSection(Section):
    """What the model reads."""

    corpora: tuple[CorpusSection, ...] = Field(min_length=1, strict=False)
    """Blended by weight."""
    tokenizer: str = "byte"
    """`byte` (built in, 257 ids) or a folder or tokenizer.json of any Hugging Face tokenizer."""
    sequence_length: int = Field(ge=1)
    """Tokens per training sequence."""
    validation_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of each corpus's documents held out, the same ones in every run."""
    cache_dir: str = ".cache/data"
    """Where corpora given as text are prepared."""


class BatchSection(Section):
    """Sizes in sequences; gradient accumulation is derived."""

    global_size: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_size: int = Field(ge=1)
    """Sequences per forward on one rank."""


class TrainSection(Section):
    """Length of the run and its evaluations."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    eval_interval: int = Field(default=0, ge=0)
    """Evaluate every so many steps; 0: only at the end."""
    eval_sequences: int = Field(default=64, ge=1)
    """Held-out sequences per evaluation."""


class CheckpointSection(Section):
    """Saves under `<run dir>/checkpoints/step_<N>`."""

    interval: int = Field(default=0, ge=0)
    """Save every so many steps; 0: never but at the end and on SIGTERM."""
    keep: int = Field(default=2, ge=2)
    """How many of the newest to keep; at least 2, so that one is always complete."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of steps that are multiples of this are never removed; 0: none is kept for that."""
    keep_best: int = Field(default=0, ge=0)
    """How many of the lowest validation loss to keep besides; needs a train.eval_interval; 0: none is kept for that."""
    asynchronous: bool = True
    """Copy the state into host memory and write it while training goes on; false: training waits for the disk."""
    at_end: bool = True
    """Save after the last step."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: from the newest complete step of the run directory if there is one."""


class GuardSection(Section):
    """A rule on the load of the experts, and what is done once it has held for some optimizer steps in a row."""

    when: Literal["dead_experts", "entropy_below", "max_vio_above", "router_logit_growth"]
    """An expert gets no token; a layer's entropy (1 balanced, 0 all on one expert) or MaxVio crosses `value`; the root
    mean square of a layer's router logits exceeds `value` times what it was at `reference_step`."""
    value: float | None = Field(default=None, ge=0)
    """The bound; not for dead_experts."""
    reference_step: int | None = Field(default=None, ge=1)
    """For router_logit_growth: the optimizer step to compare with, after the warmup."""
    steps: int = Field(ge=1)
    """Optimizer steps in a row; once reported, it is counted from zero again."""
    action: Literal["warn", "raise_bias_rate", "replan", "stop"] = "warn"
    """Besides a line and an event: nothing; a larger bias step; redundant experts placed anew; save and end the run."""
    factor: float = Field(default=2.0, gt=1)
    """For raise_bias_rate: what to multiply the rate by."""
    max_rate: float | None = Field(default=None, gt=0)
    """For raise_bias_rate: where it ends."""

    @model_validator(mode="after")
    def _fits(self):
        if (self.value is None) != (self.when == "dead_experts"):
            rule = "takes no value: steps says how long" if self.value is not None else "needs a value, its bound"
            raise ValueError(f"diagnostics.guards: when ({self.when}) {rule}")
        if (self.reference_step is None) == (self.when == "router_logit_growth"):
            rule = "needs a reference_step" if self.reference_step is None else "takes no reference_step"
            raise ValueError(f"diagnostics.guards: when ({self.when}) {rule}")
        if (self.max_rate is None) == (self.action == "raise_bias_rate"):
            rule = "needs a max_rate" if self.max_rate is None else "takes no max_rate"
            raise ValueError(f"diagnostics.guards: action ({self.action}) {rule}")
        return self


class DiagnosticsSection(Section):
    """What is written down."""

    log_interval: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl and of the progress display."""
    heatmap_interval: int = Field(default=50, ge=0)
    """Steps between records of every layer and expert in metrics.jsonl, rounded up to a log step; 0: never."""
    coactivation_interval: int = Field(default=0, ge=0)
    """Also count which experts tokens choose together, at log steps that are multiples of this; 0: never."""
    saturation_tokens: int = Field(default=4096, ge=0)
    """How many held-out tokens' choices each evaluation keeps in <run dir>/routing; 0: none."""
    report: bool = True
    """Write report.html at the end, as `moe-train report` does at any time."""
    load_picture: bool = True
    """Write load.png, tokens per layer and expert, at the end."""
    guards: Annotated[tuple[GuardSection, ...], Unstrict] = ()
    """Rules on the load of the experts."""


class TrackingSection(Section):
    """wandb and TensorBoard. Nothing here needs a network unless `mode` is online."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """Environment variable WANDB_MODE wins."""
    project: str = "moe_train"
    """wandb project."""
    name: str | None = None
    """Run name; unset: the run directory's name."""
    group: str | None = None
    """wandb group."""
    tags: Annotated[tuple[str, ...], Unstrict] = ()
    """wandb tags."""
    max_layer_keys: int = Field(default=128, ge=0)
    """At most so many keys of single layers (moe/layer_07/entropy), layers spread evenly; the heat map has them all."""
    tensorboard: bool = False
    """Also write TensorBoard's files to <run dir>/tensorboard; pip install 'moe_train[tensorboard]'."""


OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision.compute",
    "bfloat16": "precision.compute",
    "amp": "precision.compute",
    "fp16": "precision.compute",
    "data_types": "precision.gradients",
    "communication_data_type": "precision.gradients",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload",
    "zero_optimization.cpu_offload": "zero.offload",
    "torch_autocast": "precision.compute",
    "expert_parallel": "parallel.expert",
    "tensor_parallel": "parallel.tensor",
    "wandb": "tracking",
}
"""DeepSpeed keys that a recipe key already decides, and which key that is."""


FIXED_DEEPSPEED_KEYS = {
    "gradient_allreduce_op": "expert gradients are averaged as DeepSpeed averages by default",
    "prescale_gradients": "expert gradients are averaged as DeepSpeed averages by default",
    "gradient_predivide_factor": "expert gradients are averaged as DeepSpeed averages by default",
    "managed_gradient_accumulation": "steps follow batch.global_size and batch.micro_size",
    "zero_optimization.compute_grad_norm": "one norm, of dense and expert parameters, decides clip and skip",
    "zero_optimization.zero_quantized_gradients": "expert gradients are not quantised",
}
"""DeepSpeed keys that would change the arithmetic of the dense part alone, and why they are refused."""


BALANCERS = ("aux_loss_coef", "z_loss_coef", "bias_update_rate")
"""Keys of `moe` that act on layers that route by scores."""


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    moe: MoESection = MoESection()
    parallel: ParallelSection = ParallelSection()
    zero: ZeroSection = ZeroSection()
    precision: PrecisionSection = PrecisionSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    data: DataSection
    batch: BatchSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    diagnostics: DiagnosticsSection = DiagnosticsSection()
    tracking: TrackingSection = TrackingSection()
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of initial weights, data order and everything random."""
    world_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Unstrict] = ()
    """Numbers of ranks the recipe is made for; empty: any that fits."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys that no recipe key covers."""

    @model_validator(mode="after")
    def _across_sections(self):
        problems = []
        if self.schedule.warmup_steps > self.train.steps:
            problems.append(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) must not exceed train.steps ({self.train.steps})"
            )
        if self.precision.compute == "fp16" and self.zero.stage == 0:
            problems.append("precision.compute (fp16) needs zero.stage of at least 1: loss scaling is DeepSpeed ZeRO's")
        if self.zero.offload == "cpu" and self.optimizer.name != "adamw":
            problems.append(
                f"zero.offload (cpu) needs optimizer.name (adamw), not {self.optimizer.name}: it runs on a GPU"
            )
        if self.model.compile and (self.zero.stage == 3 or self.parallel.tensor > 1):
            other = "zero.stage (3)" if self.zero.stage == 3 else f"parallel.tensor ({self.parallel.tensor})"
            problems.append(
                f"model.compile (true) does not go with {other}, which moves weights or partial sums between ranks in "
                "the middle of attention: leave one of them out"
            )
        if self.precision.experts == "fp8" and self.moe.backend not in ("auto", "fused"):
            problems.append(
                f"precision.experts (fp8) is computed by moe.backend (fused), not {self.moe.backend}: set that to "
                "fused or auto, or precision.experts to bf16"
            )
        problems += self._guards()
        problems += self._best()
        problems += self._routing()
        problems += [
            f"deepspeed.{key} is decided by {ours}: set that key instead"
            for key, ours in OWNED_DEEPSPEED_KEYS.items()
            if _has_path(self.deepspeed, key.split("."))
        ]
        problems += [
            f"deepspeed.{key} cannot be set: {reason}"
            for key, reason in FIXED_DEEPSPEED_KEYS.items()
            if _has_path(self.deepspeed, key.split("."))
        ]
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            problems.append(f"deepspeed.zero_optimization ({zero!r}) must be a mapping: it is merged into ours")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _guards(self) -> list[str]:
        problems, rate = [], self.moe.bias_update_rate
        for guard in self.diagnostics.guards:
            if guard.action == "raise_bias_rate" and not 0 < rate < (guard.max_rate or 0):
                problems.append(
                    f"diagnostics.guards: action (raise_bias_rate) up to max_rate ({guard.max_rate}) needs a "
                    f"moe.bias_update_rate ({rate}) between 0 and that"
                )
            if guard.action == "replan" and not self.parallel.redundant_experts:
                problems.append(
                    "diagnostics.guards: action (replan) places redundant experts, and parallel.redundant_experts is 0"
                )
        return problems

    def _best(self) -> list[str]:
        """Each checkpoint needs a validation loss of its own."""
        keep, interval = self.checkpoint.keep_best, self.checkpoint.interval
        fraction, every = self.data.validation_fraction, self.train.eval_interval
        if not keep:
            return []
        rule = f"checkpoint.keep_best ({keep}) compares checkpoints by their validation loss:"
        problems = []
        if fraction == 0:
            problems.append(f"{rule} data.validation_fraction (0.0) must be above 0")
        if every == 0 or interval == 0:
            found = f"train.eval_interval ({every}) and checkpoint.interval ({interval})"
            problems.append(f"{rule} {found} must be at least 1")
        elif interval % every:
            found = f"checkpoint.interval ({interval}) must be a multiple of train.eval_interval ({every})"
            problems.append(f"{rule} {found}")
        return problems

    def _routing(self) -> list[str]:
        moe, problems = self.moe, []
        if moe.drop != "probability" and moe.capacity_factor is None:
            problems.append(
                f"moe.drop ({moe.drop}) says which tokens an expert without room drops, and moe.capacity_factor is "
                "unset: set it or leave moe.drop out"
            )
        if moe.route_after_dp_transform and moe.whole_sequences:
            key = "force_load" if moe.force_load else "router" if moe.router != "top_k" else "capacity_factor"
            problems.append(
                f"moe.{key} ({getattr(moe, key)}) looks at whole sequences, and moe.route_after_dp_transform (true) "
                "routes shares of them: set one of the two"
            )
        if moe.bias_update == "quantile" and moe.bias_update_rate > 1:
            problems.append(
                f"moe.bias_update_rate ({moe.bias_update_rate}) is the part of the way to the bias that "
                "moe.bias_update (quantile) finds: set it to at most 1"
            )
        if moe.router == "expert_choice" and moe.capacity_factor is not None:
            problems.append(
                f"moe.router (expert_choice) gives every expert the same number of tokens, so that moe.capacity_factor "
                f"({moe.capacity_factor}) has nothing to drop: leave it out"
            )
        for key in ("aux_loss_coef", "bias_update_rate"):
            if moe.router != "top_k" and getattr(moe, key):
                problems.append(
                    f"moe.router ({moe.router}) balances the choice itself, and moe.{key} ({getattr(moe, key)}) would "
                    "balance scores that it does not follow: set one of them to its default"
                )
        if moe.force_load is not None:
            problems += self._forced()
        return problems

    def _forced(self) -> list[str]:
        moe = self.moe
        start = f"moe.force_load ({moe.force_load}) decides which experts a token has"
        others = {
            "moe.router": moe.router if moe.router != "top_k" else None,
            **{f"moe.{key}": getattr(moe, key) for key in ("hash_layers", *BALANCERS)},
            "diagnostics.guards": f"{len(self.diagnostics.guards)} rules" if self.diagnostics.guards else None,
        }
        return [
            f"{start}, and {key} ({value}) has no say then: leave one out" for key, value in others.items() if value
        ]


def _has_path(tree: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True
