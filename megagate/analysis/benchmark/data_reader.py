"""The rows of `tools/benchmark.py data` about reading: start-up, a sample, a place in an order."""

import statistics

from megagate.analysis.benchmark.data_files import SHARD_TOKENS, SPARSE_VOCAB, many_shards, random_set, sparse_set
from megagate.analysis.benchmark.interleave import Series
from megagate.analysis.benchmark.paired import paired_ratio
from megagate.analysis.benchmark.rows import Bench, entrant, reaches, single

SEQ_LEN = 4096
WINDOWS = 2_700_000_000
"""Of 4096 tokens, in 1.1e13."""
_BLOCK = 4096  # lookups at once
_WARM_SAMPLES = 4096  # of a round, read once before
_LOCKSTEP = 64  # samples of the largest step
_FORMS = ((1, 1), (4, 8), (16, 4))  # micro-batch, micro-steps


def start(bench: Bench) -> None:
    """CPU and memory from files to the first sample."""
    options = bench.options
    bench.tell("writing files")
    prefix = sparse_set(options.folder / "one", options.documents)
    many = many_shards(options.folder / "many", options.shards)
    own = {"one": prefix.parent, "many": many}
    entrants = [entrant(name, "data_ours:start", folder=str(folder), seq_len=SEQ_LEN) for name, folder in own.items()]
    peer = entrant("megatron", "data_megatron:start", prefix=str(prefix), seq_len=SEQ_LEN, vocab_size=SPARSE_VOCAB)
    series = bench.run([*entrants, peer])
    if series is None:
        return
    tokens = prefix.with_suffix(".bin").stat().st_size // 2
    _start_lines(bench, f"start-up, {options.documents:,} documents, {tokens:.2g} tokens, 1 shard", series["one"], series["megatron"])
    title = f"start-up, {options.shards:,} shards, {options.shards * SHARD_TOKENS:.2g} tokens"
    _start_lines(bench, title, series["many"], None)
    costs = [
        f"{note['import_cpu']:.2f} CPU-s and {note['import_bytes'] / 1e6:.0f} MB ({package})"
        for name, package in (("one", "megagate"), ("megatron", "megatron-core"))
        for note in [series[name].notes[0]]
    ]
    bench.remark(
        f"from the files to the first sample of {SEQ_LEN} tokens, in a process that has imported what it needs; the worst round decides."
        f" Not counted, the imports: {' and '.join(costs)}. Megatron: a GPTDataset of one epoch, its indices kept in memory and not"
        " written. Memory: growth of the resident set at its peak, mapped pages of files included, the largest of all rounds. Indices"
        " lie in the page cache."
    )


def _start_lines(bench: Bench, title: str, own: Series, base: Series | None) -> None:
    """Without a base where Megatron did not open as much."""
    ours = f"{_ms(statistics.median(own.cpu_seconds))} (first {_ms(own.cpu_seconds[0])})"
    met = max(own.cpu_seconds) < 0.05  # a run starts once
    if base is None:
        wall = _ms(statistics.median(own.seconds))
        bench.line(f"{title}: CPU", ours, "-", None, wall=wall, target="< 50 ms", met=met)
    else:
        times, peer = paired_ratio(base.cpu_seconds, own.cpu_seconds), _ms(statistics.median(base.cpu_seconds))
        bench.line(f"{title}: CPU", ours, peer, times, wall=_walls(own, base, 1), target="< 50 ms", met=met)
    peak, private = (max(note[what] for note in own.notes) for what in ("peak", "private"))
    peers = 0 if base is None else max(note["peak"] for note in base.notes)
    ours = f"{peak / 1e6:.1f} MB ({private / 1e6:.1f} private)"
    times = single(peers, peak) if peers else None
    bench.line(f"{title}: memory added", ours, f"{peers / 1e6:.0f} MB" if peers else "-", times, target="< 5 MB", met=peak < 5e6)


def sample(bench: Bench) -> None:
    """CPU of a sample that was read before, by form of step."""
    bench.tell("writing files")
    documents = bench.options.sampled_documents
    prefix = random_set(bench.options.folder / "random", documents)
    windows = prefix.with_suffix(".bin").stat().st_size // 2 // SEQ_LEN - 2
    samples = min(_WARM_SAMPLES, windows // _LOCKSTEP * _LOCKSTEP)
    shared = {"seq_len": SEQ_LEN, "samples": samples}
    entrants = [
        entrant(f"{rows}x{steps}", "data_ours:sample", warmup=1, folder=str(prefix.parent), micro_batch=rows, micro_steps=steps, **shared)
        for rows, steps in _FORMS
    ]
    peer = entrant("megatron", "data_megatron:sample", warmup=1, prefix=str(prefix), vocab_size=SPARSE_VOCAB, **shared)
    series = bench.run([*entrants, peer])
    if series is None:
        return
    base = series["megatron"]
    for rows, steps in _FORMS:
        own = series[f"{rows}x{steps}"]
        cpu, peer_cpu = (statistics.median(one.cpu_seconds) / samples for one in (own, base))
        times = paired_ratio(base.cpu_seconds, own.cpu_seconds)
        form = "alone" if rows * steps == 1 else f"in steps of {steps} micro-batches of {rows}"
        met = cpu <= 1e-4 and reaches(times, 4)
        wall = _walls(own, base, samples)
        bench.line(f"a sample of {SEQ_LEN}, {form}: CPU", _ms(cpu), _ms(peer_cpu), times, wall=wall, target="<= 0.1 ms, 4 times", met=met)
    bench.remark(
        f"{documents:,} documents of random tokens, {samples} samples a round, all read before; `TrainLoader.step` beside"
        " `GPTDataset.__getitem__` without attention masks."
    )


def permutation(bench: Bench) -> None:
    """CPU of a lookup in blocks."""
    blocks, entries = (50, 20_000_000) if bench.options.documents > 100_000 else (2, 20_000)
    ours = entrant("lookup", "data_ours:lookup", warmup=1, windows=WINDOWS, block=_BLOCK, blocks=blocks)
    series = bench.run([ours, entrant("shuffle", "data_ours:shuffle", warmup=1, entries=entries)])
    if series is None:
        return
    own = [note["cpu"] / (blocks * _BLOCK) for note in series["lookup"].notes]
    base = [note["cpu"] / entries for note in series["shuffle"].notes]
    cpu, peer = statistics.median(own), statistics.median(base)
    title = f"a place in an order of {WINDOWS:.2g} windows (1.1e13 tokens), in blocks of {_BLOCK}: CPU"
    bench.line(title, f"{1e6 * cpu:.3f} us", f"{1e6 * peer:.3f} us", paired_ratio(base, own), target="< 3 us", met=cpu < 3e-6)
    bench.remark(
        f"the peer is numpy's RandomState.shuffle of {entries:,} entries, per entry, as Megatron makes its orders: all of them before the"
        f" first sample, {4 * WINDOWS / 1e9:.0f} GB at this size, where a lookup needs nothing before."
    )


def _walls(own: Series, base: Series, units: int) -> str:
    return " / ".join(_ms(statistics.median(series.seconds) / units) for series in (own, base))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{3 if seconds < 1e-3 else 1 if seconds < 1 else 0}f} ms"
