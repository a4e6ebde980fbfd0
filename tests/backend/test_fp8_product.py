"""The three GEMMs of a product in FP8 against the same written out block by block, and what is kept, recorded and left alone."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from megagate.backend.base import KeepsState, Part
from megagate.backend.fp8.backend import EmulatedBackend
from megagate.backend.fp8.product import Fp8Product
from megagate.backend.native import NativeBackend
from megagate.config.run import Fp8Config
from megagate.parallel.mesh import ParallelMesh

CPU, MESH = torch.device("cpu"), ParallelMesh.single()
RECIPES = ("delayed", "current", "blockwise", "mxfp8")
TOP = {"e4m3": 448.0, "e5m2": 57344.0}
ENDS = [64, 64, 256, 288]  # experts with 64, 0, 192 and 32 rows


def backend(recipe: str, **config) -> EmulatedBackend:
    return EmulatedBackend(NativeBackend(CPU), Fp8Config(recipe, emulate=True, **config), device=CPU, mesh=MESH)


def numbers(key: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers whose rows and columns are of different sizes, so that every block has a scale of its own.

    Every third row and every fifth column is so small that it vanishes beside a larger one. Scales that are powers of two would hardly show
    else which numbers have one together: a power of two more or less changes no digit.
    """
    generator = torch.Generator().manual_seed(key)
    sizes = torch.logspace(-1, 1, shape[-1]) * torch.logspace(-1, 1, shape[-2])[:, None].flip(0)
    sizes[..., ::5] *= 2.0**-22
    sizes[..., ::3, :] *= 2.0**-22
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def blocks(recipe: str, name: str, over: str, shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """The blocks with a scale of their own: `over` rows or columns of the matrix runs the sum of the GEMM that it goes into."""
    high, wide = shape
    if recipe in ("delayed", "current"):
        tile = (high, wide)
    elif recipe == "blockwise" and name == "weight":
        tile = (128, 128)
    else:
        length = 128 if recipe == "blockwise" else 32
        tile = (1, length) if over == "columns" else (length, 1)
    for row in range(0, high, tile[0]):
        for column in range(0, wide, tile[1]):
            yield slice(row, row + tile[0]), slice(column, column + tile[1])


def rounded(x: Tensor, recipe: str, name: str, over: str, scale: float | None = None) -> Tensor:
    """x as FP8 holds it, in fp64; written out. `scale` is delayed scaling's."""
    x, out = x.double(), torch.empty(x.shape, dtype=torch.float64)
    fp8 = "e5m2" if name == "grad" and recipe in ("delayed", "current") else "e4m3"
    kind = torch.float8_e4m3fn if fp8 == "e4m3" else torch.float8_e5m2
    for block in blocks(recipe, name, over, x.shape):
        most = x[block].abs().max()
        if recipe == "delayed":
            by = torch.tensor(scale)
        elif most == 0:
            by = torch.ones(())
        elif recipe == "current":
            by = torch.div(TOP[fp8], most.float())
        else:
            by = torch.exp2(torch.log2(TOP[fp8] / most).floor()).float()
        scaled = x[block].float() * by  # in fp32, which decides on which side of a tie a number lies
        out[block] = scaled.clamp(-TOP[fp8], TOP[fp8]).to(kind).double() / by.double()
    return out


def written_out(x: Tensor, weight: Tensor, grad: Tensor, recipe: str, scales: dict[str, float]) -> list[tuple[Tensor, Tensor]]:
    """y, dx and dw of one matrix product, and how large each sum would be if nothing cancelled."""

    def q(t: Tensor, name: str, over: str) -> Tensor:
        return rounded(t, recipe, name, over, scales.get(name))

    operands = [
        (q(x, "input", "columns"), q(weight, "weight", "columns").T),
        (q(grad, "grad", "columns"), q(weight, "weight", "rows")),
        (q(grad, "grad", "rows").T, q(x, "input", "rows")),
    ]
    return [(a @ b, a.abs() @ b.abs()) for a, b in operands]


def preset(site: Fp8Product, scales: dict[str, list[float]]) -> None:
    for name, operand in site.delayed().items():
        operand.scale.copy_(torch.tensor(scales[name]))


def assert_products(made: list[Tensor], wanted: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    to = 1e-6 if dtype == torch.float32 else 2**-8
    for name, mine, (other, size) in zip(("y", "dx", "dw"), made, wanted, strict=True):
        assert mine.dtype == dtype, name
        assert ((mine.double() - other).abs() <= to * size).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dense_product_is_of_rounded_operands(recipe: str, dtype: torch.dtype) -> None:
    x, weight, grad = numbers(0, 111, 160, dtype=dtype), numbers(1, 144, 160, dtype=dtype), numbers(2, 111, 144, dtype=dtype)
    scales = {"input": [3.0], "weight": [40.0], "grad": [500.0]}
    site = backend(recipe).row_linear(160, 144, tp=MESH.tp)
    preset(site, scales)
    leaves = [x.view(3, 37, 160).clone().requires_grad_(), weight.clone().requires_grad_()]
    y = site(*leaves)
    dx, dw = torch.autograd.grad(y, leaves, grad.view(3, 37, 144))
    wanted = written_out(x, weight, grad, recipe, {name: value for name, (value,) in scales.items()})
    assert_products([y.flatten(0, 1), dx.flatten(0, 1), dw], wanted, dtype)
    plain = [x.double() @ weight.double().T, grad.double() @ weight.double(), grad.double().T @ x.double()]
    assert all((a - b).abs().max() > 1e-3 * b.abs().max() for (a, _), b in zip(wanted, plain, strict=True)), "rounding shows"


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_are_rounded_each_for_itself_and_one_may_have_no_rows(recipe: str) -> None:
    x, weight, grad = numbers(0, 288, 96), numbers(1, 4, 80, 96), numbers(2, 288, 80)
    weight *= torch.tensor([1.0, 7.0, 50.0, 0.1])[:, None, None]
    # So far apart that an expert's numbers would vanish in a block with those of the next.
    sizes = torch.tensor([2.0**-24, 1.0, 1.0, 2.0**24])
    of_rows = sizes.repeat_interleave(torch.tensor([64, 0, 192, 32]))[:, None]
    x, grad = x * of_rows, grad * of_rows
    scales = {"input": [3.0, 1.0, 2.0, 40.0], "weight": [40.0, 9.0, 1.0, 300.0], "grad": [500.0, 1.0, 700.0, 9000.0]}
    scales |= {name: (torch.tensor(scales[name]) / sizes).tolist() for name in ("input", "grad")}
    site = backend(recipe).grouped_linear(96, 80, num_experts=4, mesh=MESH)
    preset(site, scales)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = site(*leaves, torch.tensor(ENDS, dtype=torch.int32))
    dx, dw = torch.autograd.grad(y, leaves, grad)
    begin = 0
    for expert, end in enumerate(ENDS):
        rows, begin = slice(begin, end), end
        if rows.start == rows.stop:
            assert not dw[expert].any(), "no rows, no gradient"
            continue
        own = {name: values[expert] for name, values in scales.items()}
        wanted = written_out(x[rows], weight[expert], grad[rows], recipe, own)
        assert_products([y[rows], dx[rows], dw[expert]], wanted, torch.float32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_expert_may_have_rows(recipe: str) -> None:
    made = backend(recipe)
    model = nn.Module()
    model.project = made.grouped_linear(96, 80, num_experts=2, mesh=MESH)
    x, weight = torch.zeros(0, 96, requires_grad=True), numbers(1, 2, 80, 96).requires_grad_()
    y = model.project(x, weight, torch.zeros(2, dtype=torch.int32))
    y.sum().backward()
    made.after_backward(model)
    assert y.shape == (0, 80) and not weight.grad.any() and x.grad.shape == (0, 96)
    assert all(not s.history.any() and s.scale.eq(1).all() for name, s in model.project.delayed().items() if name != "weight")


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_padding_do_not_matter(recipe: str) -> None:
    site = backend(recipe).grouped_linear(96, 80, num_experts=2, mesh=MESH)
    weight, places = numbers(1, 2, 80, 96), torch.cat([torch.arange(64), torch.arange(96, 256)])
    results = []
    for padded in (False, True):
        x, grad, ends = numbers(0, 224, 96), numbers(2, 224, 80), [64, 224]
        if padded:
            x, grad, ends = (*(torch.zeros(288, t.shape[1]).index_copy(0, places, t) for t in (x, grad)), [96, 288])
        leaves = [x.requires_grad_(), weight.clone().requires_grad_()]
        y = site(*leaves, torch.tensor(ends, dtype=torch.int32))
        dx, dw = torch.autograd.grad(y, leaves, grad)
        results.append([y[places], dx[places], dw] if padded else [y, dx, dw])
    for bare, with_padding in zip(*results, strict=True):
        torch.testing.assert_close(with_padding, bare, rtol=1e-6, atol=1e-6 * bare.abs().max().item())


@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_kept_and_gradients_are_not_rounded(recipe: str) -> None:
    kept: list[Tensor] = []
    site = backend(recipe).row_linear(256, 128, tp=MESH.tp)
    x, weight = numbers(0, 1, 128, 256).requires_grad_(), numbers(1, 128, 256).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = site(x, weight)
    wide = sum(t.nbytes for t in kept if t.dtype == torch.float32)
    assert sum(t.nbytes for t in kept if t.dtype == torch.float8_e4m3fn) == x.numel() + weight.numel()
    assert wide <= (x.numel() + weight.numel()) * 4 / (32 if recipe == "mxfp8" else 128) and len(kept) == 4
    y.backward(numbers(2, 1, 128, 128))
    for grad in (x.grad, weight.grad):
        assert grad.dtype == torch.float32 and grad.unique().numel() > grad.numel() // 2, "more values than FP8 has"


def test_the_gate_stays_out_unless_asked_in_and_other_logits_always_do() -> None:
    parts = [Part("q", 64), Part("k", 32), Part("router", 4, "logits"), Part("gate", 64, "gate")]
    x, weights = numbers(0, 2, 16, 64), [numbers(1 + i, part.rows, 64) for i, part in enumerate(parts)]
    exact = [x.flatten(0, 1) @ w.T for w in weights]
    for keep, rounds in ((("gate",), {"q", "k"}), ((), {"q", "k", "gate"})):
        site = backend("current", keep_high_precision=("embedding", "head", "router", *keep)).column_linears(64, parts, tp=MESH.tp)
        outputs, normed = site(x, weights)
        assert normed is x
        joined = torch.cat([w for w, part in zip(weights, parts, strict=True) if part.name in rounds])
        rounded_joined = rounded(joined, "current", "weight", "columns").split([p.rows for p in parts if p.name in rounds])
        by_name = dict(zip([p.name for p in parts if p.name in rounds], rounded_joined, strict=True))
        for part, out, plain in zip(parts, outputs, exact, strict=True):
            if part.name not in rounds:
                torch.testing.assert_close(out.flatten(0, 1), plain)
                continue
            wanted = rounded(x.flatten(0, 1), "current", "input", "columns") @ by_name[part.name].T
            assert (out.flatten(0, 1) - wanted).abs().max() < 1e-6 * wanted.abs().max(), "one scale for all that are rounded"
            assert (out.flatten(0, 1) - plain).abs().max() > 1e-3 * wanted.abs().max()
    high = backend("current").column_linears(64, parts[2:], tp=MESH.tp)
    assert not isinstance(high, nn.Module), "nothing to round: the native site"


def test_first_and_last_blocks_may_stay_out() -> None:
    def of_layers(*keep: str) -> list[bool]:
        made = backend("current", keep_high_precision=("embedding", "head", "router", *keep))
        return [isinstance(made.of_layer(i, 3), EmulatedBackend) for i in range(3)]

    assert of_layers() == [True, True, True]
    assert of_layers("first_layers") == [False, True, True]
    assert of_layers("first_layers", "last_layers") == [False, True, False]


def test_rows_of_experts_are_padded_to_what_the_recipe_takes() -> None:
    class Gpu(NativeBackend):
        def __init__(self) -> None:
            self.row_multiple = 16

    made = {r: EmulatedBackend(Gpu(), Fp8Config(r, emulate=True), device=CPU, mesh=MESH).row_multiple for r in RECIPES}
    assert made == {"delayed": 16, "current": 16, "blockwise": 16, "mxfp8": 32}


def one_site(backend: EmulatedBackend) -> tuple[nn.Module, Fp8Product]:
    model = nn.Module()
    model.project = backend.row_linear(64, 32, tp=MESH.tp)
    return model, model.project


def test_delayed_scaling_moves_after_the_backward_pass_alone_and_records_nothing_without_gradients() -> None:
    made = backend("delayed", amax_history=3)
    model, site = one_site(made)
    weight, states = numbers(1, 32, 64).requires_grad_(), list(site.delayed().values())
    with torch.no_grad():
        site(numbers(0, 1, 16, 64), weight)
    made.after_backward(model)
    assert all(not s.history.any() and s.scale == 1 for s in states), "an evaluation leaves no trace"
    amaxes, kept = [], site.kept_state()
    for step in range(5):
        before = [s.scale.clone() for s in states]
        each = []
        for part in range(2):  # a second call in one micro-step, as of a part that is computed again: the larger one counts
            x, grad = numbers(10 + step + 40 * part, 1, 16, 64), numbers(20 + step + part, 1, 16, 32)
            site(x, weight).backward(grad)
            each.append(torch.stack([t.detach().abs().max() for t in (x, weight, grad)]))
        assert all(torch.equal(s.scale, b) for s, b in zip(states, before, strict=True))
        made.after_backward(model)
        amaxes.append(torch.stack(each).amax(0))
        window = torch.stack(amaxes[-3:]).amax(0)
        for state, most, top in zip(states, window, (448.0, 448.0, 57344.0), strict=True):
            torch.testing.assert_close(state.scale, (top / most).view(1))
    live = [tensor for state in states for tensor in (state.history[0], state.scale)]
    assert all(torch.equal(k.tensor, tensor) for k, tensor in zip(kept, live, strict=True)), "what is kept is the state itself, not a copy"


def test_an_amax_that_is_no_size_leaves_the_scale() -> None:
    made = backend("delayed", amax_history=4)
    model, site = one_site(made)
    weight, state = numbers(1, 32, 64).requires_grad_(), site.operands["input"]
    x = numbers(0, 1, 16, 64)
    for spoil, history in ((None, 1), (torch.nan, 1), (torch.inf, 2)):
        if spoil is not None:
            x = x.clone().index_fill_(2, torch.tensor([5]), spoil)
        site(x, weight).sum().backward(retain_graph=False)
        made.after_backward(model)
        torch.testing.assert_close(state.scale, (448.0 / numbers(0, 1, 16, 64).abs().max()).view(1))
        assert (state.history != 0).sum() == history and not state.history.isnan().any()


def test_state_is_of_the_site_and_of_no_state_dict() -> None:
    model, site = one_site(backend("delayed", amax_history=7))
    assert isinstance(site, KeepsState) and not model.state_dict() and not list(model.buffers()) and not list(model.parameters())
    kept = site.kept_state()
    wanted = [(f"{name}.{what}", shape) for name in ("input", "weight", "grad") for what, shape in (("history", (7,)), ("scale", (1,)))]
    assert [(k.name, tuple(k.tensor.shape)) for k in kept] == [(k.name, k.shard.full_shape) for k in kept] == wanted
    kept[1].tensor.fill_(32.0)
    assert site.operands["input"].scale.tolist() == [32.0], "live: loading copies into it"
    grouped = backend("delayed", amax_history=7).grouped_linear(64, 32, num_experts=4, mesh=MESH)
    assert [k.shard.full_shape for k in grouped.kept_state()[:2]] == [(4, 7), (4,)]
    assert all(not backend(recipe).row_linear(64, 32, tp=MESH.tp).kept_state() for recipe in RECIPES[1:])
