"""The model that exports carry along as code is our model: logits, gradients, and what is computed in fp32 whatever the weights' type."""

from dataclasses import replace

import pytest
import torch
from hf_exports import language_model
from parity.sharded import BACKEND, CPU, assert_all_close, assert_close, random
from parity.variants import DENSE, MOE, VARIANTS, with_moe
from remote_models import ALL_VARIANTS, as_remote, random_ids, remote_config, remote_model
from torch import Tensor

from megagate.backend.documents import Documents
from megagate.checkpoint.hf import layers_megagate
from megagate.model.lm import LanguageModel
from megagate.nn.loss import IGNORE_INDEX
from megagate.nn.moe.balance import BalanceLoss
from megagate.nn.rope import rope_table, rotate
from megagate.parallel.mesh import ParallelMesh

LENGTH = 12


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_every_variant_is_our_model_and_goes_on_from_its_cache(variant):
    model = language_model(ALL_VARIANTS[variant])
    peer = remote_model(model)
    tokens = random_ids(2, LENGTH)
    with torch.no_grad():
        assert_close(peer(tokens, use_cache=False).logits, model.logits(tokens), to=1e-5, what="logits")
        continued = peer.generate(tokens, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        again = peer(continued.sequences, use_cache=False).logits[:, LENGTH - 1 : -1]
    assert_close(torch.stack(continued.logits, dim=1), again, to=1e-5, what="logits with a cache")
    assert torch.equal(continued.sequences[:, LENGTH:], again.argmax(-1))


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_every_variant_has_our_loss_and_gradients(variant):
    model = language_model(ALL_VARIANTS[variant])
    peer = remote_model(model)
    text = random_ids(2, LENGTH + 1)
    labels = text.clone()
    labels[0, 5:9] = IGNORE_INDEX
    loss = peer(text, labels=labels, use_cache=False).loss
    loss.backward()
    ours = model(text[:, :-1], labels[:, 1:]).ce_sum / (labels[:, 1:] != IGNORE_INDEX).sum()
    ours.backward()
    assert_close(loss, ours, to=1e-6, what="loss")
    gradients = as_remote({name: weight.grad for name, weight in model.named_parameters()}, model.config)
    theirs = dict(peer.named_parameters())
    assert set(gradients) == set(theirs)
    # An expert that no token chose has no gradient.
    found = {name: torch.zeros_like(g) if theirs[name].grad is None else theirs[name].grad for name, g in gradients.items()}
    idle = {name for name, gradient in gradients.items() if not gradient.any()}
    assert not any(found[name].any() for name in idle)
    assert all("mlp.experts." in name for name in idle)
    assert_all_close(*({name: g for name, g in each.items() if name not in idle} for each in (found, gradients)), to=2e-5)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_eager_attention_shows_the_weights_it_applies(variant):
    model = language_model(ALL_VARIANTS[variant])
    tokens = random_ids(2, LENGTH)
    with torch.no_grad():
        shown = remote_model(model, attn_implementation="eager")(tokens, output_attentions=True)
    assert_close(shown.logits, model.logits(tokens), to=1e-5, what="logits")
    assert len(shown.attentions) == model.config.num_layers
    for weights in shown.attentions:
        assert weights.shape == (2, model.config.attention.num_heads, LENGTH, LENGTH)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert not weights.triu(1).any()


def test_other_attentions_do_not_keep_silent_about_weights_they_cannot_show():
    with pytest.raises(ValueError, match="output_attentions needs eager attention, this model has sdpa"):
        remote_model(language_model(DENSE))(random_ids(1, 4), output_attentions=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_changes_nothing(attention):
    peer = remote_model(language_model(MOE), attn_implementation=attention, pad_token_id=0)
    tokens = random_ids(2, LENGTH)
    tokens[1, :5] = 0
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    with torch.no_grad():
        alone = peer(tokens[1:, 5:]).logits
        assert_close(peer(tokens, attention_mask=mask).logits[1:, 5:], alone, to=1e-5, what="logits")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        assert_close(peer(tokens, attention_mask=mask, position_ids=positions).logits[1:, 5:], alone, to=1e-5, what="logits")
        together = peer.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
        single = peer.generate(tokens[1:, 5:], max_new_tokens=6, do_sample=False)
    assert torch.equal(together[1, LENGTH:], single[0, LENGTH - 5 :])


def test_positions_that_are_given_leave_padding_out():
    peer = remote_model(language_model(MOE))
    text = random_ids(2, LENGTH)
    gapped = torch.cat([text[:, :5], torch.zeros(2, 3, dtype=torch.int64), text[:, 5:]], dim=1)
    real = torch.tensor([*range(5), *range(8, LENGTH + 3)])
    mask = torch.zeros_like(gapped).index_fill_(1, real, 1)
    with torch.no_grad():
        logits = peer(gapped, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1)).logits[:, real]
        assert_close(logits, peer(text).logits, to=1e-5, what="logits")


def test_positions_that_are_not_given_go_on_after_the_cache():
    peer = remote_model(language_model(MOE))
    text = random_ids(2, LENGTH)
    with torch.no_grad():
        whole = peer(text, output_hidden_states=True)
        begun = peer(text[:, :7])
        rest = peer(text[:, 7:], past_key_values=begun.past_key_values, logits_to_keep=2)
        assert_close(rest.logits, whole.logits[:, -2:], to=1e-5, what="logits")
        assert torch.equal(peer.lm_head(whole.hidden_states[-1]), whole.logits)
        assert len(whole.hidden_states) == MOE.num_layers + 1
        from_embeddings = peer(inputs_embeds=peer.get_input_embeddings()(text), return_dict=False)
    assert torch.equal(from_embeddings[0], whole.logits)


def test_a_static_cache_yields_the_same_text():
    peer = remote_model(language_model(MOE))
    tokens = random_ids(2, LENGTH)
    static, grown = (
        peer.generate(tokens, max_new_tokens=8, do_sample=False, **cache) for cache in ({"cache_implementation": "static"}, {})
    )
    assert torch.equal(static, grown)
    assert torch.equal(grown, peer.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=False))


def test_positions_that_begin_anew_are_documents_of_their_own():
    config, eod = MOE, 7
    ends = [(0, 4), (1, 2), (1, 8)]
    tokens = random_ids(2, LENGTH)
    tokens[tokens == eod] = 8
    for row, place in ends:
        tokens[row, place] = eod
    model = language_model(config)
    with_documents = LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single(), eod_id=eod)
    with_documents.to_empty(device=CPU).load_state_dict(model.state_dict())
    positions = Documents.of(tokens, eod_id=eod).positions
    with torch.no_grad():
        logits = remote_model(model)(tokens, position_ids=positions, use_cache=False).logits
    assert_close(logits, with_documents.logits(tokens), to=1e-5, what="logits")


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_have_the_same_gradients(reentrant):
    peer = remote_model(language_model(with_moe(bias_update_rate=0.02))).train()
    tokens = random_ids(2, LENGTH)
    gradients = []
    for recompute in (False, True):
        if recompute:
            peer.gradient_checkpointing_enable({"use_reentrant": reentrant})
        peer.zero_grad()
        peer(tokens, labels=tokens, output_router_logits=True).loss.backward()
        gradients.append({name: weight.grad for name, weight in peer.named_parameters() if weight.grad is not None})
    assert_all_close(gradients[1], gradients[0], to=1e-6)


@pytest.mark.parametrize("variant", [name for name, model in VARIANTS.items() if model.is_moe and model.moe.balance_scope != "sequence"])
def test_the_routers_balance_loss_is_ours(variant):
    config = VARIANTS[variant]
    moe = replace(config.moe, balance_scope="micro_batch", balance_coef=1.0, z_loss_coef=0.0)
    model = language_model(config)
    tokens = random_ids(2, LENGTH)
    stats = model(tokens, tokens).stats
    ours = BalanceLoss(moe, step_tokens=tokens.numel(), mesh=ParallelMesh.single()).share(stats)
    peer = remote_model(model)
    out = peer(tokens, labels=tokens, output_router_logits=True)
    assert_close(out.aux_loss, ours, to=1e-5, what="balance loss")
    assert_close(out.loss, peer(tokens, labels=tokens).loss + config.moe.balance_coef * ours, to=1e-6, what="loss")
    assert [logits.shape for logits in out.router_logits] == [(tokens.numel(), moe.num_experts)] * config.num_moe_layers

    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), tokens], dim=1)
    mask = (torch.arange(LENGTH + 3) >= 3).long().expand(2, -1)
    out = peer(padded, attention_mask=mask, output_router_logits=True)
    assert_close(out.aux_loss, ours, to=1e-5, what="balance loss beside padding")


def half(key: str, *shape: int) -> Tensor:
    return random(key, *shape).bfloat16()


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_in_bf16_norms_rotations_gates_and_routers_are_ours_bit_for_bit(variant):
    config = ALL_VARIANTS[variant]
    model = language_model(config, dtype=torch.bfloat16)
    block, peer = model.layers[-1], remote_model(model).model.layers[-1]
    x = half("x", 2, LENGTH, config.hidden_size)
    assert torch.equal(peer.input_layernorm(x), block.attention_norm(x))

    attention = config.attention
    y = half("y", 2, LENGTH, attention.num_heads, attention.head_dim)
    table = layers_megagate.rope_table(torch.arange(LENGTH).unsqueeze(0), attention.head_dim, attention.rope.base)
    ours = rope_table(LENGTH, attention.head_dim, base=attention.rope.base, device=CPU)
    torch.testing.assert_close(layers_megagate.rotate(y, table), rotate(y, ours), rtol=2**-8, atol=0)

    if attention.gate.position != "none":
        gated = x if attention.gate.position == "G5" else y[:, :, : attention.num_kv_heads] if attention.gate.of_kv_heads else y
        logits = torch.nn.functional.linear(x, block.attention.gate.weight) if attention.gate.score == "input" else None
        theirs = peer.self_attn.gate(gated, x)
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(theirs, block.attention.gate(gated, logits))
    if config.is_moe:
        router, route = block.moe.router, block.moe.router(x)[0]
        routed = peer.mlp.gate(x.flatten(0, 1))
        assert torch.equal(routed.logits, router.logits(x).flatten(0, 1))
        assert torch.equal(routed.ids, route.ids)
        assert torch.equal(routed.weights, route.probs)
        if config.moe.shared_gate:
            shared = half("shared", *x.shape)
            assert torch.equal(peer.mlp.shared_expert_gate(shared, x), block.moe.shared_gate(shared, x))


def test_routers_stay_in_fp32_under_autocast():
    peer = remote_model(language_model(with_moe(shared_gate=True)))
    router, x = peer.model.layers[0].mlp.gate, random("x", 5, 32)
    plain = router(x).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).logits, plain)
        assert peer(random_ids(2, LENGTH), output_router_logits=True).logits.dtype == torch.bfloat16


def test_a_resized_vocabulary_has_a_loss():
    peer = remote_model(language_model(DENSE))
    peer.resize_token_embeddings(260, mean_resizing=False)
    tokens = random_ids(1, LENGTH, vocab_size=260)
    tokens[0, -1] = 259
    assert peer(tokens, labels=tokens).loss.isfinite()
    assert remote_config(DENSE).vocab_size == 250
