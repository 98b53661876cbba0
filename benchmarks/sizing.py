"""How many GPUs a load needs: from measured seconds a batch, a target in images a second and a bound on the latency.

    python -m benchmarks.sizing --fps 2000 --p99 60 --costs 1=5.5,2=7,4=10,8=16,16=28
    python -m benchmarks.sizing --fps 100000 --p99 60 --decode-ms 5.5 --kilobytes 150 --plot sizing.png

The costs are milliseconds by batch size, as the service's warm-up measures them; without --costs those of the simulated device of the
serving benchmark. Simulated: arrivals (Poisson), GPUs that take exactly the table's time, the service's own choice of batch size,
and a balancer without delay. Not simulated: network, decoding (counted as CPU cores below), failures, uneven pictures, warm-up.
So the result is a lower bound; --spare adds replicas for failures and updates.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.peers.simulated import MAX_BATCH_SIZE, SECONDS_A_BATCH, SECONDS_AN_IMAGE
from service.batch_costs import BatchCosts

Routing = Literal["random", "two", "shared"]
ROUTINGS: dict[Routing, str] = {
    "random": "any replica, as a plain balancer does",
    "two": "the less busy of two replicas drawn at random, as least-request balancers do",
    "shared": "one queue for all, which no balancer reaches",
}
IMAGES_A_RUN = 40_000
IMAGES_A_GPU = 400
"""Long enough for each GPU of a large fleet to leave its empty start behind."""
SAMPLED_GPUS = 8
"""Independent GPUs behind the figure for one: a single one's long busy periods would make it a matter of luck."""
START_SHARE = 0.3
"""Of the images, not counted: queues start empty."""
RATE_RESOLUTION = 0.01
CORE_SHARE = 0.7
"""Load of a decoding core that still leaves room for bursts."""
FLEETS = (1, 4, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a simulated fleet did. Latencies in milliseconds, from arrival to the end of the image's batch."""

    gpus: int
    rate_per_s: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    utilisation: float
    mean_batch: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer to how many."""

    gpus: int
    spare: int
    per_gpu_per_s: float
    """Rate at which one GPU keeps the bound."""
    full_per_s: float
    """Rate of one GPU in full batches, whatever the latency."""
    checked: Fleet
    """The fleet without its spares at the target, simulated as a whole."""
    cores: float | None
    gigabits_per_s: float | None


def capacity_per_s(costs: BatchCosts) -> float:
    """Images a second of one GPU that always finds a full batch."""
    size = costs.favoured(costs.limit)
    return size / costs.seconds(size)


def simulate(costs: BatchCosts, *, gpus: int, rate_per_s: float, images: int, routing: Routing = "random", seed: int = 0) -> Fleet:
    """Run Poisson arrivals through a fleet whose GPUs take at once what waits for them.

    Args:
        costs: seconds by batch size, and the choice of the size.
        gpus: how many.
        rate_per_s: arrivals of the whole fleet.
        images: how many arrive; the first START_SHARE of them is not counted.
        routing: how an arrival finds its queue.
        seed: of arrivals and routing.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate_per_s, images))
    latencies, batches, busy_s, end = _run_events(costs, arrivals, gpus, routing, rng)
    counted = latencies[int(START_SHARE * images) :] * 1e3
    p50, p99 = np.percentile(counted, (50, 99))
    return Fleet(gpus, rate_per_s, float(counted.mean()), float(p50), float(p99), busy_s / (gpus * end), images / batches)


def _run_events(
    costs: BatchCosts, arrivals: NDArray[np.float64], gpus: int, routing: Routing, rng: np.random.Generator
) -> tuple[NDArray[np.float64], int, float, float]:
    """Latency of each arrival, number of batches, busy seconds of all GPUs, time of the last event."""
    queues: list[deque[int]] = [deque() for _ in range(1 if routing == "shared" else gpus)]
    outstanding = [0] * gpus
    idle = set(range(gpus))
    running: list[tuple[float, int, list[int]]] = []  # (end, GPU, images)
    latencies = np.zeros(len(arrivals))
    drawn = rng.integers(0, gpus, (len(arrivals), 2)).tolist()
    batches, busy_s, now = 0, 0.0, 0.0

    def begin(gpu: int) -> None:
        nonlocal batches, busy_s
        queue = queues[0 if routing == "shared" else gpu]
        size = costs.favoured(len(queue))
        seconds = costs.seconds(size)
        heapq.heappush(running, (now + seconds, gpu, [queue.popleft() for _ in range(size)]))
        batches += 1
        busy_s += seconds
        idle.discard(gpu)

    def end_one() -> None:
        nonlocal now
        now, gpu, images = heapq.heappop(running)
        for image in images:
            latencies[image] = now - arrivals[image]
        outstanding[gpu] -= len(images)
        idle.add(gpu)
        if queues[0 if routing == "shared" else gpu]:
            begin(gpu)

    for image, arrival in enumerate(arrivals.tolist()):
        while running and running[0][0] <= arrival:
            end_one()
        now = arrival
        first, second = drawn[image]
        gpu = second if routing == "two" and outstanding[second] < outstanding[first] else first
        if routing == "shared":
            gpu = next(iter(idle), first)
        queues[0 if routing == "shared" else gpu].append(image)
        outstanding[gpu] += 1
        if gpu in idle:
            begin(gpu)
    while running:
        end_one()
    return latencies, batches, busy_s, now


def rate_within(costs: BatchCosts, p99_ms: float, *, seed: int = 0) -> float:
    """The highest Poisson rate at which one GPU keeps its p99 within the bound.

    Raises:
        ValueError: not even a lone image does.
    """
    if costs.seconds(1) * 1e3 > p99_ms:
        raise ValueError(f"one image alone takes {costs.seconds(1) * 1e3:g} ms, so no number of GPUs keeps p99 within {p99_ms:g} ms")
    low, high = 0.0, capacity_per_s(costs)
    while high - low > RATE_RESOLUTION * capacity_per_s(costs):
        middle = (low + high) / 2
        fleet = simulate(costs, gpus=SAMPLED_GPUS, rate_per_s=SAMPLED_GPUS * middle, images=4 * IMAGES_A_RUN, seed=seed)
        held = fleet.p99_ms <= p99_ms
        low, high = (middle, high) if held else (low, middle)
    if low == 0.0:
        raise ValueError(f"p99 within {p99_ms:g} ms leaves no room for two images that come together; allow more or speed the model up")
    return low


def plan(
    costs: BatchCosts, *, fps: float, p99_ms: float, spare: float = 0.1, decode_ms: float | None = None, kilobytes: float | None = None
) -> Plan:
    """How many GPUs hold `fps` with a p99 within `p99_ms`, behind a plain balancer.

    Args:
        costs: of one GPU.
        fps: images a second of all clients together.
        p99_ms: bound on waiting and running, without network and decoding.
        spare: share of further replicas, at least one if not 0.
        decode_ms: CPU of decoding one picture, to count cores.
        kilobytes: size of one picture, to count network.

    Raises:
        ValueError: the bound cannot be kept.
    """
    per_gpu = rate_within(costs, p99_ms)
    gpus = math.ceil(fps / per_gpu)
    while (checked := _check(costs, gpus, fps)).p99_ms > p99_ms:
        gpus += max(1, gpus // 100)
    return Plan(
        gpus=gpus,
        spare=math.ceil(spare * gpus),
        per_gpu_per_s=per_gpu,
        full_per_s=capacity_per_s(costs),
        checked=checked,
        cores=None if decode_ms is None else fps * decode_ms / 1e3 / CORE_SHARE,
        gigabits_per_s=None if kilobytes is None else fps * kilobytes * 8 / 1e6,
    )


def _check(costs: BatchCosts, gpus: int, fps: float) -> Fleet:
    return simulate(costs, gpus=gpus, rate_per_s=fps, images=max(IMAGES_A_RUN, IMAGES_A_GPU * gpus))


def scaling(costs: BatchCosts, per_gpu_per_s: float, fleets: Sequence[int] = FLEETS) -> dict[Routing, list[Fleet]]:
    """The same load a GPU on ever more GPUs, by routing: what a bigger fleet changes, and what it does not."""
    return {
        routing: [
            simulate(costs, gpus=gpus, rate_per_s=gpus * per_gpu_per_s, images=max(IMAGES_A_RUN, IMAGES_A_GPU * gpus), routing=routing)
            for gpus in fleets
        ]
        for routing in ROUTINGS
    }


def parse_costs(text: str) -> dict[int, float]:
    """Read `1=5.5,16=28`: seconds by batch size.

    Raises:
        ValueError: another form.
    """
    costs = {}
    for part in text.split(","):
        size, _, milliseconds = part.partition("=")
        try:
            costs[int(size)] = float(milliseconds) / 1e3
        except ValueError:
            raise ValueError(f"cost {part!r}: expected BATCH=MILLISECONDS, such as 1=5.5,8=16,16=28") from None
    return costs


def simulated_costs() -> dict[int, float]:
    """Of the simulated device."""
    return {size: SECONDS_A_BATCH + SECONDS_AN_IMAGE * size for size in (1, 2, 4, 8, MAX_BATCH_SIZE)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan and the scaling table. Returns 2 where no number of GPUs suffices."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        measured: Mapping[int, float] = parse_costs(options.costs) if options.costs else simulated_costs()
        costs = BatchCosts(measured, options.max_batch_size or max(measured))
        found = plan(
            costs, fps=options.fps, p99_ms=options.p99, spare=options.spare, decode_ms=options.decode_ms, kilobytes=options.kilobytes
        )
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    for line in sentences(found, options.fps, options.p99):
        console.print(line, highlight=False)
    fleets = scaling(costs, found.per_gpu_per_s, [gpus for gpus in FLEETS if gpus <= options.largest_fleet])
    console.print(scaling_table(fleets))
    if options.json:
        report = {"plan": asdict(found), "scaling": {name: [asdict(fleet) for fleet in row] for name, row in fleets.items()}}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot_scaling(fleets, options.p99, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fps", type=_positive, required=True, help="images a second of all clients together")
    parser.add_argument("--p99", type=_positive, required=True, metavar="MS", help="bound on waiting and inference together")
    parser.add_argument("--costs", metavar="1=MS,8=MS,...", help="milliseconds of a batch by its size, measured on the GPU")
    parser.add_argument("--max-batch-size", type=int, help="default: the largest size of the costs")
    parser.add_argument("--spare", type=float, default=0.1, help="share of further replicas for failures and updates (default 0.1)")
    parser.add_argument("--decode-ms", type=_positive, help="CPU milliseconds to decode a picture: adds the number of cores")
    parser.add_argument("--kilobytes", type=_positive, help="size of a picture: adds the network")
    parser.add_argument("--largest-fleet", type=int, default=1024, help=f"of the scaling table, up to {FLEETS[-1]} (default 1024)")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--plot", type=Path, help="write a plot of p99 by the size of the fleet")
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return number


def sentences(found: Plan, fps: float, p99_ms: float) -> list[str]:
    """The plan in words."""
    lines = [
        f"{found.gpus} GPUs, and {found.spare} spare, for {fps:g} images/s with p99 within {p99_ms:g} ms.",
        f"One GPU holds {found.per_gpu_per_s:.0f} images/s within the bound ({found.per_gpu_per_s / found.full_per_s:.0%} of the "
        f"{found.full_per_s:.0f} it does in full batches).",
        f"Simulated as a whole: p50 {found.checked.p50_ms:.1f} ms, p99 {found.checked.p99_ms:.1f} ms, "
        f"{found.checked.utilisation:.0%} busy, {found.checked.mean_batch:.1f} images a batch.",
    ]
    if found.cores is not None:
        lines.append(f"Decoding: {found.cores:.0f} CPU cores at {CORE_SHARE:.0%} load, {found.cores / found.gpus:.1f} beside each GPU.")
    if found.gigabits_per_s is not None:
        lines.append(f"Pictures: {found.gigabits_per_s:.1f} Gbit/s into the fleet.")
    return lines


def scaling_table(fleets: Mapping[Routing, Sequence[Fleet]]) -> Table:
    """p99 by size of the fleet and routing, at the same load a GPU."""
    table = Table(title="Simulated p99, ms, at the same load a GPU")
    for column in ("GPUs", "images/s", *(f"{routing}: {meaning}" for routing, meaning in ROUTINGS.items())):
        table.add_column(column, justify="right")
    for row in zip(*fleets.values(), strict=True):
        table.add_row(str(row[0].gpus), f"{row[0].rate_per_s:.0f}", *(f"{fleet.p99_ms:.1f}" for fleet in row))
    return table


def plot_scaling(fleets: Mapping[Routing, Sequence[Fleet]], p99_ms: float, path: Path) -> None:
    """The table as a plot."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for routing, row in fleets.items():
        axes.plot([fleet.gpus for fleet in row], [fleet.p99_ms for fleet in row], marker="o", label=f"{routing}: {ROUTINGS[routing]}")
    axes.axhline(p99_ms, color="black", linewidth=0.8, linestyle="--", label="bound")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs, the same load on each (simulated)")
    axes.set_ylabel("p99 of waiting and inference, ms")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
