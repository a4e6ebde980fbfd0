"""A gated-attention language model of megagate, for Hugging Face transformers 4.53 to 5: block and models over `layers_megagate.py`.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Source: arXiv 2505.06708.

Part of the Python package megagate (megagate/checkpoint/hf), whose tools/convert_checkpoint.py puts it beside the weights that it writes.
SPDX-License-Identifier: Apache-2.0
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_megagate import MegagateConfig
from .layers_megagate import (
    MegagateAttention,
    MegagateGate,
    MegagateMLP,
    MegagateMoE,
    MegagateRMSNorm,
    MegagateRouter,
    rope_base,
    rope_table,
)

MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
"""Transformers 4 and 5 name them differently."""


class MegagateDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + ffn(norm(x)); the feed-forward is dense or a mixture of experts.

    With sandwich norms what is added is normed, too; with a residual clip it is clipped.

    Shapes: [b, s, h] -> [b, s, h].
    Source: sandwich norm: arXiv 2105.13290, section 2.4; residual clip: arXiv 2505.06708, appendix A.6.
    """

    def __init__(self, config: MegagateConfig, layer_idx: int):
        super().__init__()
        model = config.megagate["model"]
        norm = (config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = MegagateRMSNorm(*norm)
        self.self_attn = MegagateAttention(config, layer_idx)
        self.attention_out_norm = MegagateRMSNorm(*norm) if model["sandwich_norm"] else None
        self.post_attention_layernorm = MegagateRMSNorm(*norm)
        self.is_moe = config.num_experts > 0 and layer_idx >= model["moe"]["first_dense_layers"]
        self.mlp = MegagateMoE(config) if self.is_moe else MegagateMLP(config.hidden_size, config.intermediate_size)
        self.ffn_out_norm = MegagateRMSNorm(*norm) if model["sandwich_norm"] else None
        self.clip = model["residual_clip"]

    def forward(self, x: Tensor, **attention: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Apply the block; also returned: the attention's weights, the router's logits, each None where there are none."""
        out, weights = self.self_attn(self.input_layernorm(x), **attention)
        x = x + self._tamed(out, self.attention_out_norm)
        normed = self.post_attention_layernorm(x)
        out, router_logits = self.mlp(normed) if self.is_moe else (self.mlp(normed), None)
        return x + self._tamed(out, self.ffn_out_norm), weights, router_logits

    def _tamed(self, out: Tensor, norm: MegagateRMSNorm | None) -> Tensor:
        """What is added to the residual stream."""
        out = out if norm is None else norm(out)
        return out.clamp(-self.clip, self.clip) if self.clip else out


class MegagatePreTrainedModel(PreTrainedModel):
    """What the models share: what they support, and initial values (normal; norms 1, parameter gates and biases 0)."""

    config_class = MegagateConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegagateDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for modules whose weights no checkpoint gave."""
        if isinstance(module, MegagateRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MegagateGate) and module.settings["score"] == "parameter":
            nn.init.zeros_(module.weight)
        elif getattr(module, "weight", None) is not None:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, MegagateRouter) and module.rate:
            nn.init.zeros_(module.bias_steps)


class MegagateModel(MegagatePreTrainedModel):
    """Embedding, blocks, final norm: ids [b, s] -> hidden states [b, s, h]."""

    def __init__(self, config: MegagateConfig):
        super().__init__(config)
        for size in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(config, size) < 1:
                raise ValueError(f"{size} ({getattr(config, size)}) must be at least 1; write it into config.json")
        self.rope_base = rope_base(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegagateDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = MegagateRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Which module that is; newer versions of transformers find it, and the following three, by themselves."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace it."""
        self.embed_tokens = value

    def forward(  # transformers looks these names up in the signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """Run the blocks.

        Args:
            input_ids: [b, s]; or `inputs_embeds` [b, s, h].
            attention_mask: [b, keys], 0 for padding; or whatever else `create_causal_mask` takes.
            position_ids: [b, s]; counted from the cache's length if None. Without a mask and a cache, a position that is not one more than
                the one before begins a new document, which attention does not leave.
            past_key_values: Keys and values of earlier tokens, which grow by these.
            output_attentions: Return the softmax's weights; needs `attn_implementation="eager"`.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; weights are asked of an attention that does not show them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given; leave one of them out")
        use_cache = _or(use_cache, self.config.use_cache) and not (self.gradient_checkpointing and self.training)
        output_attentions = _or(output_attentions, self.config.output_attentions)
        output_hidden_states = _or(output_hidden_states, self.config.output_hidden_states)
        output_router_logits = _or(output_router_logits, self.config.output_router_logits)
        if output_attentions:
            _require_eager(self.config)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        attention = self._attention_inputs(x, attention_mask, position_ids, past_key_values, **kwargs)

        hidden_states, attentions, router_logits = [x], [], []
        for layer in self.layers:
            x, weights, logits = layer(x, **attention)
            if output_hidden_states:
                hidden_states.append(x)
            if output_attentions:
                attentions.append(weights)
            if output_router_logits and layer.is_moe:
                router_logits.append(logits)
        x = self.norm(x)
        output = MoeModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()

    def _attention_inputs(
        self, x: Tensor, attention_mask: Any, position_ids: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> dict[str, Any]:
        """What every block's attention gets beside the hidden states: mask, rotations, cache."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        cache_position = kwargs.pop("cache_position", None)  # from `generate` of transformers 4
        if cache_position is None:
            cache_position = torch.arange(x.shape[1], device=x.device) + past
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
        given |= {"inputs_embeds": x, "input_embeds": x, "cache_position": cache_position}
        return kwargs | {
            "attention_mask": create_causal_mask(self.config, **{name: given[name] for name in given if name in MASK_ARGUMENTS}),
            "rope": rope_table(position_ids, self.config.head_dim, self.rope_base),
            "past_key_values": past_key_values,
            "position_ids": position_ids,
            "cache_position": cache_position,
        }


class MegagateForCausalLM(MegagatePreTrainedModel, GenerationMixin):
    """The model with its output projection (the embedding's own matrix when tied): ids [b, s] -> logits [b, s, vocab_size]."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegagateConfig):
        super().__init__(config)
        self.model = MegagateModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """See `MegagateModel`."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace it."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """What a tie ties to the input embeddings."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace it."""
        self.lm_head = value

    def forward(  # transformers looks these names up in the signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """The logits, and with labels the loss.

        Args:
            labels: [b, s] ids, shifted in here; -100 is left out. The loss is the mean over targets; with `output_router_logits` plus
                `config.router_aux_loss_coef` times the routers' balance loss over these tokens, summed over layers (`aux_loss`).
            logits_to_keep: Logits of that many last positions, or of these positions; 0 for all.
            kwargs: For the loss (`num_items_in_batch`) and for the attention functions of transformers. Further arguments:
                `MegagateModel.forward`.
        """
        output_router_logits = _or(output_router_logits, self.config.output_router_logits)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0 is all of them
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        aux_loss = self._aux_loss(outputs.router_logits, attention_mask) if outputs.router_logits else None
        if loss is not None and aux_loss is not None:
            loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
        return output if _or(return_dict, self.config.return_dict) else output.to_tuple()

    def _aux_loss(self, router_logits: tuple[Tensor, ...], attention_mask: Any) -> Tensor:
        """The sum of the layers' balance losses over the tokens that are no padding."""
        counted = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            tokens = len(router_logits[0]) // len(attention_mask)
            counted = attention_mask[:, -tokens:].flatten()  # of these tokens, not of those in the cache
        routers = [layer.mlp.gate for layer in self.model.layers if layer.is_moe]
        return sum(router.balance_loss(logits, counted) for router, logits in zip(routers, router_logits, strict=True))


def _require_eager(config: MegagateConfig) -> None:
    if config._attn_implementation != "eager":
        raise ValueError(
            f"output_attentions needs eager attention, this model has {config._attn_implementation}, which does not show its weights; load "
            'the model with attn_implementation="eager"'
        )


def _or(value: Any, default: Any) -> Any:
    """The value, or what the configuration says where none is given."""
    return default if value is None else value
