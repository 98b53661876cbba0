"""The service with a real model against a bare loop of the runtime on pictures that are already decoded: what serving costs.

    python -m benchmarks.serving_demo --model-repository model_repository

Loop and service take turns of a few seconds on the same machine, so that other work disturbs both; the ratio of each pair counts.
The service decodes, answers over HTTP and shares the CPUs with the load generator; the bare loop does none of this.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.load import run_on_fast_loop
from benchmarks.load_pictures import draw_pictures
from benchmarks.load_run import Load, run_load
from benchmarks.load_stats import summarise
from benchmarks.peers.simulated import LIMITS
from benchmarks.serving import CLIENTS, RESULTS
from benchmarks.serving_process import running
from service.images import Prepared, assemble, prepare
from service.runtime import OnnxRuntime


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write benchmarks/results/serving_demo.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--turns", type=int, default=4, help="pairs of loop and service (default 4)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each turn (default 6)")
    parser.add_argument("--batch-size", type=int, default=1, help="of the bare loop (default 1, the fastest on CPUs)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    paths = sorted(options.model_repository.glob("*/*/model.onnx"))
    if not paths:
        parser.error(f"{options.model_repository} holds no <name>/<version>/model.onnx")
    report = run_on_fast_loop(_take_turns(paths[-1], options))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving_demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"bare loop {median(report['bare_per_s']):.1f} images/s, service {median(report['service_per_s']):.1f}: "
        f"{report['ratio']:.1%} (pairs: {', '.join(f'{ratio:.0%}' for ratio in report['ratios'])})"
    )
    return 0


async def _take_turns(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    pictures = draw_pictures([(480, 640)])
    runtime = OnnxRuntime(path, provider="cpu")
    prepared = [prepare(picture.body, runtime.manifest.input, LIMITS) for picture in pictures]
    load = Load(clients=(CLIENTS, CLIENTS), seconds=options.seconds + 1.0, warm_up_s=1.0, timeout_s=60.0)
    bare, served = [], []
    with running(["-m", "service", "--host", "127.0.0.1", "--model-repository", str(options.model_repository)], pictures[0]) as server:
        for _ in range(options.turns):
            bare.append(await asyncio.to_thread(bare_loop, runtime, prepared, options.seconds, options.batch_size))
            served.append(summarise(await run_load(server.url, pictures, load), load).answered_per_s)
    runtime.close()
    ratios = [one / other for one, other in zip(served, bare, strict=True)]
    return {
        "model": path.parts[-3],
        "batch_size": options.batch_size,
        "bare_per_s": bare,
        "service_per_s": served,
        "ratios": ratios,
        "ratio": median(ratios),
    }


def bare_loop(runtime: OnnxRuntime, prepared: Sequence[Prepared], seconds: float, batch_size: int) -> float:
    """Images a second of the runtime alone, pictures of one bucket decoded beforehand."""
    batch = assemble([prepared[index % len(prepared)] for index in range(batch_size)])
    runtime.run(*batch)
    done, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        runtime.run(*batch)
        done += batch_size
    return done / elapsed


if __name__ == "__main__":
    sys.exit(main())
