"""Verification passes right exports, whole and streamed, and names what is wrong with others."""


from dataclasses import replace

import pytest
import torch
from exports import Config, Exported, Tensors, exported, spoil
from hf_exports import CASES, DENSE, ELEMENTWISE, HEADWISE, gated, language_model, load_theirs, moe
from remote_models import ALL_VARIANTS
from test_hf_adopt_foreign import STOCK, stock

from megagate.checkpoint.hf.adopt import adopt
from megagate.checkpoint.hf.table import mapping
from megagate.checkpoint.hf.verify import verify_adopted, verify_export
from megagate.checkpoint.hf.verify_files import FolderTensors, Rebuilt
from megagate.checkpoint.hf.verify_logits import LENGTH, NEW_TOKENS, SEQUENCES, agreement, fixed_tokens
from megagate.checkpoint.hf.verify_models import Case, compare_greedy
from megagate.checkpoint.hf.verify_tensors import CHUNK_ELEMENTS

LITTLE = 1000
"""Bytes: no two models fit into them."""
SHARED = gated(moe(shared_ffn_size=24), ELEMENTWISE)
HALVED = moe(shared_ffn_size=24)
LAYER = "model.layers.1"
OUTPUT = f"{LAYER}.self_attn.o_proj.weight"
NAMES = ("gate position G2", "switch kv 2 of 2", "router sigmoid with bias", "sandwich norm, mixture")
REMOTE = {name: ALL_VARIANTS[name] for name in NAMES}
MODELS = {name: model for name, (model, _) in CASES.items()} | REMOTE


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_right_exports_pass_whole_and_streamed(model, dtype, tmp_path, modules_cache):
    made = exported(tmp_path, model, dtype=dtype)
    whole, streamed = verify_export(*made), verify_export(*made, memory=LITTLE)
    assert whole.flaws == streamed.flaws == () and whole.passed and (whole.how, streamed.how) == ("whole", "streamed")
    assert whole.tensors == streamed.tensors == len({name for row in mapping(model, target_of(made)) for name in row.theirs})
    assert whole.logits.max_error <= 1e-5 and whole.logits.positions == SEQUENCES * LENGTH
    assert whole.logits.largest > 1, "logits that are all small would agree anyway"
    assert whole.greedy.max_error <= 1e-5 and whole.greedy_tokens == SEQUENCES * NEW_TOKENS
    # The same kernels on the same numbers: reading block by block changes nothing.
    assert streamed.logits == whole.logits and streamed.greedy is None


def target_of(made: Exported) -> str:
    from megagate.checkpoint.hf.adopt_files import read_json

    kind = read_json(made.folder / "config.json")["model_type"]
    return "remote-code" if kind == "megagate" else kind


def swap_experts(tensors: Tensors, _: Config) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        one, other = (f"{LAYER}.mlp.experts.{expert}.{part}.weight" for expert in (2, 5))
        tensors[one], tensors[other] = tensors[other], tensors[one]


def gates_behind_queries(tensors: Tensors, _: Config) -> None:
    fused = tensors[f"{LAYER}.self_attn.q_proj.weight"]
    tensors[f"{LAYER}.self_attn.q_proj.weight"] = fused.unflatten(0, (6, 2, 8)).transpose(0, 1).flatten(0, 2)


def plain_norm(tensors: Tensors, _: Config) -> None:
    tensors[f"{LAYER}.input_layernorm.weight"] += 1


def round_twice(tensors: Tensors, _: Config) -> None:
    tensors[OUTPUT] = tensors[OUTPUT].bfloat16().float()


def round_down(tensors: Tensors, _: Config) -> None:
    bits = tensors[OUTPUT].view(torch.int32)
    tensors[OUTPUT] = (bits - 1).view(torch.float32)


def flip_a_bit(tensors: Tensors, _: Config) -> None:
    tensors["lm_head.weight"].view(torch.int32)[3, 4] ^= 1


def halve_the_shared_expert(tensors: Tensors, _: Config) -> None:
    tensors[f"{LAYER}.mlp.shared_expert.down_proj.weight"] /= 2


def to_half(tensors: Tensors, _: Config) -> None:
    tensors[OUTPUT] = tensors[OUTPUT].half()


def lose_an_expert(tensors: Tensors, _: Config) -> None:
    del tensors[f"{LAYER}.mlp.experts.3.up_proj.weight"]


def lose_a_norm(tensors: Tensors, _: Config) -> None:
    del tensors[f"{LAYER}.self_attn.q_norm.weight"]


def one_more(tensors: Tensors, _: Config) -> None:
    tensors["model.layers.2.mlp.gate.weight"] = torch.zeros(8, 32)


def transpose(tensors: Tensors, _: Config) -> None:
    tensors[OUTPUT] = tensors[OUTPUT].t()


def no_partial_rotary_factor(_: Tensors, config: Config) -> None:
    del config["partial_rotary_factor"], config["rope_parameters"]["partial_rotary_factor"]


def other_base(_: Tensors, config: Config) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 500.0


def not_renormalised(_: Tensors, config: Config) -> None:
    config["norm_topk_prob"] = False


def fewer_experts_per_token(_: Tensors, config: Config) -> None:
    config["num_experts_per_tok"] = 2


def other_epsilon(_: Tensors, config: Config) -> None:
    config["rms_norm_eps"] = 1e-6


def linear_layer(_: Tensors, config: Config) -> None:
    config["layer_types"] = ["full_attention", "linear_attention"]


def no_head_dim(_: Tensors, config: Config) -> None:
    del config["head_dim"]


def other_entry(_: Tensors, config: Config) -> None:
    config["megagate"]["model"]["attention"]["gate"]["granularity"] = "headwise"


def of_no_class(_: Tensors, config: Config) -> None:
    config["model_type"] = "llama"


WRONG = {
    swap_experts: ["mlp.experts.2.up_proj.weight is not what it should be: it holds what belongs in model.layers.1.mlp.experts.5.up_proj"],
    gates_behind_queries: ["q_proj.weight", "2560 of 3072 elements differ, the first at [8, 0]", "the expected ones in another order"],
    plain_norm: ["1.input_layernorm.weight", "all are 1 too large: this class multiplies by 1 + w, and w - 1 belongs here"],
    round_twice: [OUTPUT, "they were rounded to bfloat16"],
    round_down: [OUTPUT, "1536 of 1536 elements differ", "were rounded otherwise"],
    flip_a_bit: ["lm_head.weight", "1 of 6400 elements differ, the first at [3, 4]"],
    halve_the_shared_expert: ["1.mlp.shared_expert.down_proj.weight", "all are 0.5 times what they should be"],
    to_half: [OUTPUT, "it is torch.float16, and torch.float32 is expected"],
    lose_an_expert: ["1.mlp.experts.3.up_proj.weight is missing, and the model has it", "no logits were compared"],
    lose_a_norm: ["1.self_attn.q_norm.weight is missing, and the model has it"],
    one_more: ["model.layers.2.mlp.gate.weight is in the folder, and no part of the model is in it"],
    transpose: [OUTPUT, "has the shape [48, 32], the model gives [32, 48]"],
    no_partial_rotary_factor: ["has partial_rotary_factor 0.25, and the model 1.0", "logits differ by up to", "layers.0.attention"],
    other_base: ["has rope_theta 500.0, and the model 1000.0", "logits differ by up to", "differs is layers.0.attention"],
    not_renormalised: ["has norm_topk_prob False, and the model True", "logits differ by up to", "differs is layers.0.ffn"],
    fewer_experts_per_token: ["has num_experts_per_tok 2, and the model 3", "logits differ by up to", "differs is layers.0.ffn"],
    other_epsilon: ["has rms_norm_eps 1e-06, and the model 1e-05", "logits differ by up to"],
    linear_layer: ["layer_types linear_attention, and the model full_attention", "self_attn.k_norm.weight"],
    no_head_dim: ["has head_dim 256, and the model 8", "transformers", "cannot load and run it as qwen3_next"],
    other_entry: ["has megagate.model.attention.gate.granularity headwise, and the model elementwise"],
    of_no_class: ["config.json: model_type is llama, and known are"],
}


@pytest.mark.parametrize("memory", [None, LITTLE], ids=["whole", "streamed"])
@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_wrong_exports_are_named(change, memory, tmp_path):
    made = exported(tmp_path, SHARED)
    spoil(made.folder, change)
    found = verify_export(*made, memory=memory)
    assert not found.passed
    text = "\n".join(found.lines())
    assert [part for part in WRONG[change] if part not in text] == [], text


def test_what_is_not_doubled_beside_a_gate_of_zeros_is_named(tmp_path):
    made = exported(tmp_path, HALVED)
    spoil(made.folder, lambda tensors, _: tensors[OUTPUT].div_(2))
    text = "\n".join(verify_export(*made).flaws)
    assert OUTPUT in text and "all are 0.5 times what they should be" in text, text


def test_bf16_is_compared_as_bf16(tmp_path):
    """Rounded to the nearest, as the run's weights are: one that is cut off instead differs by a last digit at most."""
    made = exported(tmp_path, DENSE, dtype="bf16")
    assert verify_export(*made).passed
    spoil(made.folder, lambda tensors, _: tensors[OUTPUT].view(torch.int16).sub_(1))
    found = verify_export(*made)
    assert [flaw.startswith(OUTPUT) and "were rounded otherwise" in flaw for flaw in found.flaws] == [True], found.flaws


def test_large_tensors_are_compared_in_parts_to_their_end(tmp_path):
    wide = replace(DENSE, vocab_size=40_000)
    made = exported(tmp_path, wide)
    place = (39_990, 3)
    assert wide.vocab_size * wide.hidden_size > CHUNK_ELEMENTS > place[0] * wide.hidden_size - CHUNK_ELEMENTS
    adopt(made.folder, tmp_path / "new")
    spoil(made.folder, lambda tensors, _: tensors["lm_head.weight"].view(torch.int32)[place].bitwise_xor_(1))
    for name, found in (
        ("lm_head.weight", verify_export(*made)),
        ("master/head.weight", verify_adopted(made.folder, tmp_path / "new")),
    ):
        (flaw,) = found.flaws
        assert flaw.startswith(f"{name} is not") and "1 of 1280000 elements differ, the first at [39990, 3]" in flaw, flaw


def test_a_cache_that_is_used_wrongly_shows_in_the_continuation(tmp_path):
    """Their model, but each step with the cache sees its token one place too early: logits of whole texts are right."""
    made = exported(tmp_path, DENSE)
    theirs, _ = load_theirs(made.folder)
    tensors = FolderTensors(made.folder)
    case = Case(made.folder, DENSE, "qwen3", tensors, Rebuilt(DENSE, mapping(DENSE, "qwen3"), tensors))
    ours = language_model(DENSE).eval()
    right, count = compare_greedy(case, ours, theirs, [])
    assert right.flaw is None and count == SEQUENCES * NEW_TOKENS

    def too_early(_: torch.nn.Module, args: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        states, positions = args
        return states, positions - 1 if positions.shape[1] == 1 else positions

    theirs.model.rotary_emb.register_forward_pre_hook(too_early)
    wrong, _ = compare_greedy(case, ours, theirs, [])
    assert wrong.flaw and wrong.at[1] > 0, wrong


ADOPTED = {"dense, headwise": gated(DENSE, HEADWISE), "mixture, all": SHARED, "remote": REMOTE["router sigmoid with bias"]}


@pytest.mark.parametrize("model", ADOPTED.values(), ids=ADOPTED)
def test_adopted_checkpoints_pass_and_others_do_not(model, tmp_path, modules_cache):
    made = exported(tmp_path, model)
    adopt(made.folder, tmp_path / "new")
    found = verify_adopted(made.folder, tmp_path / "new")
    assert found.flaws == () and found.logits.max_error <= 1e-5 and found.greedy_tokens, found.lines()
    assert verify_adopted(made.folder, tmp_path / "new", memory=LITTLE).logits == found.logits
    spoil(made.folder, lambda tensors, _: tensors[OUTPUT].view(torch.int32)[5, 6].bitwise_xor_(1))
    changed = verify_adopted(made.folder, tmp_path / "new")
    name = "master/layers.1.attention.o.weight"
    assert len(changed.flaws) == 1 and changed.flaws[0].startswith(f"{name} is not what it should be: 1 of"), changed.flaws
    assert "the first at [5, 6]" in changed.flaws[0]


@pytest.mark.parametrize("name", STOCK)
def test_what_transformers_wrote_is_verified_after_adoption(name, tmp_path):
    """Whatever it names, fuses or keeps twice otherwise than our exports."""
    folder, _ = stock(tmp_path / "hf", name.split()[0], **STOCK[name])
    adopt(folder, tmp_path / "new")
    for memory in (None, LITTLE):
        found = verify_adopted(folder, tmp_path / "new", memory=memory)
        assert found.flaws == () and found.logits.max_error <= 1e-5 and found.tensors, found.lines()


def test_a_tied_projection_that_is_there_twice_is_left_out(tmp_path):
    made = exported(tmp_path, replace(DENSE, tie_embeddings=True))
    spoil(made.folder, lambda tensors, _: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    adopt(made.folder, tmp_path / "new")
    for memory in (None, LITTLE):
        assert verify_adopted(made.folder, tmp_path / "new", memory=memory).flaws == ()
    assert not verify_export(*made).passed, "an export holds it once"


def test_another_config_is_not_the_checkpoints(tmp_path):
    made = exported(tmp_path, DENSE)
    adopt(made.folder, tmp_path / "new")
    other = exported(tmp_path / "other", replace(DENSE, norm_eps=1e-6))
    found = verify_adopted(other.folder, tmp_path / "new")
    assert len(found.flaws) == 1 and "norm_eps 1e-06, and the model 1e-05" in found.flaws[0], found.flaws


def test_tokens_cover_the_vocabulary() -> None:
    tokens = fixed_tokens(50_257)
    assert tokens.shape == (SEQUENCES, LENGTH) and LENGTH > 64 and torch.equal(tokens, fixed_tokens(50_257))
    ranked = tokens.flatten().sort().values
    assert ranked[0] == 0 and ranked[-1] == 50_256 and (ranked[1:] - ranked[:-1]).max() <= 2 * 50_257 / tokens.numel() + 1
    assert len(fixed_tokens(7).unique()) == 7


class TestNearTies:
    """A flipped route changes its position and those behind it; a wrong weight all."""

    OURS = torch.randn(3, 80, 50, generator=torch.Generator().manual_seed(1))
    FLIP = 30

    def gaps(self, *sequences: int) -> list[torch.Tensor]:
        gaps = torch.ones(3, 80, dtype=torch.float64)
        gaps[list(sequences), self.FLIP] = 1e-7
        ones = torch.ones(3, 80, dtype=torch.float64)
        return [ones, gaps, ones]

    def flipped(self, *sequences: int) -> torch.Tensor:
        theirs = self.OURS.clone()
        theirs[list(sequences), self.FLIP :] += 0.1
        return theirs

    def test_a_flip_at_a_near_tie_is_told_apart(self) -> None:
        found = agreement(self.OURS, self.flipped(1), self.gaps(1))
        assert found.flaw is None and found.max_error == 0 and (found.positions, found.left_out) == (190, 50)

    def test_a_near_tie_that_did_not_flip_leaves_nothing_out(self) -> None:
        assert agreement(self.OURS, self.OURS, self.gaps(0, 1, 2)).positions == 240

    def test_a_difference_before_the_near_tie_is_wrong(self) -> None:
        theirs = self.flipped(1)
        theirs[1, self.FLIP - 1, 7] += 2e-4
        found = agreement(self.OURS, theirs, self.gaps(1))
        assert found.flaw and found.left_out == 0

    def test_a_difference_elsewhere_is_wrong(self) -> None:
        found = agreement(self.OURS, self.flipped(1, 2), self.gaps(1))
        assert found.flaw and found.at[0] == 2 and found.at[1] >= self.FLIP and found.left_out == 50

    def test_near_ties_do_not_excuse_everything(self) -> None:
        found = agreement(self.OURS, self.flipped(0, 1, 2), self.gaps(0, 1, 2))
        assert found.flaw and "too few" in found.flaw and found.positions == 90

    def test_what_is_no_number_is_wrong(self) -> None:
        theirs = self.OURS.clone()
        theirs[2, 70, 3] = float("nan")
        found = agreement(self.OURS, theirs, [])
        assert found.flaw and found.at == (2, 70, 3) and found.max_error == float("inf")

    def test_small_logits_must_agree_as_well_as_large_ones(self) -> None:
        theirs = self.OURS.clone()
        theirs[0, 0, 0] += 5e-5
        assert agreement(self.OURS, theirs, []).flaw is None
        assert agreement(self.OURS / 100, self.OURS / 100 + (theirs - self.OURS), []).flaw
