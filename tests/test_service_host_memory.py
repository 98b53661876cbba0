"""Freed memory leaves the process: what malloc keeps, and a retired version's session."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from service_fakes import make_settings, picture, run, running, sample, until
from service_onnx import write_model

from service.app import create_app
from service.host_memory import release_freed_memory

PNG = {"content-type": "image/png"}
FREED = """
import ctypes
from pathlib import Path
from service.host_memory import release_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(100_000) for _ in range(1000)]  # below the size that malloc maps by itself
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:  # the last one holds the heap's end in its place
    libc.free(block)
kept = resident_mib()
assert release_freed_memory()
print(kept - resident_mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed pages in this way")
def test_freed_pages_between_living_blocks_go_back_to_the_system() -> None:
    found = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert float(found.stdout) > 80  # of 95 MiB


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.host_memory._trim", None)
    assert release_freed_memory() is False


def test_a_retired_session_is_gone_without_the_garbage_collector(tmp_path: Path) -> None:
    """Its native memory goes with the last reference: a cycle would keep a whole model until some later collection."""
    write_model(tmp_path, version="1")

    async def scenario() -> None:
        app = create_app(make_settings(model_repository=tmp_path, provider="cpu", intra_op_threads=1, max_batch_size=2))
        repository = app.state.parts.repository
        async with running(app) as client:
            assert (await client.post("/v1/detect", content=picture(), headers=PNG)).status_code == 200
            retired = weakref.ref(repository.resolve(None).loaded.runtimes[0]._session)
            assert retired() is not None
            write_model(tmp_path, version="2")
            gc.disable()
            try:
                await repository.load("blobs")
                await until(lambda: retired() is None)
            finally:
                gc.enable()
            assert sample(app, "detector_reloads_total", outcome="ok") == 1

    run(scenario())
