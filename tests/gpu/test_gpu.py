"""What only a GPU can show. Skipped without one; the README says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity.variants import VARIANTS

from megagate.backend.native import NativeBackend
from megagate.checkpoint import store
from megagate.checkpoint.certificate import read_next_step
from megagate.checkpoint.fingerprint import digits, piece_sum
from megagate.checkpoint.store import Checkpoint
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.config.run import ObserveConfig, RunConfig, TrainConfig
from megagate.data.loader import Batch
from megagate.engine.reference import ReferenceEngine
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh
from megagate.plan.activations import Micro, peak
from megagate.train.certify import Followed
from megagate.train.observe import Observer
from megagate.train.saver import Saver

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    vocab_size=500,
    hidden_size=64,
    num_layers=2,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, gate=GateConfig("G1")),
    moe=MoEConfig(num_experts=8, top_k=2, ffn_size=64),
)


def build(
    device: str, dtype: torch.dtype, config: ModelConfig = MODEL, *, recompute: bool = False, eod_id: int | None = None
) -> LanguageModel:
    where = torch.device(device)
    how = {"dtype": dtype, "backend": NativeBackend(where), "mesh": ParallelMesh.single(), "recompute": recompute}
    model = LanguageModel(config, **how, eod_id=eod_id)
    return model.initialize(seed=1, device=where)


def gradients(model: LanguageModel, tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    tokens = tokens.to(model.embedding.weight.device)
    loss = model(tokens[:, :-1], tokens[:, 1:]).ce_sum / tokens[:, 1:].numel()
    loss.backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", [(4, 65), (1, 4)])
def test_a_bf16_gpu_rounds_no_more_than_a_bf16_cpu(shape: tuple[int, int]) -> None:
    """Loss and every gradient against fp32 on the CPU. Three tokens leave two of eight experts without any."""
    tokens = torch.randint(0, 500, shape, generator=torch.Generator().manual_seed(7))
    exact, low, gpu = build("cpu", torch.float32), build("cpu", torch.bfloat16), build("cuda", torch.bfloat16)
    loss, wanted = gradients(exact, tokens)
    low_loss, low_found = gradients(low, tokens)
    gpu_loss, found = gradients(gpu, tokens)
    assert abs(gpu_loss - loss) <= 2 * abs(low_loss - loss) + 0.02
    for name, gradient in wanted.items():
        scale = gradient.norm() + 1e-12
        usual = (low_found[name] - gradient).norm() / scale
        assert (found[name] - gradient).norm() / scale <= 3 * usual + 0.05, name


def test_a_look_on_a_gpu_says_what_a_cpu_says_and_the_step_does_not_notice() -> None:
    config = RunConfig(model=MODEL, train=TrainConfig(global_batch_size=2, micro_batch_size=1, seq_len=64), observe=ObserveConfig(1, 5))
    text = torch.randint(0, 500, (2, 1, 65), generator=torch.Generator().manual_seed(7))
    records, losses = [], []
    for device in ("cpu", "cuda", "cuda"):
        engine = ReferenceEngine(build(device, torch.float32), config, ParallelMesh.single())
        tokens, labels = text[..., :-1].to(device), text[..., 1:].to(device)
        observer, losses_here = Observer(config, engine), []
        for _ in range(2):
            if len(records) < 2:
                found = observer.look(tokens[0], labels[0])
            with full_fp32():
                result = engine.train_step(tokens, labels, lr=1e-2, detailed=True)
            losses_here.append(result.loss)
        records.append({key: value for key, value in found.items() if key != "observe_seconds"})
        losses.append(losses_here)
    assert records[1] == pytest.approx(records[0], rel=1e-3, abs=1e-3)
    assert losses[1] == losses[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("length", "share"), [(65, 0.2), (300, 0.01), (300, 0.0), (8, 1.0)])
def test_documents_on_a_gpu_are_those_of_a_cpu(length: int, share: float, dtype: torch.dtype) -> None:
    """bf16: flash attention of variable length, rounding no more than a bf16 CPU does. fp32: blocks. From one document to one a token."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, 500, (3, length), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < share] = 0
    exact, low, gpu = (build(*how, eod_id=0) for how in (("cpu", torch.float32), ("cpu", dtype), ("cuda", dtype)))
    with full_fp32():
        (loss, wanted), (low_loss, low_found), (gpu_loss, found) = (gradients(model, tokens) for model in (exact, low, gpu))
    floor = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert abs(gpu_loss - loss) <= 2 * abs(low_loss - loss) + 0.4 * floor
    for name, gradient in wanted.items():
        scale = gradient.norm() + 1e-12
        usual = (low_found[name] - gradient).norm() / scale
        assert (found[name] - gradient).norm() / scale <= 3 * usual + floor, name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_computes_on_a_gpu_what_it_computes_on_a_cpu(variant: str, recompute: bool) -> None:
    """In fp32, without TF32; also the state that is no parameter lies on the GPU and follows the load there."""
    tokens = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(7))
    models = [build(device, torch.float32, VARIANTS[variant], recompute=recompute) for device in ("cpu", "cuda")]
    with full_fp32():
        (loss, wanted), (gpu_loss, found) = (gradients(model, tokens) for model in models)
    assert abs(gpu_loss - loss) <= 1e-5 * abs(loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name
    for model in models:
        model.follow_counts(torch.rand(VARIANTS[variant].num_moe_layers, 8, generator=torch.Generator().manual_seed(1)))
    for (name, ours), theirs in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert theirs.is_cuda and torch.equal(ours, theirs.cpu()), name


@contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products of fp32 numbers in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_initial_weights_are_those_of_the_cpu() -> None:
    cpu, gpu = build("cpu", torch.bfloat16), build("cuda", torch.bfloat16)
    for (name, ours), theirs in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        assert torch.equal(ours, theirs.cpu()), name


def test_a_save_beside_training_holds_the_state_of_its_step(tmp_path: Path) -> None:
    """Through page-locked buffers, and certified on a stream of its own while the next step runs."""
    save_beside_training("cuda", tmp_path)


def save_beside_training(device: str, root: Path) -> None:
    config = RunConfig(model=MODEL, train=TrainConfig(seq_len=64, global_batch_size=4, micro_batch_size=4))
    engine = ReferenceEngine(build(device, torch.bfloat16), config, ParallelMesh.single())
    saver = Saver(root, config=config, mesh=engine.mesh, order=lambda samples: {"order": "it", "samples": samples})
    text = torch.randint(0, 500, (5, 1, 4, 65), generator=torch.Generator().manual_seed(7))
    states = []
    for number in range(1, 5):
        tokens, labels = text[number, ..., :-1].contiguous(), text[number, ..., 1:].contiguous()
        result = engine.train_step(tokens.to(device), labels.to(device), lr=1e-3)
        samples = torch.arange(4).view(1, 4).numpy() + 4 * number
        saver.follow(engine, Followed(number, 1e-3, result, samples, Batch(tokens.numpy(), labels.numpy())))
        states.append({piece.name: piece.tensor.detach().cpu().clone() for piece in engine.state_pieces()})
        if number == 2:
            saver.save(engine, step=number, best_val_loss=None)
    saver.finish()
    assert engine.masters["embedding.weight"].device.type != "cuda" or saver._copy.pieces[0].tensor.is_pinned()
    folder = store.step_path(root, 2)
    with Checkpoint.open(folder) as checkpoint:
        assert all(torch.equal(checkpoint.read_whole(name), tensor) for name, tensor in states[1].items())
        prints = {name: digits(int(piece_sum(tensor, (0,) * tensor.dim()))) for name, tensor in states[1].items()}
        assert prints.items() <= checkpoint.metadata["fingerprint"].items(), "whole numbers wrap alike on both"
        saver.load(engine, checkpoint)
    recorded = read_next_step(folder)
    assert recorded is not None and recorded.step == 3
    for name, norm in recorded.updates.items():
        assert norm == pytest.approx((states[2][name].double() - states[1][name].double()).norm().item(), rel=1e-6), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("vocab_size", [500, 32_000])
def test_the_planned_peak_is_near_the_allocators(vocab_size: int, recompute: bool) -> None:
    """The second pass, when libraries have their workspaces. Gradients are dropped as they come, as ZeRO takes them."""
    attention = replace(MODEL.attention, num_heads=16, num_kv_heads=4, head_dim=64)
    moe = replace(MODEL.moe, ffn_size=512)
    config = replace(MODEL, vocab_size=vocab_size, hidden_size=1024, num_layers=6, attention=attention, moe=moe)
    model = build("cuda", torch.bfloat16, config, recompute=recompute)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    tokens = torch.randint(0, 500, (2, 2049), generator=torch.Generator().manual_seed(7))
    gradients(model, tokens)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(model, tokens)
    real = torch.cuda.max_memory_allocated() - before
    assert 0.9 * real < peak(config, Micro(2, 2048), recompute=recompute) < 1.25 * real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_look_never_waits_for_the_gpu_and_finds_what_a_cpu_finds(dtype: torch.dtype) -> None:
    from megagate.probe.probe import Probe
    from megagate.probe.taps import Seen, taps

    model = build("cuda", dtype, eod_id=3)
    tokens = torch.randint(0, 20, (4, 128), generator=torch.Generator().manual_seed(1))
    probe, on_cpu = (Probe(MODEL, ParallelMesh.single(), queries=9) for _ in range(2))
    shown: list[tuple[int, Seen]] = []
    with torch.no_grad(), taps(dict(enumerate(model.layers)), lambda layer, seen: shown.append((layer, seen))):
        model(tokens.cuda(), None)
    probe.look(*shown[0])  # what is compiled or allocated once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for layer, seen in [*shown, *shown[1:]]:
            probe.look(layer, seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for layer, seen in [*shown, *shown]:
        documents = replace(seen.documents, starts=seen.documents.starts.cpu())
        there = {name: value.cpu() for name, value in seen._asdict().items() if isinstance(value, torch.Tensor)}
        on_cpu.look(layer, seen._replace(**there, documents=documents))
    found, wanted = probe.close(), on_cpu.close()
    for layer in found:
        assert found[layer].gate.mean == pytest.approx(wanted[layer].gate.mean, rel=1e-6)
        assert found[layer].attention.first_token == pytest.approx(wanted[layer].attention.first_token, rel=1e-5)
        assert found[layer].hidden == wanted[layer].hidden
        assert found[layer].router.entropy == pytest.approx(wanted[layer].router.entropy, rel=1e-5)
