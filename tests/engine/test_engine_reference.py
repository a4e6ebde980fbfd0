"""The reference engine, which all others are held against, is itself held against a training loop in a few lines of plain PyTorch."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from parity.engines import CLIP, MICRO_STEPS, Layout, Run, batch, build_engine, rate, run_config, train
from parity.sharded import assert_all_close, clear_routes
from torch import Tensor, nn
from torch.nn import functional as F

from megagate.config.model import BalanceScope
from megagate.config.run import OptimConfig, RunConfig
from megagate.engine.base import Engine
from megagate.engine.optim import build_optimizer, fresh_state, parameter_groups
from megagate.engine.reference import ReferenceEngine
from megagate.nn.loss import IGNORE_INDEX
from megagate.parallel.mesh import ParallelMesh

ALONE = ParallelMesh.single()
STEPS = 3


def plain_loop(run: Run, config: RunConfig) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Weights, losses and norms. The whole step in one batch; the loss is PyTorch's mean over all targets."""
    model = build_engine(run, Layout(), ALONE).model
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if run.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=run.lr)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, labels = (t.flatten(0, 1) for t in batch(step, ALONE))
        loss = F.cross_entropy(logits(model, tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate(run.lr, step)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, losses, norms


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """With gradient, unlike the model's own."""
    x, _ = model._hidden(tokens)
    return F.linear(x, model.output_weight)[..., : model.config.vocab_size]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_a_plain_loop(optimizer):
    """Of a dense model, whose loss has one part; the auxiliary losses have their own tests."""
    run = Run(optimizer=optimizer, dense=True)
    weights, losses, norms = plain_loop(run, run_config(run, Layout()))
    engine = build_engine(run, Layout(), ALONE)
    steps = train(engine, range(STEPS), lr=run.lr)
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-6)
    assert [step.grad_norm for step in steps] == pytest.approx(norms, rel=2e-6) and min(norms) > CLIP
    assert_all_close({name: p.detach() for name, p in engine.model.named_parameters()}, weights, to=1e-6 if optimizer == "sgd" else 2e-5)


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Of one step without an update."""
    kept: dict[str, Tensor] = {}

    def keep(lr: float) -> tuple[float, bool]:
        kept.update({name: master.grad.clone() for name, master in engine.masters.items()})
        engine.optimizer.zero_grad()
        return 1.0, True

    engine._update = keep
    with clear_routes(engine.model):
        train(engine, [0], lr=0.1)
    return kept


@pytest.mark.parametrize("scope", get_args(BalanceScope))
def test_the_objective_is_the_mean_loss_plus_the_weighted_auxiliary_losses(scope):
    """All written out: means over the tokens of the step, summed over layers; counts of micro-steps so far, of each, of each sequence."""
    run = Run(scope=scope)
    engine, model = build_engine(run, Layout(), ALONE), build_engine(run, Layout(), ALONE).model
    engine._update = lambda lr: (1.0, True)
    tokens, labels = batch(0, ALONE)
    with clear_routes(engine.model):
        step = engine.train_step(tokens, labels, lr=0.1)

    moe, count = run.model.moe, tokens.numel()
    parts = [model(*one) for one in zip(tokens, labels, strict=True)]
    balance = z = torch.zeros(())
    for layer in range(run.model.num_layers):
        stats = [part.stats[layer] for part in parts]
        for k in range(MICRO_STEPS):
            for row, prob_sums in enumerate(stats[k].prob_sums):  # of one sequence
                so_far = sum(s.counts.sum(0) for s in stats[: k + 1])
                seen = {"global_batch": so_far, "micro_batch": stats[k].counts.sum(0), "sequence": stats[k].counts[row]}[scope]
                balance = balance + moe.num_experts * (seen / seen.sum() * prob_sums / count).sum()
            z = z + stats[k].z_sum / count
    mean_loss = sum(part.ce_sum for part in parts) / (labels != IGNORE_INDEX).sum()
    (mean_loss + moe.balance_coef * balance + moe.z_loss_coef * z).backward()

    ours = {name: master.grad for name, master in engine.masters.items()}
    assert_all_close(ours, {name: p.grad for name, p in model.named_parameters()}, to=1e-6)
    assert step.loss == pytest.approx(mean_loss.item(), rel=1e-6)
    assert step.targets == (labels != IGNORE_INDEX).sum()
    assert step.aux.z == pytest.approx(z.item() / run.model.num_layers, rel=1e-6)


def test_gradients_do_not_depend_on_how_a_step_is_cut_into_micro_steps():
    run = Run(dense=True)
    first, second = build_engine(run, Layout(), ALONE), build_engine(run, Layout(), ALONE)
    expected = gradients(first)
    tokens, labels = (t.flatten(0, 1).unsqueeze(1) for t in batch(0, ALONE))  # eight micro-steps of one sample
    second._update = lambda lr: (1.0, True)
    second.train_step(tokens, labels, lr=0.1)
    assert_all_close({name: master.grad for name, master in second.masters.items()}, expected, to=2e-6)


def test_evaluation_is_the_mean_over_targets_and_leaves_the_model_in_training():
    engine = build_engine(Run(), Layout(), ALONE)
    tokens, labels = batch(5, ALONE)
    value = engine.evaluate(zip(tokens, labels, strict=True))
    everything = logits(engine.model, tokens.flatten(0, 1)).flatten(0, 1)
    assert value == pytest.approx(F.cross_entropy(everything, labels.flatten(), ignore_index=IGNORE_INDEX).item(), rel=1e-6)
    assert engine.model.training and all(p.grad is None for p in engine.model.parameters())


def test_no_clipping_without_a_limit():
    run = Run(dense=True)
    base = run_config(run, Layout())
    weights = []
    for clip in (0.0, 1e9):
        engine = ReferenceEngine(build_engine(run, Layout(), ALONE).model, replace(base, optim=replace(base.optim, grad_clip=clip)), ALONE)
        train(engine, [0], lr=0.01)
        weights.append({name: p.detach() for name, p in engine.model.named_parameters()})
    assert_all_close(weights[0], weights[1], to=0)


# ---- the optimizer


def test_matrices_decay_and_vectors_do_not():
    model = build_engine(Run(), Layout(), ALONE).model
    groups = parameter_groups(list(model.named_parameters()), OptimConfig(weight_decay=0.2))
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(by_name) == len(names)
    assert all(decay == (0.0 if "norm" in name else 0.2) for name, decay in by_name.items())
    assert [group["name"] for group in parameter_groups([("w", nn.Parameter(torch.ones(2, 2)))], OptimConfig())] == ["decayed"]


def test_the_optimizer_is_the_configured_one():
    group = [{"params": [nn.Parameter(torch.ones(2))]}]
    adamw = build_optimizer(group, OptimConfig(name="adamw", lr=0.3, beta1=0.7, beta2=0.8, eps=1e-3))
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.defaults["lr"], adamw.defaults["betas"], adamw.defaults["eps"]) == (0.3, (0.7, 0.8), 1e-3)
    sgd = build_optimizer(group, OptimConfig(name="sgd", lr=0.3))
    assert type(sgd) is torch.optim.SGD and (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0, 0)


def test_fresh_state_is_what_the_optimizer_itself_makes():
    config = OptimConfig(name="adamw")
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = build_optimizer([{"params": [parameter]}], config)
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    made, fresh = optimizer.state[parameter], fresh_state(parameter, config, applied_steps=1)
    assert made.keys() == fresh.keys()
    assert all(made[key].shape == fresh[key].shape and made[key].dtype == fresh[key].dtype for key in made)
    assert made["step"] == fresh["step"] == 1
    assert fresh_state(parameter, config, applied_steps=0) == fresh_state(parameter, OptimConfig(name="sgd"), applied_steps=5) == {}


def test_a_batch_without_targets_counts_nothing():
    engine = build_engine(Run(), Layout(), ALONE)
    tokens, labels = (t[0] for t in batch(0, ALONE))
    empty = torch.full_like(labels, IGNORE_INDEX)
    assert engine.evaluate([(tokens, labels), (tokens, empty)]) == engine.evaluate([(tokens, labels)])
