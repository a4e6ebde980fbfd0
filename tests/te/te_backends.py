"""The backends that the tests through Transformer Engine's layer compare; made in ranks."""

from dataclasses import replace

from parity.sharded import BACKEND, CPU

from megagate.backend.base import Backend
from megagate.config.run import Fp8Config, PrecisionConfig
from megagate.parallel.mesh import ParallelMesh

IN_ANOTHER_ORDER = ("attention_core", "choose", "permute", "unpermute")
"""What TE computes in another order than PyTorch."""


def te_backend(mesh: ParallelMesh, fp8: Fp8Config | None = None, *, own: tuple[str, ...] = (), gives_normed: bool = False) -> Backend:
    """TE's; of what it computes in another order, it has its `own`, and the native backend's for the rest.

    With `gives_normed` all norms are also given in bf16, so that delayed scaling rounds that to FP8, as the emulation does, and not the
    norm's own fp32.
    """
    from megagate.backend.te import TransformerEngineBackend

    precision = PrecisionConfig(dtype="bf16", backend="te", fp8=fp8 or Fp8Config())
    backend = TransformerEngineBackend(precision, device=CPU, mesh=mesh, norm=BACKEND.norm)
    backend.row_multiple = BACKEND.row_multiple  # so that experts' products have the same shapes
    for name in set(IN_ANOTHER_ORDER) - set(own):
        setattr(backend, name, getattr(BACKEND, name))
    if gives_normed:
        made = backend.column_linears
        backend.column_linears = lambda *args, **kwargs: made(*args, **kwargs | {"gives_normed": True})
    return backend


def emulated_backend(mesh: ParallelMesh, fp8: Fp8Config) -> Backend:
    """Emulated FP8."""
    from megagate.backend.fp8.backend import EmulatedBackend

    return EmulatedBackend(BACKEND, replace(fp8, emulate=True), device=CPU, mesh=mesh)
