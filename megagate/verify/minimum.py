"""What one optimizer step has to send: formulas, from sizes alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megagate.config.count import is_replicated, parameters
from megagate.config.model import ModelConfig
from megagate.nn.loss import CHUNK_TOKENS
from megagate.parallel.traffic import Kind, Sent, bytes_sent

FP32, INT32, INT64 = 4, 4, 8
"""Bytes of an element."""


@dataclass(frozen=True)
class StepShape:
    """One optimizer step as one rank sees it.

    Args:
        world: Ranks.
        tp: Ranks of the tensor axis.
        ep: Ranks of the expert axis.
        batch: Sequences of this data-parallel rank in a micro-step.
        seq_len: Tokens of a sequence.
        micro_steps: Of the step.
        dtype_bytes: Bytes of an element of activations and weights.
        recompute: Blocks run again in the backward pass.
        whole_blocks: And then to their end, as Transformer Engine's checkpoint does.
        rows_out: Routed rows of this rank's tokens that go to experts of other ranks, over layers and micro-steps.
        rows_in: Routed rows that come to this rank's experts from other ranks.
        norm_over_tp: The engine sums the squares of the gradient over tp itself (ZeRO stage 0).
        chunk_tokens: Tokens whose logits exist at the same time.
        documents: Windows are cut into documents.
        dense_amaxes: Of delayed scaling, those that the world shares: how many in each all-reduce of a micro-step.
        expert_amaxes: The same of this rank's experts, which edp shares.
    """

    world: int
    tp: int
    ep: int
    batch: int
    seq_len: int
    micro_steps: int
    dtype_bytes: int
    recompute: bool = False
    whole_blocks: bool = False
    rows_out: int = 0
    rows_in: int = 0
    norm_over_tp: bool = False
    chunk_tokens: int = CHUNK_TOKENS
    documents: bool = False
    dense_amaxes: tuple[int, ...] = ()
    expert_amaxes: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Of a micro-step on one data-parallel rank."""
        return self.batch * self.seq_len

    def size(self, axis: str) -> int:
        """Ranks of an axis."""
        world, tp, ep = self.world, self.tp, self.ep
        return {"world": world, "tp": tp, "dp": world // tp, "ep": ep, "edp": world // ep}[axis]


class Term(NamedTuple):
    """One line of the formula: collectives of one sort over the whole step, and the bytes that this rank sends for them."""

    what: str
    axis: str
    kind: Kind
    calls: int
    bytes: int


def step_terms(model: ModelConfig, step: StepShape) -> list[Term]:
    """What one rank sends in one `Engine.train_step`: through `parallel/comm.py`, and amaxes by Transformer Engine (TE) itself.

    Sizes: M micro-steps, L layers, L' of them with a mixture, b sequences, s tokens, width h, d channels of a head, g kv heads, E experts,
    B bytes of an element; F = 1 forward pass of a block, 2 with recompute; D = F where something is kept after a block's last collective
    (sandwich norm, residual clip) or TE recomputes, else 1: a recomputed block stops there. AG(x) = x (n - 1) and RS(x) = x (n - 1) / n
    with n ranks on the axis, x bytes given; AR(x) = 2 RS(x), each in whole bytes (`bytes_sent`). On an axis of size 1 all are nothing. a =
    b s/tp h B bytes is a shard of activations, A = tp a all of them.

    tp, activations:
        attention          all_gather  M L (F + 1) AG(a)     reduce_scatter  M L (F + 1) RS(A)      (in and out, and their adjoints)
        shared expert      all_gather  M L' (F + 1) AG(a)    reduce_scatter  M L' (F + 1) RS(A)     (where there is one)
        dense FFN          all_gather  M (L - L') (F + 1) AG(a)    reduce_scatter  M (L - L') (D + 1) RS(A)    (it ends a block)
        embedding          all_gather  M AG(a)               reduce_scatter  M RS(A)                (backward, forward)
        head               all_gather  M AG(a)               reduce_scatter  M RS(A)                (forward, backward)
    tp, sums in fp32, c tokens in a chunk of the loss:
        head maximum       all_reduce  M sum over chunks AR(4 c)
        head sums          all_reduce  M sum over chunks AR(4 (c + 1))
        enter(w)           all_reduce  M sum over replicated weights AR(4 elements): per layer two norms [h], four with sandwich norms;
                           q_norm, k_norm [d] each where there are; the router [E, h] of each mixture and the gate [1, h] of a shared
                           expert; k, v [g d, h] each where tp > g, with them a gate at G2 or G3 and all that switch heads have; a gate at
                           G5; once the final norm [h]
        shared scores      all_reduce  M L (F + 1) AR(4 b s d) of a head-shared gate                (forward, backward)
    ep, each layer of a mixture, with rows_out and rows_in summed over layers and micro-steps:
        split sizes        all_to_all  M L' F (ep - 1) E/ep 8                                        (int64 counts, one row per rank)
        rows               all_to_all  ((F + 1) rows_out + (D + 1) rows_in) h B, in M L' (F + D + 2) calls (per token and expert; forward
                           rows_out to dispatch and rows_in to combine, which ends a block; backward rows_in for dispatch, rows_out for
                           combine)
        router weights     all_to_all  (F rows_out + rows_in) 4, in M L' (F + 1) calls              (fp32, dispatch only)
    balance of a mixture, fp32:
        counts             all_reduce  M AR(4 L' E) over the world; scope `sequence`: M AR(4 L' b E) over tp
        logged             all_reduce  AR(4 (L' E + 1)) over the world; scope `sequence`: AR(4 L' E) more
    delayed scaling, fp32 amaxes, P dense products in FP8 and P' of this rank's experts:
        dense amaxes       all_reduce  M AR(4 * 3 P) over the world    (emulated: of input, weight and gradient of each product)
        experts' amaxes    all_reduce  M AR(4 * 3 P') over edp
        dense amaxes       all_reduce  M (AR(4 * 3 P) + AR(4 * 2 P)) over the world  (TE: outputs too; where ep is 1 experts count as dense)
        experts' amaxes    all_reduce  M (AR(4 * 3 P') + AR(4 * 2 P')) over edp
        infinities         all_reduce  AR(4) over the world            (whether the histories have one; emulated and TE)
    step:
        targets            all_reduce  AR(8) over dp, AR(16) where windows are cut into documents: their squared lengths too
        loss               all_reduce  AR(4) over dp
        norm               all_reduce  AR(4) over tp, at ZeRO stage 0 alone: DeepSpeed's own norm is in `zero_terms`

    Args:
        model: The model.
        step: The step.

    Returns:
        list[Term]: All terms, also those that are nothing.
    """
    terms = [*_activations(model, step), *_sums(model, step)]
    if model.is_moe:
        terms += [*_routing(model, step), *_balance(model, step)]
    terms += [_all_reduce("targets", "dp", [INT64 * (1 + step.documents)], step), _all_reduce("loss", "dp", [FP32], step)]
    terms += [
        _all_reduce(what, axis, [FP32 * count for count in counts if count] * step.micro_steps, step)
        for what, axis, counts in (("dense amaxes", "world", step.dense_amaxes), ("experts' amaxes", "edp", step.expert_amaxes))
    ]
    terms.append(_all_reduce("infinities", "world", [INT32] * any((*step.dense_amaxes, *step.expert_amaxes)), step))
    return [*terms, _all_reduce("norm", "tp", [FP32] * step.norm_over_tp, step)]


def zero_terms(step: StepShape, *, dense: int, experts: int, grad_bytes: int, reductions: int = 1, gathers: int = 1) -> list[Term]:
    """What ZeRO has to send beside that: each gradient to the rank that updates it, each updated weight to all, and one norm.

    With x elements of dense parameters and n = dp, and with those of experts and n = edp:
        gradients          reduce_scatter  R x grad_bytes (n - 1) / n      (R = 1 at stage 1; at stages 2 and 3 every micro-step reduces)
        weights            all_gather      G x / n dtype_bytes (n - 1)     (G = 1; at stage 3 before each forward and each backward pass)
    and
        norm               all_reduce      AR(4) over the world
    DeepSpeed 0.19.8 sends more, `tests/parity/test_parity_traffic.py` says exactly how much: it reduces gradients by all-reduce, twice the
    bytes, and its norm takes a handful of scalars.

    Args:
        step: The step.
        dense: Elements that this rank holds of parameters that are not experts.
        experts: Elements that this rank holds of experts.
        grad_bytes: Bytes of an element of the reduced gradients.
        reductions: Of the gradients in a step: R.
        gathers: Of the weights in a step: G.
    """
    terms = []
    for axis, elements in (("dp", dense), ("edp", experts)):
        size = step.size(axis)
        calls = int(size > 1 and elements > 0)
        sent = bytes_sent("reduce_scatter", elements * grad_bytes, size)
        terms.append(Term("gradients", axis, "reduce_scatter", reductions * calls, reductions * sent))
        shard = -(-elements // size) * step.dtype_bytes
        terms.append(Term("weights", axis, "all_gather", gathers * calls, gathers * bytes_sent("all_gather", shard, size)))
    return [*terms, _all_reduce("norm", "world", [FP32], step)]


def total_by_axis(terms: Iterable[Term], names: Mapping[str, str] | None = None) -> dict[tuple[str, Kind], Sent]:
    """Sums over the terms that are something, as `Traffic.by_axis` gives them.

    Args:
        terms: Of one rank.
        names: Another name for an axis, where several axes are one group of ranks (`verify/wire.py`).
    """
    sums: dict[tuple[str, Kind], Sent] = {}
    for term in terms:
        if term.calls:
            key = (term.axis if names is None else names[term.axis], term.kind)
            sums[key] = sums.get(key, Sent()).plus(Sent(term.calls, term.bytes))
    return sums


def _activations(model: ModelConfig, step: StepShape) -> Iterable[Term]:
    """All-gathers and reduce-scatters over tp."""
    micro, passes = step.micro_steps, 1 + step.recompute
    blocks, mixtures = micro * model.num_layers, micro * model.num_moe_layers
    shard = step.tokens // step.tp * model.hidden_size * step.dtype_bytes
    sublayers = [
        ("attention", blocks * (passes + 1), blocks * (passes + 1)),
        ("dense FFN", (blocks - mixtures) * (passes + 1), (blocks - mixtures) * (_ends(model, step) + 1)),
    ]
    if model.moe.shared_ffn_size:
        sublayers.append(("shared expert", mixtures * (passes + 1), mixtures * (passes + 1)))
    sublayers += [("embedding", micro, micro), ("head", micro, micro)]
    for what, gathers, scatters in sublayers:
        yield _repeated(what, "tp", "all_gather", gathers, shard, step)
        yield _repeated(what, "tp", "reduce_scatter", scatters, shard * step.tp, step)


def _sums(model: ModelConfig, step: StepShape) -> Iterable[Term]:
    """Sums in fp32 over tp."""
    chunks = [min(step.chunk_tokens, step.tokens - start) for start in range(0, step.tokens, step.chunk_tokens)]
    yield _all_reduce("head maximum", "tp", [FP32 * c for c in chunks] * step.micro_steps, step)
    yield _all_reduce("head sums", "tp", [FP32 * (c + 1) for c in chunks] * step.micro_steps, step)
    weights = [p.size for p in parameters(model, padded=True) if is_replicated(model, p, tp=step.tp)]
    yield _all_reduce("enter(w)", "tp", [FP32 * elements for elements in weights] * step.micro_steps, step)
    attention = model.attention
    shared = [FP32 * step.tokens * attention.head_dim] if attention.gate.position != "none" and attention.gate.head_shared else []
    yield _all_reduce("shared scores", "tp", shared * step.micro_steps * model.num_layers * (2 + step.recompute), step)


def _routing(model: ModelConfig, step: StepShape) -> Iterable[Term]:
    """All-to-alls over ep."""
    blocks, passes = step.micro_steps * model.num_moe_layers, 1 + step.recompute
    there = int(step.ep > 1)
    splits = (step.ep - 1) * (model.moe.num_experts // step.ep) * INT64
    ends = _ends(model, step)
    rows = ((passes + 1) * step.rows_out + (ends + 1) * step.rows_in) * model.hidden_size * step.dtype_bytes
    weights = (passes * step.rows_out + step.rows_in) * FP32
    yield Term("split sizes", "ep", "all_to_all", there * blocks * passes, blocks * passes * splits)
    yield Term("rows", "ep", "all_to_all", there * blocks * (passes + ends + 2), rows)
    yield Term("router weights", "ep", "all_to_all", there * blocks * (passes + 1), weights)


def _ends(model: ModelConfig, step: StepShape) -> int:
    """How often the last collective of a block runs forward."""
    return 1 + (step.recompute and (step.whole_blocks or model.sandwich_norm or model.residual_clip > 0))


def _balance(model: ModelConfig, step: StepShape) -> Iterable[Term]:
    """Sums over the world, or over the tp ranks of one sequence."""
    counts = model.num_moe_layers * model.moe.num_experts
    if model.moe.balance_scope == "sequence":
        yield _all_reduce("balance counts", "tp", [FP32 * counts * step.batch] * step.micro_steps, step)
        yield _all_reduce("logged counts", "world", [FP32 * counts], step)
    else:
        yield _all_reduce("balance counts", "world", [FP32 * counts] * step.micro_steps, step)
    yield _all_reduce("logged losses", "world", [FP32 * (counts + 1)], step)


def _repeated(what: str, axis: str, kind: Kind, calls: int, nbytes: int, step: StepShape) -> Term:
    size = step.size(axis)
    return Term(what, axis, kind, calls * (size > 1), calls * bytes_sent(kind, nbytes, size))


def _all_reduce(what: str, axis: str, nbytes: list[int], step: StepShape) -> Term:
    """One all-reduce for each tensor."""
    size = step.size(axis)
    return Term(what, axis, "all_reduce", len(nbytes) * (size > 1), sum(bytes_sent("all_reduce", n, size) for n in nbytes))
