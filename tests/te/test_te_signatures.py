"""Every call that we make into Transformer Engine fits the signatures of its real sources."""

import inspect
from pathlib import Path

import pytest
from te import make_signatures
from te.te_calls import SIGNATURES, Misfit, bind_calls
from te.te_ranks import needs_te

import megagate.backend

FILES = sorted(Path(inspect.getfile(megagate.backend)).parent.glob("te*.py"))


def test_every_call_of_the_backend_fits():
    targets = {bound.target.rsplit("transformer_engine.", 1)[1] for file in FILES for bound in bind_calls(file.read_text(encoding="utf-8"))}
    assert targets == {
        "common.recipe.DelayedScaling",
        "common.recipe.Float8BlockScaling",
        "common.recipe.Float8CurrentScaling",
        "common.recipe.MXFP8BlockScaling",
        "pytorch.DotProductAttention",
        "pytorch.DotProductAttention.forward",
        "pytorch.GroupedLinear",
        "pytorch.GroupedLinear.forward",
        "pytorch.GroupedLinear.init_fp8_metadata",
        "pytorch.LayerNormLinear",
        "pytorch.LayerNormLinear.forward",
        "pytorch.LayerNormLinear.init_fp8_metadata",
        "pytorch.Linear",
        "pytorch.Linear.forward",
        "pytorch.Linear.init_fp8_metadata",
        "pytorch.autocast",
        "pytorch.checkpoint",
        "pytorch.moe_permute_with_probs",
        "pytorch.moe_unpermute",
        "pytorch.optimizers.FusedAdam",
        "pytorch.router.fused_compute_score_for_moe_aux_loss",
        "pytorch.router.fused_topk_with_score_function",
    }


def test_the_state_that_is_read_without_a_call_is_there():
    read = {
        "DelayedScalingRecipeState": {"amax_history", "scale"},
        "FP8GlobalStateManager": {"quantization_state"},
        "FP8GlobalState": {"fp8_tensors_recompute_buffer"},
    }
    for name, attributes in read.items():
        assert attributes <= set(SIGNATURES["entries"][f"transformer_engine.pytorch.quantization.{name}"]["attributes"])


CLASS = "class A:\n    def __init__(self, te):\n        self.module = te.Linear(8, 8)\n    def run(self, x):\n        "
REFUSED = {
    "def f(te):\n    te.Linear(8)": "missing a required argument: 'out_features'",
    "def f(te):\n    te.Linear(8, 8, biases=False)": "unexpected keyword argument 'biases'",
    "def f(te):\n    te.Linear(8, **more)": "two stars",
    "def f(te):\n    te.Linear(*sizes)": "a star",
    "def f(te):\n    te.Linea(8, 8)": "pytorch.Linea is not among the signatures",
    "def f(te):\n    te.checkpoint(run, x, reentrant=False)": "knows no keyword ['reentrant']",
    "def f(te):\n    make = te.Linear": "read without a call",
    "def f(te):\n    other = te": "passed on without a call",
    "def f(te):\n    run(te)": "passed on without a call",
    "def f(te):\n    getattr(te, name)(8)": "passed on without a call",
    "te = something()": "may only be bound by a loader",
    "from transformer_engine import pytorch": "import the package",
    "import transformer_engine.pytorch as te": "by `from` in a loader",
    "def f(self):\n    self.te.router.fused_moe_aux_loss(1)": "missing a required argument",
    "def f(self):\n    self.recipe.delayed()": "a method of a recipe",
    "class A:\n    def __init__(self, te):\n        self.module = make(te.Linear(8, 8))": "is made by a call of TE's",
    "class A:\n    def run(self, x):\n        return self.module(x)": "cannot be resolved",
    CLASS + "return self.module()": "missing a required argument: 'inp'",
    CLASS + "return self.module(x, m_splits=1)": "unexpected keyword argument 'm_splits'",
    CLASS + "return self.module.forwards(x)": "has no method forwards",
    CLASS + "return self.module.fp8_metas": "has no attribute fp8_metas",
    CLASS + "return self.module.weight.sum()": "cannot be resolved",
    CLASS + "return run(self.module)": "is passed on",
    CLASS + "module = self.module": "is passed on",
}


@pytest.mark.parametrize("source", REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_or_cannot_be_resolved_is_refused(source):
    with pytest.raises(Misfit) as caught:
        bind_calls(source)
    assert REFUSED[source] in str(caught.value)


def test_calls_that_fit_are_told():
    source = CLASS + "return self.module(x, fp8_output=False)"
    assert [(bound.line, bound.target) for bound in bind_calls(source)] == [
        (3, "transformer_engine.pytorch.Linear"),
        (5, "transformer_engine.pytorch.Linear.forward"),
    ]


@needs_te
def test_the_signatures_are_those_of_the_installed_package():
    import importlib.metadata

    found = importlib.metadata.distribution("transformer-engine")
    sources = make_signatures.Sources.of_folder(Path(found.locate_file("")), found.version.partition("+")[0])
    assert make_signatures.make(sources) == SIGNATURES
