"""The pass block by block: native checkpoints and their exports alike, and as transformers computes them."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_exports import CASES, DENSE, FORCED, GATED_ALL, gated, language_model, load_theirs, masters, moe, run_config, save
from hf_released import SIZES, TOKENS, released, released_logits
from parity.variants import VARIANTS
from remote_models import remote_model
from torch import Tensor
from torch.nn import functional as F

from megagate.analysis.gate.layerwise import Looked, look_through, passes
from megagate.analysis.gate.source import attention_words, gate_words, open_source
from megagate.analysis.gate.text import Windows
from megagate.checkpoint.hf.adopt import adopt
from megagate.checkpoint.hf.export import export
from megagate.checkpoint.hf.table import NAMES
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, SwitchConfig
from megagate.data.loader import IGNORE_INDEX
from megagate.model.lm import LanguageModel
from megagate.probe.figures import LayerFigures

CPU = torch.device("cpu")
EXACT = 1e-6
REMOTE = {
    "G2 headwise": gated(DENSE, GateConfig("G2", "headwise")),
    "G1 head-shared, mixture": gated(moe(score="sigmoid", z_loss_coef=0.0, bias_update_rate=0.02), GateConfig("G1", head_shared=True)),
    "switch v 2 of 3": VARIANTS["switch v 2 of 3"],
}
STOCK = {
    "dense": CASES["dense"],
    "dense, tied": CASES["dense, tied"],
    "mixture": CASES["mixture"],
    "mixture, all": (GATED_ALL, "qwen3_next"),
    "mixture, no gate, in a gated class": FORCED["mixture"],
    "dense, headwise, tied": CASES["dense, headwise, tied"],
    "dense, sandwich, headwise": CASES["dense, sandwich, headwise"],
    "dense, sandwich, elementwise, tied": CASES["dense, sandwich, elementwise, tied"],
}
"""Of every stock class at least one."""


def windows(vocab_size: int = 200, *, rows: int = 3, length: int = 20, eod_id: int | None = None, seed: int = 1) -> Windows:
    stream = torch.randint(vocab_size, (rows * length + 1,), generator=torch.Generator().manual_seed(seed))
    tokens, labels = stream[:-1].view(rows, length), stream[1:].view(rows, length)
    return Windows(tokens, labels, eod_id, None, "random tokens")


def look(path: Path, read: Windows, **options: Any) -> Looked:
    options = {"within_documents": False, "device": CPU, "map_layers": (0, 1), "map_tokens": 8} | options
    return look_through(open_source("it", path), read, **options)


def native(folder: Path, model: ModelConfig, *, dtype: str = "fp32") -> Path:
    return save(folder / "run", masters(language_model(model)), run_config(model, dtype=dtype))


def figures(looked: Looked) -> list[float]:
    """Every number of it but what depends on the last bit: channels and histograms."""
    found = [looked.loss]
    for layer in looked.layers:
        for part in (layer.gate, layer.attention, layer.hidden, layer.output, layer.router):
            values = [] if part is None else [value for name, value in vars(part).items() if name not in ("channel", "histogram")]
            found += [float(part is None), *(one for value in values for one in (value if isinstance(value, tuple) else [value]))]
    return found


def require_equal(found: Looked, expected: Looked, *, tolerance: float = EXACT) -> None:
    for one, other in zip(figures(found), figures(expected), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert found.targets == expected.targets
    for layer, attention in expected.maps.items():
        torch.testing.assert_close(torch.tensor(found.maps[layer]), torch.tensor(attention), rtol=0, atol=tolerance)


def require_as_theirs(looked: Looked, model: Any, read: Windows, *, output: str = "o_proj") -> None:
    """A model of transformers, which keeps every attention matrix; `output` is the name of its attention's output projection."""
    hidden: list[Tensor] = []
    projected: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    handles += [
        block.self_attn.get_submodule(output).register_forward_pre_hook(lambda _, args: projected.append(args[0]))
        for block in model.model.layers
    ]
    with torch.no_grad():
        out = model(input_ids=read.tokens, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    loss = F.cross_entropy(out.logits.flatten(0, 1).double(), read.labels.flatten())
    assert looked.loss == pytest.approx(float(loss), rel=EXACT)
    assert len(looked.layers) == len(hidden) == len(out.attentions)
    for number, (layer, attention, x, gated_heads) in enumerate(zip(looked.layers, out.attentions, hidden, projected, strict=True)):
        require_layer(layer, attention.double(), x)
        # Where a class has a gate and the model none, its stands at 1/2, before a projection that is doubled.
        scale = 2 if layer.gate is None and model.config.model_type == "qwen3_next" else 1
        assert layer.output.mean_abs[1] == pytest.approx(scale * float(gated_heads.abs().double().mean()), rel=EXACT)
        torch.testing.assert_close(torch.tensor(looked.maps[number]), attention[0].mean(0)[:8, :8], rtol=0, atol=EXACT)


def require_layer(layer: LayerFigures, attention: Tensor, x: Tensor) -> None:
    assert layer.attention.first_token_with_0 == pytest.approx(float(attention[..., 0].mean()), abs=EXACT)
    assert layer.attention.first_token == pytest.approx(float(attention[..., 1:, 0].mean()), abs=EXACT)
    assert layer.hidden.max_abs == pytest.approx(float(x.abs().max()), rel=EXACT)
    assert layer.hidden.mean_max_abs == pytest.approx(float(x.abs().flatten(1).amax(1).double().mean()), rel=EXACT)


@pytest.mark.parametrize("name", STOCK)
def test_a_checkpoint_its_export_and_transformers_agree(tmp_path: Path, name: str) -> None:
    model, target = STOCK[name]
    run, read = native(tmp_path, model), windows()
    folder = export(run, tmp_path / "hf", format=target).folder
    ours, theirs = look(run, read), look(folder, read)
    require_equal(theirs, ours)
    peer, _ = load_theirs(folder, attn_implementation="eager")
    require_as_theirs(theirs, peer, read, output=NAMES[target].attention_out)


@pytest.mark.parametrize("name", REMOTE)
def test_so_do_models_that_bring_their_class(tmp_path: Path, name: str) -> None:
    model, read = REMOTE[name], windows()
    run = native(tmp_path, model)
    folder = export(run, tmp_path / "hf", format="remote-code").folder
    ours, theirs = look(run, read), look(folder, read)
    require_equal(theirs, ours)
    require_as_theirs(theirs, remote_model(language_model(model), attn_implementation="eager"), read)


@pytest.mark.parametrize("kind", ["headwise", "elementwise", "baseline"])
def test_models_released_with_the_paper_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    folder, weights = released(tmp_path / "released", kind)
    labels = torch.cat([TOKENS[:, 1:], torch.full((len(TOKENS), 1), IGNORE_INDEX)], 1)
    read = Windows(TOKENS, labels, None, None, "random tokens")
    found = look(folder, read)
    logits = released_logits(weights, kind)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)), rel=EXACT)
    assert found.targets == TOKENS.numel() - len(TOKENS)
    adopt(folder, tmp_path / "out")
    require_equal(look(tmp_path / "out", read), found)
    source = open_source("released", folder)
    assert (source.kind, source.length) == (f"Hugging Face {'qwen3' if kind == 'baseline' else 'gated_attention'}, weights in fp32",
                                            SIZES["max_position_embeddings"])  # fmt: skip


def test_a_run_in_bf16_is_measured_with_the_weights_of_its_forward_pass(tmp_path: Path) -> None:
    model, read = GATED_ALL, windows()
    run = native(tmp_path, model, dtype="bf16")
    own = look(run, read)
    require_equal(look(export(run, tmp_path / "bf16").folder, read), own)
    wide = look(export(run, tmp_path / "fp32", dtype="fp32").folder, read)
    assert wide.loss != pytest.approx(own.loss, rel=1e-5)
    assert open_source("it", run).kind == "native, step 7, weights as in its bf16 forward pass"


def test_groups_of_sequences_give_what_one_gives(tmp_path: Path) -> None:
    run, read = native(tmp_path, GATED_ALL), windows()
    told: list[int] = []
    whole, apart = look(run, read), look(run, read, group_bytes=1, report=told.append)
    assert apart == whole
    assert sum(told) == passes(open_source("it", run), read) == 3 * (GATED_ALL.num_layers + 1)


@pytest.mark.parametrize("kind", ["native", "export"])
def test_only_a_part_of_the_model_is_in_memory_at_a_time(tmp_path: Path, kind: str) -> None:
    where = native(tmp_path, DENSE)
    source = open_source("it", export(where, tmp_path / "hf").folder if kind == "export" else where)
    asked: list[tuple[str, set[str]]] = []

    def read(prefix: str) -> dict[str, Tensor]:
        asked.append((prefix, parts_with_weights()))
        found = source.read(prefix)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()  # pages of mapped files count as the process's memory
        return found

    look_through(replace(source, read=read), windows(), within_documents=False, device=CPU)
    first = [("embedding.", set()), ("layers.0.", set()), ("layers.1.", set())]
    assert asked == [*first, ("final_norm.", set()), ("head.", {"final_norm"})]


@pytest.mark.parametrize("kind", ["native", "export"])
def test_a_block_is_read_in_little_more_memory_than_it_has(tmp_path: Path, kind: str) -> None:
    """Files are mapped, and the pages of a block's that were read would count beside it: twice its size."""
    model = replace(moe(num_experts=16, ffn_size=1024), hidden_size=512, num_layers=1)
    where = native(tmp_path, model)
    source = open_source("it", export(where, tmp_path / "hf").folder if kind == "export" else where)
    source.read("final_norm.")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    size = sum(tensor.nbytes for tensor in source.read("layers.0.").values())
    assert size > 90 << 20
    assert memory("VmHWM") - before < 1.6 * size


def memory(key: str) -> int:
    """Of this process, bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def parts_with_weights() -> set[str]:
    """Of the model that is running, which is the only one that has weights in some parts alone."""
    running = (one for one in gc.get_objects() if type(one) is LanguageModel and any(p.is_meta for p in one.parameters()))
    return {name.rpartition(".")[0] for model in running for name, parameter in model.named_parameters() if not parameter.is_meta}


def test_attention_within_documents_is_that_of_documents_alone(tmp_path: Path) -> None:
    run = native(tmp_path, DENSE)
    read = windows(150, rows=1, length=20)  # the last 50 tokens of the vocabulary do not occur
    tokens = read.tokens.clone()
    tokens[0, 7] = 199
    first, second = tokens[:, :8], tokens[:, 8:]
    joined = Windows(tokens, read.labels, 199, None, "two documents").without_targets_after_documents()
    both = look(run, joined, within_documents=True, map_tokens=20)
    alone = [
        look(run, Windows(part, part.roll(-1, 1), None, None, "one"), map_tokens=20) for part in (first, second)
    ]
    for layer in range(2):
        seen = [one.layers[layer] for one in alone]
        assert both.layers[layer].hidden.max_abs == pytest.approx(max(one.hidden.max_abs for one in seen), rel=1e-5)
        shares = [one.attention.first_token_with_0 * part.shape[1] for one, part in zip(seen, (first, second), strict=True)]
        assert both.layers[layer].attention.first_token_with_0 == pytest.approx(sum(shares) / 20, rel=1e-5)
        attention = torch.tensor(both.maps[layer])
        torch.testing.assert_close(attention[:8, :8], torch.tensor(alone[0].maps[layer]), rtol=0, atol=1e-6)
        torch.testing.assert_close(attention[8:, 8:], torch.tensor(alone[1].maps[layer]), rtol=0, atol=1e-6)
        assert not attention[8:, :8].any()
    assert both.targets == 19


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (GateConfig(), "none"),
        (GateConfig("G1"), "elementwise at G1, sigmoid"),
        (GateConfig("G1", head_shared=True), "elementwise at G1, head-shared, sigmoid"),
        (GateConfig("G2", "headwise", combine="add", activation="silu"), "headwise at G2, silu, added"),
        (GateConfig("G1", score="parameter"), "elementwise at G1, sigmoid, independent of the input"),
        (GateConfig("G1", score="self", activation="rmsnorm"), "rmsnorm of itself at G1"),
        (GateConfig("G3", score="constant"), "times 0.5 at G3"),
    ],
)
def test_gates_in_words(gate: GateConfig, words: str) -> None:
    assert gate_words(gate) == attention_words(AttentionConfig(gate=gate)) == words


def test_switch_heads_in_words() -> None:
    attention = AttentionConfig(gate=GateConfig("G1"), switch=SwitchConfig("v", num_experts=4, top_k=2))
    assert attention_words(attention) == "elementwise at G1, sigmoid; switch heads v, 2 of 4: not scored here"
