"""The rows of `tools/benchmark.py data` about text: `tools/preprocess_data.py` beside Megatron's loop, and two workers beside one."""

import statistics
from pathlib import Path

from megagate.analysis.benchmark.data_files import Text, real_text, same_ids
from megagate.analysis.benchmark.interleave import Entrant, Series
from megagate.analysis.benchmark.paired import paired_ratio
from megagate.analysis.benchmark.rows import Bench, entrant, reaches, single
from megagate.data.manifest import read_manifest
from megagate.data.preprocess.units import UnitRecord, read_record, record_path
from megagate.errors import RunError

_ALL_TRAIN = "1,0,0"
_UNITS_WANTED = 32
_LARGEST = 300e6  # bytes of a process
_WANTED = {"tokenizers": 1.4, "gigatoken": 5.0}  # times less than Megatron's worker


def preprocess(bench: Bench) -> None:
    """CPU-seconds per MB and memory, with ids compared."""
    folder, without = bench.options.folder / "preprocess", bench.options.gigatoken
    text = _text(bench, folder)
    backends = [name for name in _WANTED if name != "gigatoken" or not without]
    own = [_command(name, text, folder / name, "--workers", "1", *_backend(bench, name)) for name in backends]
    peer = entrant("megatron", "data_megatron:preprocess", text=str(text.path), tokenizer=str(text.tokenizer), output=str(folder / "peer"))
    series = bench.run([*own, peer])
    if without:
        bench.remark(f"no row for gigatoken: {without}.")
    if series is None:
        return
    for name in backends:
        if not same_ids(folder / name, folder / "peer"):
            raise RunError(f"preprocess: megagate with {name} and Megatron made different ids of the same text: no time is worth telling")
    bench.remark(f"identical ids: {' and '.join(backends)}, each against Megatron's files: all tokens, all documents.")
    for name in backends:
        _cpu_line(bench, name, text.text_bytes / 1e6, series)
    for name in backends:
        _memory_line(bench, name, series)
    base = series["megatron"]
    writer, imports = statistics.median(base.cpu_seconds) / text.text_bytes * 1e6, base.notes[0]
    bench.remark(
        "ours is the whole command, all its processes and imports; the peer is Megatron's worker alone, its tokenizer loaded before,"
        f" without the process that writes ({writer:.3f} s/MB more) and imports ({imports['import_cpu']:.1f} CPU-s,"
        f" {imports['import_bytes'] / 1e6:.0f} MB)."
    )


def _cpu_line(bench: Bench, name: str, megabytes: float, series: dict[str, Series]) -> None:
    cpu, worker = ([note["cpu"] for note in series[key].notes] for key in (name, "megatron"))
    times, wanted = paired_ratio(worker, cpu), _WANTED[name]
    ours, peer = (f"{statistics.median(values) / megabytes:.3f} s/MB" for values in (cpu, worker))
    wall = " / ".join(f"{statistics.median(series[key].seconds):.1f} s" for key in (name, "megatron"))
    title = f"preprocessing with {name}, 1 worker: CPU"
    bench.line(title, ours, peer, times, wall=wall, target=f"{wanted:g} times", met=reaches(times, wanted))


def _memory_line(bench: Bench, name: str, series: dict[str, Series]) -> None:
    ours, peer = (max(note["peak"] for note in series[key].notes) for key in (name, "megatron"))
    title = f"preprocessing with {name}: largest process"
    bench.line(title, f"{ours / 1e6:.0f} MB", f"{peer / 1e6:.0f} MB", single(peer, ours), target="< 300 MB", met=ours < _LARGEST)


def workers(bench: Bench) -> None:
    """Tokens per second of two workers beside one, while all of them have work."""
    folder = bench.options.folder / "workers"
    text = _text(bench, folder)
    size = str(max(text.path.stat().st_size // _UNITS_WANTED, 1))
    places = {count: folder / f"by{count}" for count in (1, 2)}
    rates: dict[int, list[float]] = {count: [] for count in places}

    def take_rates(_: dict[str, Series]) -> bool:
        for count, place in places.items():  # files of the round just done
            rates[count].append(_steady_rate(place, count))
        return False

    more = ("--unit-bytes", size, *_backend(bench, "tokenizers"))
    entrants = [_command(str(count), text, place, "--workers", str(count), *more) for count, place in places.items()]
    series = bench.run(entrants, after_round=take_rates)
    if series is None:
        return
    times = paired_ratio(rates[2], rates[1])
    ours, peer = (f"{statistics.median(rates[count]) / 1e3:.0f} k tokens/s" for count in (2, 1))
    wall = " / ".join(f"{statistics.median(series[name].seconds):.1f} s" for name in ("2", "1"))
    title = "preprocessing with tokenizers by 2 workers, beside 1 as peer, in steady state (ours / peer): clock"
    bench.line(title, ours, peer, times, wall=wall, target="1.6 times", met=reaches(times, 1.6))
    spent = paired_ratio(*([note["cpu"] for note in series[name].notes] for name in ("2", "1")))
    bench.remark(f"time on the clock, which needs two idle cores; CPU-seconds of two workers over those of one: {spent}.")


def _steady_rate(folder: Path, workers: int) -> float:
    """Tokens per second from when each worker has finished a unit until the first of them has no more."""
    source = read_manifest(folder).source
    done = []
    for unit in range(int(source["units"])):
        record = read_record(folder, str(source["plan_sha256"]), unit)
        assert record is not None, f"a published data set lacks the record of unit {unit}"
        done.append((record_path(folder, unit).stat().st_mtime_ns, _tokens(record)))
    steady = sorted(done)[workers - 1 : len(done) - workers + 1]
    return 1e9 * sum(tokens for _, tokens in steady[1:]) / max(steady[-1][0] - steady[0][0], 1)


def _tokens(record: UnitRecord) -> int:
    return sum(stats["tokens"] for stats in record.shards.values())


def _backend(bench: Bench, name: str) -> list[str]:
    return [] if bench.options.gigatoken else ["--tokenizer-backend", name]


def _command(name: str, text: Text, output: Path, *more: str) -> Entrant:
    wanted = ["--input", str(text.path), "--tokenizer", str(text.tokenizer), "--split", _ALL_TRAIN, *more]
    return entrant(name, "data_ours:preprocess", options=wanted, output=str(output))


def _text(bench: Bench, folder: Path) -> Text:
    options = bench.options
    bench.tell("collecting text")
    text = real_text(folder, text=options.text, most_bytes=1e6 * options.megabytes, tokenizer=options.tokenizer)
    source = str(options.text or "the .py, .md, .rst and .txt files of this Python and its packages")
    left = f", {text.spelled} that spell a special token left out" if text.spelled else ""
    tokenizer = options.tokenizer or "a BPE trained on the beginning of it"
    bench.remark(
        f"{text.text_bytes / 1e6:.1f} MB in {text.documents:,} documents of {source}{left} (sha256 {text.sha256[:12]}); tokenizer:"
        f" {tokenizer}, {text.vocab_size:,} ids."
    )
    return text
