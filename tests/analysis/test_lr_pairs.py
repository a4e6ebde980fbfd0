"""The runs of a pair of the CPU studies: what both models have begins with the same bits, and both read the same tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity.sharded import BACKEND, CPU

from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.spec_file import read_spec
from megagate.config.run import RunConfig
from megagate.data.loader import TrainLoader
from megagate.data.synthetic import SyntheticSplit
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh

EXAMPLES = Path(__file__).parents[2] / "examples" / "lr_stability"
OWN = ("attention.gate.weight", "out_norm.weight")


def weights_of(config: RunConfig) -> dict[str, torch.Tensor]:
    model = LanguageModel(config.model, dtype=torch.float32, backend=BACKEND, mesh=ParallelMesh.single())
    return dict(model.initialize(seed=config.train.seed, device=CPU).named_parameters())


def tokens_of(config: RunConfig, step: int) -> np.ndarray:
    train, data = config.train, SyntheticSplit("train", vocab_size=config.model.vocab_size)
    sizes = {"seq_len": train.seq_len, "global_batch_size": train.global_batch_size, "micro_batch_size": train.micro_batch_size}
    return TrainLoader(data, **sizes, dp_rank=0, dp_size=1, seed=train.seed).step(step).tokens


@pytest.mark.parametrize("name", ["cpu_nano", "cpu_nano_matched", "cpu_nano_moe"])
def test_a_pair_begins_alike_and_reads_the_same(name: str, tmp_path: Path) -> None:
    spec = read_spec(EXAMPLES / f"{name}.yaml")
    baseline, *variants = (spec.config(RunKey(one.name, spec.learning_rates[0], spec.seeds[0]), tmp_path) for one in spec.variants)
    weights = weights_of(baseline)
    for config in variants:
        values = weights_of(config)
        assert weights.keys() <= values.keys()
        assert all(key.endswith(OWN) for key in values.keys() - weights.keys())
        for key, whole in weights.items():
            narrow = name == "cpu_nano_matched" and ".ffn." in key
            assert values[key].shape == whole.shape or narrow, key
            assert torch.equal(values[key], whole[tuple(slice(0, size) for size in values[key].shape)]), key
        for step in (0, 1, spec.steps - 1):
            assert np.array_equal(tokens_of(config, step), tokens_of(baseline, step))


def test_another_seed_is_another_model_and_another_order(tmp_path: Path) -> None:
    spec = read_spec(EXAMPLES / "cpu_nano.yaml")
    one, other = (spec.config(RunKey("baseline", spec.learning_rates[0], seed), tmp_path) for seed in spec.seeds[:2])
    key = "layers.0.attention.q.weight"
    assert not torch.equal(weights_of(one)[key], weights_of(other)[key])
    assert not np.array_equal(tokens_of(one, 0), tokens_of(other, 0))
