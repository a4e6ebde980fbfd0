"""`tools/benchmark.py observe`: what a look (`observe.every`) adds to a training step, by the method of `gate.py`.

Pure: the steps themselves run in a process of their own (`observe_work.py`), with a look and without one by turns, on one engine: a look
changes nothing, so that all are steps of one run.
"""

from megagate.analysis.benchmark.gate import BASE, TWIN, Record, interval, median_seconds, overhead, verdict
from megagate.analysis.benchmark.paired import Shift
from megagate.config.run import ObserveConfig

OBSERVED = "observed"
WORK = f"{__package__}.observe_work:alternating"
LIMIT = 2.0
"""The most that looks may cost, in % of training, at the default of `observe.every`."""


def share(wall: Shift, every: int) -> Shift:
    """What a look at each `every`-th step costs, in % of training without looks, from what it adds to its step, in %."""
    return Shift(*(value / every for value in wall))


def table(record: Record, *, machine: str) -> list[str]:
    """Lines of markdown: what was measured where, what a look adds to its step, and, of the default, to training."""
    every = ObserveConfig().every
    head = f"{record.conditions['shape']}; {record.pairs} pairs in {len(record.sessions)} processes"
    rows = [
        f"{head}; step without a look {median_seconds(record, BASE):.3f} s; {machine}.\n",
        f"| row | added to its step, % [95 %] | in CPU time, % | at observe.every {every}, % of training [95 %] | target | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for key, title in ((TWIN, "A/A: a step without a look again"), (OBSERVED, "a step with a look")):
        wall, cpu = overhead(record.numbers, key, "seconds"), overhead(record.numbers, key, "cpu_seconds")
        cells = [f"{title} (`{key}`)", interval(wall), interval(cpu)]
        if key == TWIN:
            cells += ["-", "holds 0", verdict(key, wall, 0.0)]
        else:
            cost = share(wall, every)
            cells += [interval(cost), f"< {LIMIT:g} %", verdict(key, cost, LIMIT)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows
