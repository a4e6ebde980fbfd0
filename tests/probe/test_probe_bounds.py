"""What looking may not do: wait for the device, or hold much more than the forward pass already does."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megagate.backend.documents import Documents
from megagate.config.model import AttentionConfig, GateConfig, ModelConfig, MoEConfig
from megagate.parallel.mesh import ParallelMesh
from megagate.probe.attention import BLOCK_ELEMENTS
from megagate.probe.probe import Probe
from megagate.probe.taps import Seen

MODEL = ModelConfig(
    hidden_size=2048,
    num_layers=1,
    attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, gate=GateConfig("G1")),
    moe=MoEConfig(num_experts=128, top_k=8, ffn_size=768),
)
"""A block of the paper's 15A2B."""
MEGABYTE = 2**20


class Watched(TorchDispatchMode):
    """Measures what operations make, in bytes, the largest tensor and all that live at once; refuses those that wait for a device.

    What waits is refused by its name, and, on tensors of the device `meta`, which hold no numbers, by failing whatever its name.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most = 0
        self.alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        assert name not in self.WAITS, f"{name} waits for the device"
        if name in ("index", "index_put_", "index_put"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask waits for the device"
        given = {StorageWeakRef(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for made in tree_iter(out):
            if isinstance(made, Tensor) and (ref := StorageWeakRef(made.untyped_storage())) not in given:
                self.alive[ref] = made.untyped_storage().nbytes()
                self.largest = max(self.largest, self.alive[ref])
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(self.alive.values()))
        return out


def seen_of(batch: int, length: int, dtype: torch.dtype, device: str, *, documents: bool) -> Seen:
    """What a block of `MODEL` shows."""
    heads, width = MODEL.attention.num_heads, MODEL.attention.head_dim

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    q, k, attended, projected = (empty(batch, length, n, width) for n in (heads, MODEL.attention.num_kv_heads, heads, heads))
    starts = empty(batch, length, dtype=torch.int64)
    scores, shares = empty(batch, length, heads, width, dtype=torch.float32), empty(batch, length, 128, dtype=torch.float32)
    hidden = empty(batch, length, MODEL.hidden_size)
    return Seen(q, k, Documents(starts, starts) if documents else None, attended, projected, scores, shares, hidden)


@pytest.mark.parametrize(
    ("batch", "length", "dtype", "queries", "documents"),
    [(1, 2048, torch.bfloat16, 0, True), (4, 4096, torch.float32, 32, False), (1, 16384, torch.bfloat16, 8, True)],
)
def test_a_look_holds_little_and_does_not_wait(batch, length, dtype, queries, documents):
    """On a device without numbers; whole matrices of attention would be 0.5 GB, 8 GB and 32 GB, keys in fp32 32 MB for each 16k."""
    seen = seen_of(batch, length, dtype, "meta", documents=documents)
    probe = Probe(MODEL, ParallelMesh.single(), queries=queries)
    with Watched() as watched:
        probe.look(0, seen)
    assert 4 * MEGABYTE <= watched.largest <= 4 * BLOCK_ELEMENTS == 16 * MEGABYTE
    assert watched.most < 64 * MEGABYTE


def test_waiting_is_noticed():
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 0], lambda: x.nonzero()):
        with Watched(), pytest.raises(AssertionError, match="waits for the device"):
            wait()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta").tolist()
