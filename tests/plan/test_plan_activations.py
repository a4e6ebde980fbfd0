"""What a forward pass keeps and the peak of a micro-step, from the config alone, against what autograd and the allocations really are."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import pytest
import ranks
import torch
from parity.sharded import BACKEND, CPU, fill
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megagate.backend.base import AttentionCore, Backend
from megagate.backend.native import NativeBackend
from megagate.config.model import (
    AttentionConfig,
    GateActivation,
    GateCombine,
    GateConfig,
    GateGranularity,
    GatePosition,
    GateScore,
    ModelConfig,
    MoEConfig,
    RouterScore,
    SwitchConfig,
    SwitchProjections,
)
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.plan.activations import Core, Micro, kept_by_forward, peak

MOE = ModelConfig(
    vocab_size=250,
    hidden_size=64,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    moe=MoEConfig(num_experts=4, top_k=2, ffn_size=32),
)
DENSE = replace(MOE, moe=MoEConfig(), ffn_size=96, tie_embeddings=True)
TEXT = (2, 48)
EOD = 0


def gated(position: str, **fields) -> GateConfig:
    return GateConfig(position, **fields)


def with_gate(gate: GateConfig, model: ModelConfig = DENSE) -> ModelConfig:
    return replace(model, attention=replace(model.attention, gate=gate))


GATES = [
    *(gated(position) for position in ("G1", "G2", "G3", "G4", "G5")),
    *(gated(position, granularity="headwise") for position in ("G1", "G2")),
    *(gated(position, head_shared=True) for position in ("G1", "G2")),
    *(gated(position, combine="add", activation="silu") for position in ("G1", "G5")),
    gated("G1", combine="add", activation="identity"),
    *(gated("G1", activation=activation) for activation in ("silu", "identity", "ns_sigmoid")),
    gated("G5", activation="ns_sigmoid"),
    gated("G5", activation="identity"),
    *(gated("G1", score="self", activation=activation) for activation in ("silu", "rmsnorm")),
    gated("G1", score="constant"),
    gated("G1", score="parameter"),
    gated("G2", score="parameter", activation="silu", granularity="headwise"),
]
MODELS = {
    "moe": MOE,
    "dense": DENSE,
    "without qk norm": replace(DENSE, attention=replace(DENSE.attention, qk_norm=False)),
    "sandwich": replace(DENSE, sandwich_norm=True),
    "clip": replace(DENSE, residual_clip=5.0),
    "sandwich and clip": replace(DENSE, sandwich_norm=True, residual_clip=5.0),
    "shared expert": replace(MOE, moe=replace(MOE.moe, shared_ffn_size=48)),
    "shared expert with a gate": replace(MOE, moe=replace(MOE.moe, shared_ffn_size=48, shared_gate=True)),
    "dense first": replace(MOE, moe=replace(MOE.moe, first_dense_layers=1), ffn_size=80),
    "sigmoid router": replace(MOE, moe=replace(MOE.moe, score="sigmoid", bias_update_rate=1e-3)),
    "sigmoid, not renormalized": replace(MOE, moe=replace(MOE.moe, score="sigmoid", renormalize=False)),
    "switch v": replace(DENSE, attention=replace(DENSE.attention, switch=SwitchConfig("v", 4, 4))),
    "switch v, one": replace(DENSE, attention=replace(DENSE.attention, switch=SwitchConfig("v", 1, 1))),
    "switch kv": replace(DENSE, attention=replace(DENSE.attention, switch=SwitchConfig("kv", 4, 2))),
    "switch kv without qk norm": replace(DENSE, attention=replace(DENSE.attention, qk_norm=False, switch=SwitchConfig("kv", 3, 2))),
    "not renormalized": replace(MOE, moe=replace(MOE.moe, renormalize=False)),
    "gated moe": with_gate(gated("G1"), MOE),
    **{f"{gate}": with_gate(gate) for gate in GATES},
}


def nodes(root: torch.autograd.graph.Node) -> Iterator[torch.autograd.graph.Node]:
    seen, todo = {root}, [root]
    while todo:
        node = todo.pop()
        yield node
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        todo += new


@pytest.mark.parametrize(
    ("values", "of"),
    [
        (GatePosition, lambda model: model.attention.gate.position),
        (GateGranularity, lambda model: model.attention.gate.granularity),
        (GateScore, lambda model: model.attention.gate.score),
        (GateActivation, lambda model: model.attention.gate.activation),
        (GateCombine, lambda model: model.attention.gate.combine),
        (SwitchProjections, lambda model: model.attention.switch.projections),
        (RouterScore, lambda model: model.moe.score),
    ],
)
def test_every_variant_is_among_the_models(values, of):
    assert {of(model) for model in MODELS.values()} == set(get_args(values))


class FlashOnCpu(NativeBackend):
    """The native backend with the attention that it has on GPUs, whose CPU kernel keeps the same tensors."""

    def attention_core(self, heads: int, kv_heads: int, width: int) -> AttentionCore:
        def attend(q: Tensor, k: Tensor, v: Tensor, documents: None = None) -> Tensor:
            assert documents is None, "PyTorch's kernel of variable length has no form for CPUs"
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        return attend


BACKENDS: dict[Core, NativeBackend] = {"blockwise": BACKEND, "flash": FlashOnCpu(CPU)}


@dataclass(eq=False)
class Saved:
    """What autograd keeps instead of a tensor."""

    tensor: Tensor


class Real(NamedTuple):
    """Bytes of all storages that the graph of a forward pass holds, by their shape, and the rows of each MoE layer, received and padded."""

    sizes: Counter
    rows: tuple[tuple[int, int], ...]


def kept_bytes(model: ModelConfig, micro: Micro, mesh: ParallelMesh, *, recompute: bool, backend: Backend | None = None) -> Real:
    """Without the parameters; with the attention kernel of `micro` where no backend is given."""
    dtype = torch.float32 if micro.element == 4 else torch.bfloat16
    how = {"mesh": mesh, "recompute": recompute, "eod_id": EOD if micro.documents else None}
    built = fill(LanguageModel(model, dtype=dtype, backend=backend or BACKENDS[micro.core], **how))
    parameters = {p.untyped_storage().data_ptr() for p in built.parameters()}
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()  # autograd keeps them, or no longer does

    def save(tensor: Tensor) -> Saved:
        saved.add(one := Saved(tensor))
        return one

    rows = []
    for module in built.modules():
        if hasattr(module, "dispatcher"):
            module.experts.register_forward_pre_hook(lambda _, given: rows.append((int((given[0].probs > 0).sum()), len(given[0].x))))
    text = torch.randint(0, model.vocab_size, (micro.batch, micro.seq_len + 1), generator=torch.Generator().manual_seed(3))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda one: one.tensor):
        parts = built(text[:, :-1], text[:, 1:])
    kept = [one.tensor for one in saved]
    roots = [parts.ce_sum, *(root for stats in parts.stats for root in (stats.prob_sums, stats.z_sum))]
    for root in roots:
        for node in nodes(root.grad_fn):
            if hasattr(node, "source") and not recompute:  # what `_Collect` keeps without autograd's knowledge
                kept.append(node.source)
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept if tensor.ndim}
    sizes = Counter()
    for tensor in (tensor for address, tensor in held.items() if address not in parameters):
        sizes[f"{tuple(tensor.shape)} {tensor.dtype}"] += tensor.untyped_storage().nbytes()
    return Real(sizes, tuple(rows))


def assert_exact(model: ModelConfig, micro: Micro, mesh: ParallelMesh, *, recompute: bool, unseen: int = 0) -> None:
    """All but `unseen` bytes, which are held out of autograd's sight."""
    real = kept_bytes(model, micro, mesh, recompute=recompute)
    told = kept_by_forward(model, replace(micro, expert_rows=real.rows), recompute=recompute)
    excess = sum(told.values()) - real.sizes.total() - unseen
    assert excess == 0, f"{excess} bytes too many of\n{told}\nfor\n{real.sizes}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_forward_pass_keeps_what_the_formula_says(model, element, recompute):
    assert_exact(model, Micro(*TEXT, element=element, core="blockwise"), ParallelMesh.single(), recompute=recompute)


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("model", [MODELS["moe"], *(with_gate(gate) for gate in GATES)], ids=["moe", *map(str, GATES)])
def test_flash_attention_keeps_what_the_formula_says(model, element):
    assert_exact(model, Micro(*TEXT, element=element, core="flash"), ParallelMesh.single(), recompute=False)


@pytest.mark.parametrize("recompute", [False, True])
def test_documents_keep_what_the_formula_says(recompute):
    """The closure of a recomputed block holds where they begin."""
    micro, unseen = Micro(*TEXT, element=2, core="blockwise", documents=True), 8 * TEXT[0] * TEXT[1] if recompute else 0
    assert_exact(MODELS["gated moe"], micro, ParallelMesh.single(), recompute=recompute, unseen=unseen)


def under_tp(context: RankContext, models: list[ModelConfig]) -> None:
    size = context.world_size
    for model in models:
        ep = size if model.is_moe else 1
        micro = Micro(*TEXT, tp=size, ep=ep, element=2, core="blockwise")
        for recompute in (False, True):
            assert_exact(model, micro, ParallelMesh.build(tp=size, ep=ep), recompute=recompute)


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_tensor_parallel_rank_keeps_what_the_formula_says(world_size):
    """Four ranks have more than the key/value heads. Received rows differ from rank to rank."""
    names = ["dense", "sandwich and clip", "shared expert with a gate", "gated moe", "sigmoid router", "switch kv"]
    gates = [gated(position) for position in ("G2", "G5")] + [gated("G3", granularity="headwise")]
    ranks.run_ranks(under_tp, world_size, [*(MODELS[name] for name in names), *(with_gate(gate) for gate in gates)])


# ---- the peak


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that live at the same time, those of `known` tensors left out."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.live:
                self.live[key] = tensor.untyped_storage().nbytes()
                self.now += self.live[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


LARGER = replace(MOE, hidden_size=128, num_layers=4, attention=replace(MOE.attention, num_heads=8, gate=gated("G1")))
LARGER_DENSE = replace(LARGER, moe=MoEConfig(), ffn_size=384)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("vocab_size", "length"),
    [(250, 512), (8000, 512), (8000, 32)],
    ids=["fullest in a block", "fullest in the loss's logits", "fullest in the gradient of the head"],
)
@pytest.mark.parametrize("model", [LARGER, LARGER_DENSE, replace(LARGER_DENSE, tie_embeddings=True)], ids=["moe", "dense", "tied dense"])
def test_the_peak_is_near_that_of_all_allocations(model, vocab_size, length, recompute):
    model, micro = replace(model, vocab_size=vocab_size), Micro(2, length, element=2, row_multiple=32)
    assert 0.95 < peak(model, micro, recompute=recompute) / allocated(model, micro, recompute=recompute) < 1.2


@pytest.mark.parametrize("recompute", [False, True])
def test_the_head_of_a_tied_embedding_leaves_a_gradient_that_waits(recompute):
    """For the lookup's, which comes after all blocks."""
    model, micro = replace(LARGER_DENSE, vocab_size=1000, ffn_size=1536), Micro(1, 512, element=2, row_multiple=32)
    tied = replace(model, tie_embeddings=True)
    more = allocated(tied, micro, recompute=recompute) - allocated(model, micro, recompute=recompute)
    gradient = 2 * model.padded_vocab_size * model.hidden_size
    assert peak(tied, micro, recompute=recompute) - peak(model, micro, recompute=recompute) == gradient
    assert more == pytest.approx(gradient, rel=0.01)


def allocated(model: ModelConfig, micro: Micro, *, recompute: bool) -> int:
    """Bytes at the fullest moment of a micro-step, beside the parameters and their gradients."""
    built = fill(LanguageModel(model, dtype=torch.bfloat16, backend=BACKENDS["flash"], mesh=ParallelMesh.single(), recompute=recompute))
    for parameter in built.parameters():  # as ZeRO does, whose gradients are counted apart
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    shape = (micro.batch, micro.seq_len + 1)
    text = torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(3))
    with Allocations(built.parameters()) as allocations:
        built(text[:, :-1], text[:, 1:]).ce_sum.backward()
    return allocations.peak
