"""How a model is trained, and `RunConfig`, the whole of a run."""

from dataclasses import dataclass, field
from typing import Literal

from megagate.config.model import ModelConfig

DType = Literal["auto", "fp32", "bf16"]
GradDType = Literal["fp32", "model"]
OptimizerName = Literal["adamw", "sgd"]
ScheduleKind = Literal["cosine", "wsd", "constant"]
OnNonfinite = Literal["stop", "skip"]
AttentionSpan = Literal["causal", "document"]
WandbMode = Literal["disabled", "offline", "online"]
OnMismatch = Literal["stop", "continue"]
KernelBackend = Literal["native", "te"]
NormKernel = Literal["native", "apex"]
Fp8Recipe = Literal["none", "delayed", "current", "blockwise", "mxfp8"]
Fp8Part = Literal["embedding", "head", "router", "gate", "first_layers", "last_layers"]
OptimizerImplementation = Literal["torch", "apex", "te", "deepspeed"]


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        steps: Optimizer steps of the run; >= 1.
        global_batch_size: Sequences per optimizer step, over all ranks.
        micro_batch_size: Sequences that one data-parallel rank holds at a time; 0 takes the rank's whole share of the global batch, so
            that nothing is accumulated and micro-steps have the same content on any number of ranks.
        seq_len: Tokens per sequence.
        seed: Seed of the initial weights and of the sample order.
        output_dir: Folder of the run; made if missing.
        resume: `auto` goes on from the newest checkpoint of `output_dir`, `never` refuses a folder with checkpoints, anything else
            is the path of a checkpoint, or of a run, to start from; not read, which is said, once `output_dir` has its own.
        recompute: Recompute each block in the backward pass instead of keeping its activations.
        on_nonfinite: What a loss or gradient norm that is not finite does: `stop` the run, or `skip` the step; what an infinity that
            FP8's delayed scaling saturates does: `stop` the run, or be told (`skip`); its scale then stands still for
            `precision.fp8.amax_history` micro-steps.
    """

    steps: int = 1000
    global_batch_size: int = 8
    micro_batch_size: int = 1
    seq_len: int = 4096
    seed: int = 1234
    output_dir: str = "runs/default"
    resume: str = "auto"
    recompute: bool = False
    on_nonfinite: OnNonfinite = "stop"


@dataclass(frozen=True)
class DataConfig:
    """The tokens.

    Args:
        path: Folder of a prepared data set, `embedded` (English text of the running Python, prepared on first use), or `synthetic`
            (random tokens with learnable structure, made in memory); or a blend, weights and data sets in turn, as in
            "0.7 /data/a 0.3 /data/b"; "from 1000000" and weights behind it replace them from that sample of the run on.
        valid: Validation sets, NAME=FOLDER separated by spaces, each measured as val_loss/NAME; by default the validation splits of
            data.path, named by the last part of their paths where there are several.
        cache_dir: Where `embedded` keeps its prepared shards; by default `data` inside `train.output_dir`.
        attention: What a token attends to: all tokens before it in its window (`causal`), or those of its own document (`document`: at each
            end of a document attention is cut, positions begin at 0 again, and the token after it is no target; what Megatron-LM calls
            --reset-attention-mask, --reset-position-ids and --eod-mask-loss).
    """

    path: str = "embedded"
    valid: str = ""
    cache_dir: str = ""
    attention: AttentionSpan = "causal"


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer.

    Args:
        name: `adamw`, or `sgd` (tests of layouts: Adam hides errors of scale).
        implementation: Whose kernel makes the step: PyTorch's (fused), or the FusedAdam of NVIDIA's `apex`, of Transformer Engine (`te`)
            or of `deepspeed`; those three are for GPUs.
        lr: Peak learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay of matrices; norms and biases have none.
        grad_clip: Largest global gradient norm; 0 switches clipping off.
    """

    name: OptimizerName = "adamw"
    implementation: OptimizerImplementation = "torch"
    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over steps.

    Args:
        kind: `cosine` to the floor, `wsd` (warm-up, stable, linear decay to the floor; arXiv 2404.06395), or `constant`.
        warmup_steps: Steps of linear warm-up from 0.
        decay_steps: Length of the final decay of `wsd`, in steps.
        min_lr: The floor.
    """

    kind: ScheduleKind = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_lr: float = 0.0


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work; data parallelism is the world divided by tp.

    Args:
        tp: Tensor-parallel (and sequence-parallel) ranks.
        ep: Expert-parallel ranks, folded over data and tensor parallelism.
        zero_stage: DeepSpeed ZeRO: 1 shards optimizer states, 2 also gradients, 3 also weights; 0 shards nothing (dense models in fp32).
    """

    tp: int = 1
    ep: int = 1
    zero_stage: int = 1


@dataclass(frozen=True)
class Fp8Config:
    """Products in FP8. Weights, gradients, masters and moments stay what they are: a product rounds what goes into it, and nothing else.

    Args:
        recipe: How the scales of FP8 tensors are found, by Transformer Engine's names: one for each tensor, of the amaxes of earlier
            micro-steps (`delayed`) or of the tensor itself (`current`), of blocks of 128 and of 128 x 128 numbers (`blockwise`), of 32
            numbers (`mxfp8`); `none` rounds nothing.
        emulate: Round as the recipe does, and multiply in fp32, on any device: slow, and the recipe's effect on the loss to see.
        keep_high_precision: What stays out of FP8: embedding, head and router, which have no such form and must be listed; the logits of an
            elementwise gate (`gate`; others' always stay out); all of the first block (`first_layers`), of the last (`last_layers`).
        amax_history: Micro-steps whose largest amax decides the scale of `delayed`.
    """

    recipe: Fp8Recipe = "none"
    emulate: bool = False
    keep_high_precision: tuple[Fp8Part, ...] = ("embedding", "head", "router", "gate")
    amax_history: int = 1024

    def keeps_block(self, index: int, num_layers: int) -> bool:
        """Whether all of a block, counted from 0, stays in high precision."""
        kept = self.keep_high_precision
        return ("first_layers" in kept and index == 0) or ("last_layers" in kept and index == num_layers - 1)

    def rounds(self, role: str) -> bool:
        """Whether a product of this role (`Role` of `backend/base.py`) is in FP8, in a block that is."""
        return role == "projection" or (role == "gate" and "gate" not in self.keep_high_precision)


@dataclass(frozen=True)
class PrecisionConfig:
    """The numbers.

    Args:
        dtype: Of weights and activations; `auto` is bf16 on GPUs and fp32 on CPUs, and RUN/config.yaml names which. Masters, moments,
            router, softmax, gate, norm statistics and loss are fp32 always.
        grad_dtype: In which gradients are accumulated and summed over ranks.
        backend: Whose kernels compute: PyTorch's (`native`), or Transformer Engine's (`te`; GPUs).
        norm: Whose kernel norms: PyTorch's operations (`native`), or NVIDIA's `apex` (GPUs).
    """

    dtype: DType = "auto"
    grad_dtype: GradDType = "fp32"
    backend: KernelBackend = "native"
    norm: NormKernel = "native"
    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: Steps between checkpoints; 0 saves only at the end and on a signal.
        keep: Newest checkpoints to keep, besides the best, up to the step that the run has reached; 0 keeps all.
        asynchronous: Go on training while a copy of the state in host memory is written, which takes as much host memory as a checkpoint
            has bytes, over all ranks (page-locked, beside GPUs, somewhat more); false stands still until it is written, and in the next
            step until it is read back. What is saved at the end or on a signal takes no copy.
        on_mismatch: What a resumed run does whose state is not what was in memory at the save, or whose first step is not the one that
            followed it then: `stop`, or say it and `continue`, which holds for one start: RUN/config.yaml does not keep it.
    """

    every: int = 1000
    keep: int = 2
    asynchronous: bool = True
    on_mismatch: OnMismatch = "stop"


@dataclass(frozen=True)
class EvalConfig:
    """Validation.

    Args:
        every: Steps between validations; 0 validates only at the end.
        batches: Length of a validation, in global batches; fewer where the validation split ends.
        min_gain_nats: At the end the validation loss must be this far below the unigram entropy of the same tokens, else the run
            fails with exit code 1; 0 switches the check off.
        prompt: Text that the trained model continues at the end; empty for none.
        sample_tokens: Length of that continuation.
    """

    every: int = 0
    batches: int = 8
    min_gain_nats: float = 0.0
    prompt: str = ""
    sample_tokens: int = 48


@dataclass(frozen=True)
class LogConfig:
    """The log.

    Args:
        every: Steps between lines of the log where there is no terminal for a progress bar; metrics.jsonl gets every step.
    """

    every: int = 10


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, as a second sink of the metrics.

    Args:
        mode: `offline` needs no key and no network.
        project: Name of the project.
    """

    mode: WandbMode = "disabled"
    project: str = "megagate"


@dataclass(frozen=True)
class ObserveConfig:
    """What the metrics say of the gate, attention, hidden states, experts and gradients.

    Args:
        every: Steps between looks; 0 switches them off. A look is one more forward pass of the step's first micro-batch, and changes
            nothing of the training.
        queries: Of each sequence, evenly spaced, whose attention is looked at; 0 (or at least train.seq_len) looks at all of them.
    """

    every: int = 50
    queries: int = 32


@dataclass(frozen=True)
class ProfileConfig:
    """A torch profiler trace, written to RUN/profile.

    Args:
        start_step: First step of the trace, counted from 1.
        steps: Steps to trace; 0 switches it off.
    """

    start_step: int = 10
    steps: int = 0


@dataclass(frozen=True)
class RunConfig:
    """A run is what its config says: model, data, layout, numbers and loop."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def micro_batch(self, dp: int) -> int:
        """`train.micro_batch_size`, its 0 resolved for `dp` data-parallel ranks."""
        return self.train.micro_batch_size or self.train.global_batch_size // dp
