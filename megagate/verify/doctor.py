"""The doctor: a user's layout against one process on plain PyTorch, in a minute."""

from dataclasses import dataclass, replace

import torch

from megagate.backend.build import build_backend
from megagate.config.hardware import Hardware
from megagate.config.rules import check
from megagate.config.run import Fp8Config, Fp8Recipe, RunConfig
from megagate.engine.reference import ReferenceEngine
from megagate.engine.zero import ZeroEngine
from megagate.errors import RunError
from megagate.parallel.comm import gather_objects
from megagate.parallel.mesh import ParallelMesh
from megagate.parallel.spawn import RankContext
from megagate.verify.account import account
from megagate.verify.diagnosis import Diagnosis, diagnose
from megagate.verify.faults import check_fault, inject
from megagate.verify.routes import pin_routes, watched_routes
from megagate.verify.shrink import fit_layout, shrink
from megagate.verify.trial import Outcome, batch, build_model, reference_config, run_trial

SEEDS = 20
"""To try for a run in which no route is near a tie; in bf16, where rounding is too large for that, routes are pinned."""
SMALLEST_GAP = 1e-5
"""Between router logits around the choice; the doctor's small models know theirs to about 1e-6."""


@dataclass(frozen=True)
class Order:
    """What every rank is told to do.

    Args:
        config: The shrunken run, its precision resolved.
        asked: Layout of the user's run, (tp, ep); the run's own where it fits.
        world_size: Ranks.
        fault: Name of a fault to put in, or empty.
        left_out: The run's recipe of FP8, which is not part of the examination: FP8 has steps, so that two sound layouts drift apart.
    """

    config: RunConfig
    asked: tuple[int, int]
    world_size: int
    fault: str = ""
    left_out: Fp8Recipe = "none"

    @property
    def reduced(self) -> bool:
        """Whether the layout had to be made smaller than the user's."""
        return self.asked != (self.config.parallel.tp, self.config.parallel.ep)


def order(config: RunConfig, *, world_size: int, gpu: bool, fault: str = "", hardware: Hardware | None = None) -> Order:
    """What to do for a user's run on `world_size` ranks; its kernels stay, in the precision that they have without FP8.

    Args:
        config: The user's run.
        world_size: Number of ranks.
        gpu: Whether they have GPUs, which decides `precision.dtype: auto`.
        fault: Name of a fault to put in, or empty.
        hardware: Of this rank; None does not ask.

    Raises:
        ConfigError: The layout cannot exist on that many ranks, the fault cannot show there, or the hardware lacks what the kernels need.
    """
    dtype = config.precision.dtype
    resolved = replace(config, precision=replace(config.precision, dtype=("bf16" if gpu else "fp32") if dtype == "auto" else dtype))
    fitted = fit_layout(resolved, world_size=world_size)
    check(fitted, world_size=world_size, hardware=hardware)
    small = shrink(replace(fitted, precision=replace(fitted.precision, fp8=Fp8Config())), world_size=world_size)
    check(small, world_size=world_size)
    if fault:
        check_fault(fault, small, world_size=world_size)
    return Order(small, (config.parallel.tp, config.parallel.ep), world_size, fault, left_out=config.precision.fp8.recipe)


def examine_local(context: RankContext, order: Order) -> Diagnosis | None:
    """`examine` in a rank of `parallel/spawn.py`, on the CPU."""
    return examine(order, device=torch.device("cpu"))


def examine(order: Order, *, device: torch.device) -> Diagnosis | None:
    """Run the trial on this rank. Collective, in a default process group; the first rank gets the diagnosis, the others None."""
    config = order.config
    mesh = ParallelMesh.build(tp=config.parallel.tp, ep=config.parallel.ep)
    references = _References.make(config, dp=mesh.dp.size, device=device) if mesh.world.rank == 0 else None
    seed = gather_objects(references.seed if references else None, mesh.world)[0]
    model = build_model(config, mesh, backend=build_backend(config.precision, device=device, mesh=mesh), device=device, seed=seed)
    if config.precision.dtype == "bf16":
        pin_routes(model, mesh)
    engine = ZeroEngine(model, config, mesh)
    if order.fault:
        inject(order.fault, engine)
    outcome = run_trial(engine, seed=seed, device=device)
    sent = account(engine, *batch(config, mesh, seed=seed, step=0, device=device))
    outcomes = gather_objects(outcome, mesh.world)
    if references is None:
        return None
    return diagnose(config, mesh, outcomes, references.outcome, fp32=references.fp32, sent=sent)


@dataclass(frozen=True)
class _References:
    """The same steps in one process.

    Args:
        seed: Of weights and tokens, chosen so that no route is near a tie.
        outcome: In the run's precision.
        fp32: In fp32, where the run's is another; else None.
    """

    seed: int
    outcome: Outcome
    fp32: Outcome | None

    @classmethod
    def make(cls, config: RunConfig, *, dp: int, device: torch.device) -> "_References":
        """Look for a seed, and run.

        Raises:
            RunError: No seed was found.
        """
        own = reference_config(config, dp=dp)
        if own.precision.dtype == "bf16":
            fp32 = replace(own, precision=replace(own.precision, dtype="fp32", backend="native", norm="native"))
            outcome, exact = (_run_reference(one, seed=0, device=device, pinned=True)[0] for one in (own, fp32))
            return cls(0, outcome, exact)
        for seed in range(SEEDS):
            outcome, gap = _run_reference(own, seed=seed, device=device)
            if gap > SMALLEST_GAP:
                return cls(seed, outcome, None)
        raise RunError(
            f"none of {SEEDS} seeds gave a run of {dp} data-parallel ranks without near ties; run the doctor on fewer ranks, or in bf16"
        )


def _run_reference(config: RunConfig, *, seed: int, device: torch.device, pinned: bool = False) -> tuple[Outcome, float]:
    """On this process alone; also the smallest gap of its routes."""
    mesh = ParallelMesh.single()
    model = build_model(config, mesh, backend=build_backend(config.precision, device=device, mesh=mesh), device=device, seed=seed)
    if pinned:
        pin_routes(model, mesh)
    with watched_routes(model) as gaps:
        outcome = run_trial(ReferenceEngine(model, config, mesh), seed=seed, device=device)
    return outcome, min(gaps, default=float("inf"))
