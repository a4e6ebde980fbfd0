"""Transformer Engine (TE) 2.20.2 behind the seam: the only file that imports it, and only where its kernels are asked for.

What is said of TE below was read in the sources of `transformer-engine==2.20.2` (`module.py:line`, under `transformer_engine/pytorch/`;
`csrc/` in the repository's 2.20.0.dev0). No kernel of it has run in development, which had no GPU: `tests/te/` binds every call of this
file and of `te_sites.py` to TE's own signatures, and runs TE's real Python over kernels of our own. For these tests a TE module is made,
kept and called in one class, TE's namespaces are called `te` and `recipes`, and nothing else is done with either.

Micro-steps of delayed scaling: TE keeps the largest amaxes of a forward pass, and at the end of `running` reduces them over the group that
each module met first, and makes the next scales (quantization.py:656, 772); those of gradients at the end of the backward pass of the first
FP8 module (module/linear.py:320, 1887). A region inside another changes neither: it restores what was there, lowers the depth, and only
depth 0 reduces (quantization.py:619-642, 772-782, 1056), each buffer over its own group, which is part of its key (quantization.py:501-565,
714). So experts, whose scales are of the ranks with the same experts, run in a region of their own with the group of `edp` inside that of
the world. A group of None is the world to PyTorch: an axis of size 1 gets a recipe with `reduce_amax` off instead, the world of a process
that stands for itself among others too. `reduce_amax` is part of the key as well.

Backward passes carry dp times the gradient (`engine/zero.py`), and so do TE's amaxes of gradients: their first scales are 1 / dp, and
checkpoints hold what they are of the gradient itself (`Kept.unit`).

TE's state of FP8 is one for the process (quantization.py:389): the histories of all modules that have run, those of other models too, are
updated together. Its fused update leaves alone what saw nothing (common/recipe/delayed_scaling.cu, kernel_bulk).

Where TE is not what PyTorch's kernels and the emulation are, but for the order of sums:

- `LayerNormLinear` in FP8 where nothing else reads the normed input (such as a gate that is kept out): TE lets one kernel norm and
  quantise (module/layernorm_linear.py:244), and under delayed scaling on Hopper that quantises the norm in fp32, which is rounded to bf16
  first everywhere else, in the emulation too.
- A row whose probability is exactly 0: see `permute`.

Weights are quantised again in every micro-step: `is_first_microbatch`, by which TE would keep them in FP8, is never given.
"""

import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megagate.backend import routing
from megagate.backend.base import AttentionCore, Chosen, ColumnLinears, GroupedLinear, Part, Permuted, RowLinear
from megagate.backend.kept import put_back
from megagate.backend.te_sites import Attention, Columns, Experts, Region, Row, Splits
from megagate.config.hardware import INSTALL, TE_VERSION
from megagate.config.model import MoEConfig
from megagate.config.precision_rules import SIZE_MULTIPLE, size_multiple
from megagate.config.run import Fp8Config, PrecisionConfig
from megagate.errors import ConfigError
from megagate.parallel.mesh import Axis, ParallelMesh

Restore = tuple[Tensor, torch.Size]
"""TE's map of rows, and the shape of what was permuted."""


def load(key: str = "precision.backend", otherwise: str = "native") -> Any:
    """`transformer_engine.pytorch`.

    Args:
        key: The config key that asks for it.
        otherwise: The value of it that does not.

    Raises:
        ConfigError: It is not there, or not with its libraries, or another version; with the command that installs it.
    """
    try:
        found = importlib.metadata.version("transformer_engine")
        if not is_known(found):
            raise ConfigError(
                f"{key} (te) needs Transformer Engine {TE_VERSION}, for whose inner workings it was written, and finds {found} (containers "
                f"come with one of their own); install it by `{INSTALL['transformer_engine']}`, or set {key} {otherwise}"
            )
        # `router` is no attribute of the package until it is imported by name.
        from transformer_engine import pytorch  # noqa: PLC0415 - an optional package
        from transformer_engine.pytorch import router  # noqa: F401, PLC0415 - an optional package
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{key} (te) needs Transformer Engine {TE_VERSION} with its PyTorch extension, which cannot be imported here ({error}); "
            f"install it by `{INSTALL['transformer_engine']}`, or set {key} {otherwise}"
        ) from error
    return pytorch


def is_known(version: str) -> bool:
    """Whether a version is the one that this file was written for, built from whichever commit (`+...`)."""
    return version.partition("+")[0] == TE_VERSION


def load_recipes() -> Any:
    """`transformer_engine.common.recipe`, after `load`."""
    from transformer_engine.common import recipe  # noqa: PLC0415 - an optional package

    return recipe


def load_stashes() -> list[deque[Any]]:
    """Of each module that is recomputed, the histories and scales that its forward passes left for their recomputation, oldest first
    (quantization.py:784), after `load`.
    """
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # noqa: PLC0415 - an optional package

    return FP8GlobalStateManager.quantization_state.fp8_tensors_recompute_buffer


def fused_adam(groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """TE's AdamW with one kernel launch for many tensors; fp32 moments `exp_avg` and `exp_avg_sq`, its step counted in its groups.

    Source: optimizers/fused_adam.py:40.
    """
    te = load("optim.implementation", "torch")
    return te.optimizers.FusedAdam(groups, lr=lr, betas=betas, eps=eps, adam_w_mode=True, bias_correction=True)


def make_recipe(config: Fp8Config, *, reduce_amax: bool = True) -> Any:
    """TE's recipe object; None without FP8.

    HYBRID of `delayed` and `current` and E4M3 of the others are TE's defaults. Gradients are those of the recipe whatever
    NVTE_BACKWARD_OVERRIDE says; NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES and NVTE_FP8_BLOCK_SCALING_FP32_SCALES have no argument that
    overrules them.
    """
    recipes = load_recipes() if config.recipe != "none" else None
    match config.recipe:
        case "delayed":
            length = config.amax_history
            return recipes.DelayedScaling(
                margin=0, amax_history_len=length, amax_compute_algo="max", reduce_amax=reduce_amax, backward_override=None
            )
        case "current":
            return recipes.Float8CurrentScaling(backward_override=None)
        case "blockwise":
            return recipes.Float8BlockScaling(backward_override=None)
        case "mxfp8":
            return recipes.MXFP8BlockScaling(backward_override=None, enable_2d_quantization=False)
        case _:
            return None


class TransformerEngineBackend:
    """See `Backend` for shapes and collectives.

    TE's modules are made once per place, own nothing (their parameters are ours, put in for the time of a call) and know of no other rank:
    tp_size is 1 everywhere, since TE gathers dim 0 and our tensors are batch first, and all collectives stay in `parallel/comm.py`. Norms
    are TE's where they go into a product that follows and tp is 1 (`LayerNormLinear` owns its gain's gradient, so that `enter` cannot be
    applied to it), else `norm`. Without a recipe TE computes in the dtype of the activations.

    Args:
        precision: Of the run; `backend` is te.
        device: Of this rank, a GPU.
        mesh: Its layout.
        norm: RMSNorm as in `Backend.norm`.

    Raises:
        ConfigError: Transformer Engine is not there, or another version.
    """

    def __init__(
        self, precision: PrecisionConfig, *, device: torch.device, mesh: ParallelMesh, norm: Callable[[Tensor, Tensor, float], Tensor]
    ):
        self.precision, self.device, self.mesh, self.norm = precision, device, mesh, norm
        self.te = load()
        fp8 = precision.fp8
        self.recipe = make_recipe(fp8, reduce_amax=mesh.world.size > 1)
        state = {"is_delayed": fp8.recipe == "delayed", "unit": mesh.dp.size}
        self.dense = Region(self.te, self.recipe, mesh.world.group, **state, inner=self.recipe is None)
        self.experts = self._region_of_experts(fp8)
        self.row_multiple = max(SIZE_MULTIPLE, size_multiple(fp8))
        self.splits, self.amaxes = Splits(), list[Tensor]()

    def _region_of_experts(self, fp8: Fp8Config) -> Region:
        if fp8.recipe != "delayed" or self.mesh.ep.size == 1:
            return self.dense
        edp = self.mesh.edp
        recipe = make_recipe(fp8, reduce_amax=edp.size > 1)
        return Region(self.te, recipe, edp.group, is_delayed=True, unit=self.mesh.dp.size, inner=True)

    def of_layer(self, index: int, num_layers: int) -> "TransformerEngineBackend":
        """TE's kernels without FP8 for a block that stays in high precision."""
        stays = self.precision.fp8.keeps_block(index, num_layers)
        return _InHighPrecision(self) if stays and self.recipe is not None else self

    def column_linears(
        self, width: int, parts: Sequence[Part], *, tp: Axis, eps: float | None = None, gives_normed: bool = True
    ) -> ColumnLinears:
        """One product of all parts in FP8, with one scale; another, by PyTorch, of those that stay out. Without FP8 one product of all."""
        stays = [self.dense.recipe is not None and not self.precision.fp8.rounds(part.role) for part in parts]
        fused = eps if tp.size == 1 and self.precision.norm == "native" else None
        site = Columns(self.dense, width, parts, stays=stays, tp=tp, eps=fused, gives_normed=gives_normed, device=self.device)
        return self._known(site)

    def row_linear(self, width: int, rows: int, *, tp: Axis) -> RowLinear:
        """TE's product of this rank's part."""
        return self._known(Row(self.dense, width, rows, tp=tp, device=self.device))

    def grouped_linear(self, width: int, rows: int, *, num_experts: int, mesh: ParallelMesh) -> GroupedLinear:
        """TE's products of this rank's experts."""
        return self._known(Experts(self.experts, width, rows, num_experts=num_experts, ep=mesh.ep, splits=self.splits, device=self.device))

    def _known(self, site: Any) -> Any:
        self.amaxes += site.amaxes
        return site

    def attention_core(self, heads: int, kv_heads: int, width: int) -> AttentionCore:
        """TE's choice of cuDNN's and flash attention, never in FP8; PyTorch's where neither takes the heads."""
        return Attention(self.te, heads, kv_heads, width)

    def choose(self, logits: Tensor, config: MoEConfig, *, bias: Tensor | None) -> Chosen:
        """TE's fused router (router.py:279, 439), where it computes the same.

        Its softmax knows no bias; its sigmoid scores are always renormalised, but for one expert per token. Everything else is PyTorch's.
        It adds 1e-20 to sums that we keep above 1e-38, and takes the bias off again where we look the score up: last bits of fp32. Its
        `fused_moe_aux_loss` has no place here: balance losses are of counts over ranks and micro-steps, formed outside of recomputation.
        """
        te = self.te
        sigmoid = config.score == "sigmoid"
        if (sigmoid and not (config.renormalize and config.top_k > 1)) or (not sigmoid and bias is not None):
            return routing.choose(logits, config, bias=bias)
        flat = logits.flatten(0, -2).contiguous()
        ids = torch.empty(len(flat), config.top_k, dtype=torch.int64, device=flat.device)
        weights, ids = te.router.fused_topk_with_score_function(
            flat, config.top_k, not config.renormalize, None, None, None, config.score, bias, topk_indices=ids
        )
        _, shares = te.router.fused_compute_score_for_moe_aux_loss(flat, config.top_k, config.score)
        shape = logits.shape[:-1]
        return Chosen(ids.view(*shape, -1), weights.gather(-1, ids).view(*shape, -1), shares.view_as(logits))

    def permute(self, x: Tensor, probs: Tensor, ids: Tensor, *, num_experts: int) -> Permuted:
        """TE's kernels over a map of tokens and experts (permutation.py:928), rows in the same order as by a stable sort.

        What has arrived is sorted and padded at once by PyTorch: TE's `moe_sort_chunks_by_index` does not pad.

        A probability of exactly 0 means padding to the kernel, which writes a row of zeros for it (common/triton/permutation.py:296), so
        that its gradient is 0 too. It comes where fp32 underflows (a logit 103 below the largest), and there the router's own derivative,
        which that gradient is multiplied by, is 0 as well: no parameter notices.
        """
        te = self.te
        chosen = torch.zeros(len(ids), num_experts, dtype=torch.int32, device=ids.device).scatter_(1, ids, 1)
        weights = probs.new_zeros(len(ids), num_experts).scatter(1, ids, probs)
        grouped, of_rows, places = te.moe_permute_with_probs(x, weights, chosen, ids.numel())
        return Permuted(grouped, of_rows.unsqueeze(-1), (places, x.shape))

    def unpermute(self, rows: Tensor, restore: Restore) -> Tensor:
        """Sums over the experts of each token (permutation.py:1029)."""
        te = self.te
        places, shape = restore
        return te.moe_unpermute(rows, places, restore_shape=shape, map_type="mask")

    @contextmanager
    def running(self) -> Iterator[None]:
        """The region of FP8, around the whole pass: amaxes are reduced once, at its end.

        Without gradients TE neither reduces nor forgets the amaxes of that pass (quantization.py:780); they are taken out of the histories,
        so that a validation leaves no trace in training. A pass that fails ends the same way: other ranks would not take part in its
        reduction, and its error would never be told.

        What passes without a backward pass have left for a recomputation is thrown away, since TE gives every recomputation the oldest:
        with gradients, a model runs backward before it runs forward again.
        """
        trains, kept = torch.is_grad_enabled(), False
        if trains:
            for stash in load_stashes():
                stash.clear()
        try:
            with nullcontext() if self.recipe is None else self.dense.entered():
                try:
                    yield
                    kept = trains
                finally:
                    torch.set_grad_enabled(kept)  # what TE asks at the region's end
        finally:
            torch.set_grad_enabled(trains)
            if not kept:
                for running in self.amaxes:
                    running.zero_()

    def recompute(self, function: Callable[..., Any], *args: Any) -> Any:
        """TE's checkpoint (distributed.py:667), which computes again with the scales of the first time, and keeps no second amaxes.

        `function` is hidden in a `partial`: of a module TE would look for modules of its own inside, and find none (distributed.py:651).
        With `use_reentrant` the backward passes of all blocks would update the histories of gradients (distributed.py:443). What is
        computed again runs one region deeper: else each block would end a region at depth 0 and reduce all amaxes once more
        (distributed.py:812). Unlike PyTorch's it runs to the end of the block, the experts' way home included.
        """
        te = self.te
        return te.checkpoint(partial(function), *args, use_reentrant=False, context_fn=self._around_recompute)

    def _around_recompute(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        te = self.te
        return nullcontext(), te.autocast(enabled=False)

    def after_backward(self, model: nn.Module) -> None:
        """Nothing to do: TE updates its own scales."""

    def unrecorded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Histories, the places of running micro-steps among them, and scales, which TE moves in every pass, are put back."""
        return put_back(model)


class _InHighPrecision(TransformerEngineBackend):
    """The same without FP8, inside the region of the others."""

    def __init__(self, whole: TransformerEngineBackend):
        self.__dict__.update(whole.__dict__)
        self.dense = self.experts = Region(self.te, inner=True)
