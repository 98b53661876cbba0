"""Where our service spends CPU besides decoding: the event loop's thread under cProfile, with 32 clients and the simulated device.

    python -m benchmarks.serving_profile

The CPU of a request is measured without the profiler, by the kernel; the profile, which slows every call down, only says in what parts.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import pstats
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.load import run_on_fast_loop
from benchmarks.load_pictures import draw_pictures
from benchmarks.load_run import Load, run_load
from benchmarks.peers.ours import PROFILE_VARIABLE
from benchmarks.serving import CLIENTS, OURS, RESULTS, decode_limit
from benchmarks.serving_process import serving

SHOWN = 15
PARTS = (
    ("prometheus_client", r"prometheus_client/"),
    ("starlette and fastapi", r"/(starlette|fastapi)/"),
    ("uvicorn", r"/uvicorn/"),
    ("service: scheduler and queue", r"service/(scheduler|batch_\w+)\.py"),
    ("service: the rest", r"/service/\w+\.py"),
    ("uvloop: sockets and callbacks, in C", r"asyncio/runners\.py"),
    ("asyncio and threads", r"/(asyncio|concurrent|threading|contextlib)"),
    ("built-in functions", r"^~"),
)
"""Part -> where its code lies; the first that matches counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write benchmarks/results/serving_profile.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of the two runs (default 8)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of serving_profile.md (default benchmarks/results)")
    options = parser.parse_args(arguments)
    text = run_on_fast_loop(_measure(options.seconds))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "serving_profile.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


async def _measure(seconds: float) -> str:
    pictures = draw_pictures()
    load = Load(clients=(CLIENTS, CLIENTS), seconds=seconds, warm_up_s=1.0)
    decode_ms = (await asyncio.to_thread(decode_limit, pictures))["cpu_ms"]
    with serving(OURS, pictures[0]) as server:
        cpu = server.cpu_seconds()
        records = await run_load(server.url, pictures, load)
        request_ms = 1e3 * (server.cpu_seconds() - cpu) / len(records.status)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "profile")
        os.environ[PROFILE_VARIABLE] = str(path)
        try:
            with serving(OURS, pictures[0]) as server:
                profiled = len((await run_load(server.url, pictures, load)).status)
        finally:
            del os.environ[PROFILE_VARIABLE]
        return describe(path, profiled, request_ms, decode_ms)


def describe(path: Path, requests: int, request_ms: float, decode_ms: float) -> str:
    """The profile as Markdown: parts by own time, then functions."""
    stream = io.StringIO()
    stats = pstats.Stats(str(path), stream=stream)
    rows = [(key, own) for key, (_, _, own, _, _) in stats.stats.items()]  # type: ignore[attr-defined]
    parts: Counter[str] = Counter()
    for (file, _, _), own in rows:
        parts[next((part for part, pattern in PARTS if re.search(pattern, file)), "other libraries")] += own
    lines = [
        f"# CPU of a request, {CLIENTS} clients",
        "",
        f"{request_ms:.2f} ms CPU a request. Decoding alone takes {decode_ms:.2f} ms, everything else {request_ms - decode_ms:.2f} ms.",
        "",
        "Own CPU time on the event loop's thread under cProfile, which makes all of it slower:",
        "",
        "| part | us a request |",
        "|---|---|",
        *(f"| {part} | {1e6 * own / requests:.0f} |" for part, own in parts.most_common()),
        "",
        "| function | us a request |",
        "|---|---|",
    ]
    for (file, line, name), own in sorted(rows, key=lambda row: -row[1])[:SHOWN]:
        place = "" if file == "~" else f" ({'/'.join(Path(file).parts[-2:])}:{line})"
        lines.append(f"| {name}{place} | {1e6 * own / requests:.0f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
