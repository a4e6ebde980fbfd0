"""The probe's figures are those of a dense reference that keeps every attention matrix, for every variant of gate and router."""

import pytest
import torch
from parity.sharded import BACKEND, clear_routes, fill
from parity.variants import VARIANTS
from probe.dense import DenseModel, assert_figures
from torch import Tensor

from megagate.config.model import ModelConfig
from megagate.model.lm import LanguageModel
from megagate.parallel.mesh import ParallelMesh
from megagate.probe.figures import LayerFigures
from megagate.probe.probe import Probe
from megagate.probe.taps import taps

EOD, LENGTH = 3, 12
ALONE = ParallelMesh.single()


def model_of(config: ModelConfig, eod_id: int | None) -> LanguageModel:
    return fill(LanguageModel(config, dtype=torch.float32, backend=BACKEND, mesh=ALONE, eod_id=eod_id))


def some_tokens(key: int = 0) -> Tensor:
    """Three rows: ends in the middle, two ends in a row, an end at the end; and none."""
    tokens = torch.randint(EOD + 1, 250, (3, LENGTH), generator=torch.Generator().manual_seed(key))
    tokens[0, [3, 7]] = EOD
    tokens[1, [0, 5, 6, LENGTH - 1]] = EOD
    return tokens


def look_at(model: LanguageModel, *batches: Tensor, queries: int = 0) -> dict[int, LayerFigures]:
    probe = Probe(model.config, ALONE, queries=queries)
    with torch.no_grad(), taps(dict(enumerate(model.layers)), probe.look), clear_routes(model):
        for tokens in batches:
            model(tokens, None)
    return probe.close()


def reference(model: LanguageModel, eod_id: int | None) -> DenseModel:
    return DenseModel(model.config, dict(model.named_parameters()) | dict(model.named_buffers()), eod_id)


@pytest.mark.parametrize("eod_id", [None, EOD], ids=["rows", "documents"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_figures_of_the_definitions(variant, eod_id):
    model = model_of(VARIANTS[variant], eod_id)
    with torch.no_grad():
        dense = reference(model, eod_id).blocks(some_tokens())
    for queries, rows in ((0, range(LENGTH)), (1, [11]), (5, [1, 3, 6, 8, 11]), (LENGTH, range(LENGTH)), (40, range(LENGTH))):
        figures = look_at(model, some_tokens(), queries=queries)
        assert list(figures) == [0, 1]
        for layer, expected in enumerate(dense):
            assert_figures(figures[layer], expected, queries=rows, what=f"block {layer}, {queries} queries")
