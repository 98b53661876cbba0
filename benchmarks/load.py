"""Load a detector with pictures and say what it held.

python -m benchmarks.load http://127.0.0.1:8000/v1/detect --pictures DIR --rate 100          open loop, Poisson
python -m benchmarks.load http://127.0.0.1:8000/v1/detect --clients 32                       closed loop, drawn pictures
python -m benchmarks.load URL --rate 50:400 --seconds 60 --html ramp.html                    a ramp
python -m benchmarks.load URL --find-rate p99=100                                            the highest rate within an objective
python -m benchmarks.load --compare before.json after.json --html compared.html              two runs side by side
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.load_client import Exchange, parse_target
from benchmarks.load_pictures import Picture, bad_pictures, draw_pictures, read_pictures, resized_pictures
from benchmarks.load_report import table_of, warning_of, write_html, write_plot
from benchmarks.load_run import Load, run_load
from benchmarks.load_search import Objective, find_rate, parse_objective
from benchmarks.load_stats import Summary, read_summary, summarise, write_summary

T = TypeVar("T")
RECENT = 500
"""The progress line shows percentiles of so many latest answers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, 1 for errors during the run, 2 for arguments that make no sense."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        if options.compare:
            summaries = [read_summary(path) for path in options.compare]
        else:
            summaries = [_measure(options, console)]
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    Console().print(table_of(summaries))
    for text in filter(None, map(warning_of, summaries)):
        console.print(text, style="yellow")
    _write(summaries, options)
    return 1 if not options.compare and summaries[0].errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", help="http://host:port/v1/detect, with query options if any")
    parser.add_argument("--rate", type=_pair(float), metavar="R[:R2]", help="open loop: requests a second, or a ramp between two rates")
    parser.add_argument(
        "--clients", type=_pair(int), metavar="N[:N2]", help="closed loop: concurrent clients, or a ramp between two numbers"
    )
    parser.add_argument("--find-rate", type=_value(parse_objective), metavar="p99=MS", help="search the highest rate within this objective")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two JSON reports instead of loading")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="pictures to send (default: drawn ones in five sizes)")
    parser.add_argument("--sizes", type=_value(_sizes), metavar="WxH,...", help="resize the pictures to these sizes in turn")
    parser.add_argument("--bad", type=float, default=0.0, metavar="SHARE", help="fraction of requests with a broken picture (default 0)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a run (default 20)")
    parser.add_argument("--warm-up", type=float, default=2.0, metavar="S", help="seconds at the start that do not count (default 2)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="give a request up after this (default 30)")
    parser.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'", help="a further header, such as an API key; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and choice of pictures (default 0)")
    parser.add_argument("--json", type=Path, help="write the report for --compare")
    parser.add_argument("--html", type=Path, help="write the report as one HTML file")
    parser.add_argument("--plot", type=Path, help="write the plot (.png, .svg)")
    parser.add_argument("--i-own-this-host", action="store_true", help="load another host than this machine")
    return parser


def _value(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A converter whose ValueError argparse shows in full."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _pair(kind: Callable[[str], T]) -> Callable[[str], tuple[T, T]]:
    def parse(text: str) -> tuple[T, T]:
        first, _, second = text.partition(":")
        pair = kind(first), kind(second or first)
        if min(pair) <= 0:  # type: ignore[type-var]
            raise ValueError(f"{text!r}: expected positive numbers")
        return pair

    return _value(parse)


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for part in text.split(","):
        width, _, height = part.partition("x")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise ValueError(f"size {part!r}: expected WIDTHxHEIGHT, such as 640x480")
        sizes.append((int(width), int(height)))
    return sizes


def _measure(options: argparse.Namespace, console: Console) -> Summary:
    if not options.url:
        raise ValueError("give the URL of a detector, or two reports to --compare")
    check_host(options.url, owned=options.i_own_this_host)
    chosen = [name for name in ("rate", "clients", "find_rate") if getattr(options, name)]
    if len(chosen) != 1:
        raise ValueError("choose one of --rate (open loop), --clients (closed loop) and --find-rate")
    pictures = _pictures(options)
    if options.find_rate:
        return _search(options, options.find_rate, pictures, console)
    load = Load(rate=options.rate, clients=options.clients, **_common(options))
    return run_on_fast_loop(_observed(options, load, pictures, console))


def check_host(url: str, *, owned: bool) -> None:
    """Refuse to load a machine that may be somebody else's.

    Raises:
        ValueError: the host is not this machine and nobody said that it may be loaded.
    """
    host = parse_target(url).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not owned:
        raise ValueError(f"{host} is not this machine; load only what is yours, and say so with --i-own-this-host")


def _pictures(options: argparse.Namespace) -> list[Picture]:
    pictures = read_pictures(options.pictures) if options.pictures else draw_pictures()
    if options.sizes:
        pictures = resized_pictures(pictures, options.sizes)
    return pictures + (bad_pictures(pictures) if options.bad else [])


def _common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "seconds": options.seconds,
        "warm_up_s": options.warm_up,
        "bad_share": options.bad,
        "timeout_s": options.timeout,
        "seed": options.seed,
    }


async def _observed(options: argparse.Namespace, load: Load, pictures: Sequence[Picture], console: Console) -> Summary:
    """One run under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(load.words, total=load.seconds, note="")
        seen = 0

        def tick(ended: Sequence[Exchange]) -> None:
            nonlocal seen
            progress.update(task, advance=0.5, note=_note(ended, len(ended) - seen))
            seen = len(ended)

        records = await run_load(options.url, pictures, load, headers=options.header, tick=tick)
    return summarise(records, load)


def _note(ended: Sequence[Exchange], fresh: int) -> str:
    recent = [(exchange.done - exchange.scheduled) * 1e3 for exchange in ended[-RECENT:] if exchange.status == 200]
    failed = sum(1 for exchange in ended if exchange.status != 200)
    if not recent:
        return f"no answer yet, {failed} others"
    p50, p99 = np.percentile(recent, (50, 99))
    return f"{fresh / 0.5:.0f}/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, {failed} not 200"


def _search(options: argparse.Namespace, objective: Objective, pictures: Sequence[Picture], console: Console) -> Summary:
    async def measure(rate: float) -> Summary:
        summary = await _observed(options, Load(rate=(rate, rate), **_common(options)), pictures, console)
        mark = "held" if objective.holds(summary) else "not held"
        shown = f"{summary.latency_ms[objective.percentile]:.1f} ms" if summary.latency_ms else "no answer"
        console.print(f"{rate:8.1f}/s  {objective.percentile} {shown}  {mark}", highlight=False)
        return summary

    found = run_on_fast_loop(find_rate(measure, objective, start=10.0))
    held = [summary for rate, summary, holds in found.tried if holds and rate == found.rate]
    if not held:
        raise ValueError(f"no rate held {objective.percentile} within {objective.bound_ms:g} ms, not even {found.tried[-1][0]:.1f}/s")
    console.print(f"highest rate with {objective.percentile} within {objective.bound_ms:g} ms: {found.rate:.1f}/s", style="bold")
    return held[-1]


def run_on_fast_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """On uvloop where it is installed: it halves the generator's own CPU."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


def _write(summaries: Sequence[Summary], options: argparse.Namespace) -> None:
    if options.json:
        write_summary(summaries[-1], options.json)
    if options.html:
        write_html(summaries, options.html)
    if options.plot:
        write_plot(summaries, options.plot)


if __name__ == "__main__":
    sys.exit(main())
