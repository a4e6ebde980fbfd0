"""The doctor of kernels: another backend, or emulated FP8, beside plain PyTorch in the same layout, product by product.

Three levels. Every product (`products.py`, bands by `bands.py`), and every attention and feed-forward (`parts.py`, bands by `noise.py`), is
fed the numbers of one pass of the reference, so that errors do not add up over what is compared; then the whole model. Routes are pinned,
since rounding may flip one.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megagate.backend.base import Backend
from megagate.backend.build import build_backend
from megagate.config.hardware import Hardware, hardware_rules
from megagate.config.rules import check
from megagate.config.run import Fp8Config, PrecisionConfig, RunConfig
from megagate.data.loader import IGNORE_INDEX
from megagate.errors import ConfigError
from megagate.model.lm import LanguageModel
from megagate.nn.base import named_labels
from megagate.parallel.comm import gather_objects
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.bands import Band, Bands, of_kernel, of_product
from megagate.verify.cells import QUANTITIES, Level, PrecisionFindings, RecipeFindings, Sums, causes_of, distance, rows_of, square, sums_of
from megagate.verify.noise import NoisyBackend, Rule
from megagate.verify.parts import PartCall, Results, recorded_parts, through_model, through_part
from megagate.verify.precision_faults import check_precision_fault, inject_precision_fault
from megagate.verify.products import Passed, Watched, WatchedBackend, product_of, through, watch_norms, watched_products
from megagate.verify.routes import pin_routes
from megagate.verify.shrink import FOR_FP8, fit_layout, shrink
from megagate.verify.trial import batch, build_model

Examined = Literal["te", "emulated"]
HIGH = "bf16"
"""The recipe that is none: the backend's kernels without FP8."""
RECIPES = ("delayed", "current", "blockwise", "mxfp8")
DRAWS = 3
"""Of noise, averaged."""
NOISE_FACTOR = 2.0
"""Between rounding and noise of its usual size, either way: formats' own range of relative errors is sqrt(2) to each side."""
TINY = 1e-6
"""Relative: sums in another order differ by less in fp32, and no band is narrower."""
EXPERT_FACTORS = (1.0, 1.7, 3.0, 0.6)
"""Of the weights of experts by turns, so that one's scale is not another's."""
CHANNEL_FACTORS = (1.0, 2.5, 0.4, 1.5)
"""Of norms' weights, in runs of 32 channels: blocks differ, too."""
CHANNELS = 32


@dataclass(frozen=True)
class PrecisionOrder:
    """What every rank is told to do.

    Args:
        config: The shrunken run, its dtype resolved.
        asked: Layout of the user's run, (tp, ep).
        world_size: Ranks.
        examined: What is compared with plain PyTorch.
        recipes: To go through; `bf16` is the backend without FP8.
        fault: Name of a fault to put in, or empty.
    """

    config: RunConfig
    asked: tuple[int, int]
    world_size: int
    examined: Examined
    recipes: tuple[str, ...]
    fault: str = ""

    @property
    def reduced(self) -> bool:
        """Whether the layout had to be made smaller than the user's."""
        return self.asked != (self.config.parallel.tp, self.config.parallel.ep)


def precision_order(
    config: RunConfig,
    *,
    world_size: int,
    gpu: bool,
    examined: Examined,
    recipes: tuple[str, ...] = (),
    fault: str = "",
    hardware: Hardware | None = None,
) -> PrecisionOrder:
    """What to do for a user's run on `world_size` ranks.

    Args:
        config: The user's run, which must be possible; its own backend and recipe are not what is compared.
        world_size: Number of ranks.
        gpu: Whether they have GPUs, which decides `precision.dtype: auto`.
        examined: What is compared with plain PyTorch.
        recipes: To go through; by default all that the hardware has.
        fault: Name of a fault to put in, or empty.
        hardware: Of this rank; None does not ask.

    Raises:
        ConfigError: The run is none, or the layout, a recipe or the fault cannot be had there.
    """
    dtype, fp8 = config.precision.dtype, config.precision.fp8
    fitted = fit_layout(config, world_size=world_size)
    check(fitted, world_size=world_size)  # with its own precision, for any hardware: what is compared is another
    plain = replace(config.precision, backend="native", fp8=replace(fp8, recipe="none", emulate=False))
    resolved = replace(fitted, precision=replace(plain, dtype=("bf16" if gpu else "fp32") if dtype == "auto" else dtype))
    kept = len({"first_layers", "last_layers"} & set(fp8.keep_high_precision))
    small = shrink(resolved, world_size=world_size, sizes=replace(FOR_FP8, kept=kept))
    known = RECIPES if examined == "emulated" else (HIGH, *RECIPES)
    runs = {recipe: replace(small, precision=precision_of(small.precision, examined, recipe)) for recipe in known}
    unknown = [recipe for recipe in recipes if recipe not in known]
    if unknown:
        raise ConfigError(f"--recipe {unknown[0]} is not one of {', '.join(known)} with --backend {examined}; choose of these")
    has = [name for name, run in runs.items() if name == HIGH or hardware is None or not any(hardware_rules(run, hardware))]
    asked = recipes or tuple(has)
    for recipe in asked:
        check(runs[recipe], world_size=world_size, hardware=hardware)
    if fault:
        check_precision_fault(fault, small, asked, world_size=world_size)
    return PrecisionOrder(small, (config.parallel.tp, config.parallel.ep), world_size, examined, asked, fault)


def precision_of(precision: PrecisionConfig, examined: Examined, recipe: str) -> PrecisionConfig:
    """The precision of a run that is compared with plain PyTorch."""
    emulate = examined == "emulated"
    fp8 = replace(precision.fp8, recipe="none" if recipe == HIGH else recipe, emulate=emulate)
    return replace(precision, backend="native" if emulate else "te", fp8=fp8)


def examine_precision_local(context: RankContext, order: PrecisionOrder) -> PrecisionFindings | None:
    """`examine_precision` in a rank of `parallel/spawn.py`, on the CPU."""
    return examine_precision(order, device=torch.device("cpu"))


def examine_precision(
    order: PrecisionOrder, *, device: torch.device, build: Callable[..., Backend] = build_backend, seed: int = 0
) -> PrecisionFindings | None:
    """Compare on this rank. Collective, in a default process group; the first rank gets the findings, the others None.

    Args:
        order: What to do.
        device: Of this rank.
        build: Makes the backend that is examined.
        seed: Of weights and tokens.

    Raises:
        ConfigError: The ranks were not told the same, as on machines with other hardware, or with other files.
    """
    _require_same(gather_objects(order, ParallelMesh.build(tp=1, ep=1).world))  # before groups are made of it
    parallel = order.config.parallel
    mesh = ParallelMesh.build(tp=parallel.tp, ep=parallel.ep)
    reference = _Reference(order.config, mesh, device, seed)
    found = []
    for recipe in order.recipes:
        precision = precision_of(order.config.precision, order.examined, recipe)
        run = replace(order.config, precision=precision)
        other = _model(run, mesh, build(precision, device=device, mesh=mesh), device, seed)
        if order.fault:
            inject_precision_fault(order.fault, other, precision.fp8)
        found.append(_compare(reference, other, run, recipe))
    return PrecisionFindings(found, [cause for one in found for cause in causes_of(one)]) if mesh.world.rank == 0 else None


def _require_same(orders: list[PrecisionOrder]) -> None:
    """Ranks that compare other things would wait for each other."""
    ranks_of: dict[str, list[int]] = {}
    for rank, order in enumerate(orders):
        ranks_of.setdefault(", ".join(order.recipes), []).append(rank)
    if len(ranks_of) > 1:
        found = "; ".join(f"{recipes} (ranks {', '.join(map(str, ranks))})" for recipes, ranks in ranks_of.items())
        raise ConfigError(f"recipes to compare must be the same on all ranks, they are {found}; name with --recipe what all hardware has")
    others = [str(rank) for rank, order in enumerate(orders) if order != orders[0]]
    if others:
        raise ConfigError(
            f"the run must be the same on all ranks, but on ranks {', '.join(others)} it is not that of rank 0; give all machines the same "
            "files and options, and set precision.dtype where only some have GPUs"
        )


def _model(config: RunConfig, mesh: ParallelMesh, backend: Backend, device: torch.device, seed: int) -> LanguageModel:
    """The same weights for every backend, with scales that differ between experts and between blocks of channels."""
    model = build_model(config, mesh, backend=backend, device=device, seed=seed)
    with torch.no_grad():
        for label, parameter in zip(named_labels(model).values(), model.parameters(), strict=True):
            if label.stacked:
                for e, weight in enumerate(parameter, label.shard.offset[0]):
                    weight *= EXPERT_FACTORS[e % len(EXPERT_FACTORS)]
            elif label.init == "ones":
                runs = torch.arange(len(parameter), device=device) // CHANNELS
                parameter *= torch.tensor(CHANNEL_FACTORS, device=device, dtype=parameter.dtype)[runs % len(CHANNEL_FACTORS)]
    pin_routes(model, mesh)
    return model


class _Reference:
    """One pass of plain PyTorch: the numbers that everything is fed with."""

    def __init__(self, config: RunConfig, mesh: ParallelMesh, device: torch.device, seed: int):
        self.mesh, self.device, self.seed = mesh, device, seed
        self.config = replace(config, train=replace(config.train, recompute=False))  # each product is then called once
        self.model = _model(self.config, mesh, WatchedBackend(device), device, seed)
        norms = watch_norms(self.model)
        tokens, labels = batch(config, mesh, seed=seed, step=0, device=device)
        # Every token gets a target, so that gradients come back to all of them, on all ranks.
        self.tokens, self.labels = tokens[0], labels[0].where(labels[0] != IGNORE_INDEX, tokens[0])
        with recorded_parts(self.model) as calls:
            self.results, self.loss = through_model(self.model, self.tokens, self.labels)
        self.calls: dict[str, PartCall] = calls
        self.products: dict[str, Watched] = watched_products(self.model) | norms
        self.part_results = self.parts(self.model)

        self.own = self.noise(Rule(Fp8Config()), draws=1)

    def noise(self, rule: Rule, *, draws: int = DRAWS) -> list[tuple[Results, Results]]:
        """What parts, and the whole model, yield with noise of the size of a recipe's rounding."""
        found = []
        for draw in range(draws):
            generator = torch.Generator(device=self.device).manual_seed(1000 * draw + self.mesh.world.rank)
            model = _model(self.config, self.mesh, NoisyBackend(self.device, rule, generator), self.device, self.seed)
            found.append((self.parts(model), through_model(model, self.tokens, self.labels)[0]))
        return found

    def parts(self, model: LanguageModel) -> Results:
        """What the parts of a model yield from the reference's numbers."""
        return {key: tensor for name, call in self.calls.items() for key, tensor in through_part(model, name, call).items()}


def _compare(reference: _Reference, other: LanguageModel, config: RunConfig, recipe: str) -> RecipeFindings:
    """All levels of one recipe."""
    if recipe == "delayed":
        for _ in _products(reference, other, config):
            pass  # its scales are those of the pass before
        other.backend.after_backward(other)
    sums = list(_products(reference, other, config))
    noise = reference.noise(Rule(config.precision.fp8)) if recipe != HIGH else reference.own
    parts, whole = ([*(both[i] for both in noise)] for i in (0, 1))
    sums += _noise_sums("part", reference.parts(other), reference.part_results, parts, reference.own[0][0])
    results, loss = through_model(other, reference.tokens, reference.labels)
    sums += _noise_sums("model", results, reference.results, whole, reference.own[0][1])
    ranks = gather_objects(sums, reference.mesh.world)
    return RecipeFindings(recipe, rows_of(ranks), (loss, reference.loss))


def _products(reference: _Reference, other: LanguageModel, config: RunConfig) -> Iterator[Sums]:
    ours, fp8 = reference.model, config.precision.fp8
    for name, watched in reference.products.items():
        kind, call = watched.kind, watched.call
        if kind == "norm":
            bands = of_kernel(kind, ours.get_submodule(name), call, backend=ours.backend)
            passed = [through(kind, model.get_submodule(name), call, backend=model.backend) for model in (ours, other)]
            quantised: set[str] = set()
        else:
            norms = [model.get_submodule(call.norm) if call.norm else None for model in (ours, other)]
            quantised = _quantised(watched, name, fp8=Rule(fp8), blocks=config.model.num_layers)
            if kind == "attention":
                bands = of_kernel(kind, watched.site, call, backend=ours.backend)
            else:
                how = {"recipe": fp8.recipe, "quantised": quantised, "norm": norms[0]}
                bands = of_product(kind, watched.site, call, backend=ours.backend, **how)
            sites = (watched.site, product_of(other, name))
            models = (ours, other)
            passed = [
                through(kind, site, call, backend=model.backend, norm=norm)
                for site, model, norm in zip(sites, models, norms, strict=True)
            ]
        yield from _product_sums(name, passed, bands, quantised, grouped=kind == "grouped")


def _quantised(watched: Watched, name: str, *, fp8: Rule, blocks: int) -> set[str]:
    """The weights of a product that are in FP8."""
    rule = replace(fp8, index=int(name.split(".")[1]), blocks=blocks)
    if watched.kind == "column":
        return {part.name for part in watched.parts if rule.quantised(part)}
    return set(watched.call.weights) if rule.block and watched.kind != "attention" else set()


def _product_sums(name: str, passed: list[Passed], bands: Bands, quantised: set[str], *, grouped: bool) -> Iterator[Sums]:
    for quantity, ours, theirs, band in zip(QUANTITIES, *passed, bands, strict=True):
        for detail in ours:
            # An input's gradient is of all weights; a norm's weight gets its gradient through them.
            own = quantity == "output" or (quantity == "weight gradient" and detail != "norm")
            fp8 = bool(quantised) if grouped or not own or detail == "" else detail in quantised
            yield sums_of("product", name, fp8, quantity, detail, theirs[detail], ours[detail], band[detail])


def _noise_sums(level: Level, results: Results, expected: Results, draws: list[Results], own: Results) -> Iterator[Sums]:
    """Beside noise of the recipe's size, and without a lower edge where that is no more than that of the dtype."""
    for key, wanted in expected.items():
        name, quantity, detail = key
        noise, least = sum(distance(draw[key], wanted) for draw in draws) / len(draws), distance(own[key], wanted)
        fp8 = noise > 16 * least
        floor = TINY**2 * square(wanted)
        band = Band(noise / NOISE_FACTOR**2 if fp8 else 0.0, noise * (NOISE_FACTOR if fp8 else 2 * NOISE_FACTOR) ** 2 + floor)
        if key in results:
            yield sums_of(level, name, False, quantity, detail, results[key], wanted, band)
        else:
            yield Sums(level, name, False, quantity, f"{detail} is missing", math.inf, square(wanted), band)
