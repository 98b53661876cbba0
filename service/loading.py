"""From a folder of versions to one that may serve: found, opened, warmed, checked. Everything here blocks: call it on a worker thread."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from service.device_calls import Place, here
from service.device_errors import DeviceLost, first_line
from service.errors import Draining, NotReady
from service.golden import GoldenMismatch, check_golden
from service.host_memory import release_freed_memory
from service.manifest import Bucket, Manifest, ManifestError
from service.runtime import CostTable, OnnxRuntime, Runtime, RuntimeLoadError, file_sha256
from service.warm_up import warm_up

MODEL_FILE = "model.onnx"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
VERSION = re.compile(r"[1-9][0-9]{0,17}")

KNOWN = (RuntimeLoadError, ManifestError, GoldenMismatch)
"""Why a version must not serve, as a sentence for the operator: another version may."""
NOT_OF_THE_VERSION = (DeviceLost, Draining, NotReady)
"""What ends a load whatever is loaded: the device is gone, or the service stops."""

logger = logging.getLogger(__name__)

OpenRuntime = Callable[[Path, int, int], Runtime]
"""(model file, device number, largest batch) -> a runtime on that device, which fills batches up (`full_size`) unless it is a CPU."""


class NoModel(RuntimeError):
    """Nothing can be served, as a sentence that says what to do."""


@dataclass(eq=False, slots=True)
class LoadedVersion:
    """A version that is ready to run: a runtime for each device that is left, with what a batch costs."""

    name: str
    version: str
    runtimes: Mapping[int, Runtime]
    """By the scheduler's device index."""
    costs: CostTable
    sha256: str
    load_seconds: float
    loaded_at: float = field(default_factory=time.time)
    """Seconds since 1970, for people."""

    @property
    def manifest(self) -> Manifest:
        return next(iter(self.runtimes.values())).manifest

    @property
    def provider(self) -> str:
        return next(iter(self.runtimes.values())).provider

    def bucket_costs(self, bucket: Bucket) -> dict[int, float]:
        """Batch size -> seconds for one bucket."""
        return {size: seconds for (known, size), seconds in self.costs.items() if known == bucket}

    def close(self) -> None:
        """Give the memory of every device back."""
        for runtime in self.runtimes.values():
            runtime.close()
        release_freed_memory()


def parse_reference(reference: str) -> tuple[str, str | None]:
    """`name` or `name@version` -> (name, version or None).

    Raises:
        ValueError: neither.
    """
    name, at, version = reference.partition("@")
    if NAME.fullmatch(name) is None or (at and VERSION.fullmatch(version) is None):
        raise ValueError(f"{reference[:80]!r} is not `name` or `name@version`")
    return name, version if at else None


def find_models(root: Path) -> dict[str, list[str]]:
    """Names -> versions that have a model.onnx, newest first. Anything else in the folder is left alone."""
    found: dict[str, list[str]] = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.is_dir() and NAME.fullmatch(folder.name):
            versions = [v.name for v in _entries(folder) if VERSION.fullmatch(v.name) and (v / MODEL_FILE).is_file()]
            if versions:
                found[folder.name] = sorted(versions, key=int, reverse=True)
    return found


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing where it was removed since it was listed."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def require_models(root: Path, references: Sequence[str]) -> list[tuple[str, str | None]]:
    """What to serve: the references, or every name in the folder.

    Raises:
        NoModel: the folder or a reference is missing; says how to fill it.
    """
    found = find_models(root)
    if not found:
        raise NoModel(
            f"no model in {root}: expected {root}/<name>/<version>/{MODEL_FILE}; "
            f"export one with `python -m export CHECKPOINT --name NAME --repository {root}`, "
            "or set DETECTOR_MODEL_REPOSITORY to a folder that has one"
        )
    if not references:
        return [(name, None) for name in found]
    wanted = []
    for reference in references:
        name, version = parse_reference(reference)
        if name not in found or (version is not None and version not in found[name]):
            offered = ", ".join(f"{known}@{v}" for known, versions in found.items() for v in versions)
            raise NoModel(f"DETECTOR_MODEL asks for {reference!r}, but {root} holds {offered}")
        wanted.append((name, version))
    return wanted


def _load_error(error: Exception) -> str:
    return str(error) or type(error).__name__


class Loader:
    """Opens versions of one repository folder for a fixed set of devices."""

    def __init__(self, root: Path, open_runtime: OpenRuntime, *, devices: Sequence[int], max_batch_size: int) -> None:
        self.root = root
        self._open_runtime = open_runtime
        self._devices = devices
        self._max_batch_size = max_batch_size
        self._lost: set[int] = set()

    def lose(self, index: int) -> None:
        """A device is gone for good: versions that are loaded from now on do without it. May be called while one is loaded."""
        self._lost.add(index)

    def load(self, name: str, version: str, place_of: Callable[[int], Place]) -> LoadedVersion:
        """Open, warm and check one version.

        Args:
            place_of: device index -> its own thread, where a runtime that records CUDA graphs is warmed and checked: a recording serves
                only the thread that made it. Any other runtime is warmed here, beside the batches of the version that serves.

        Raises:
            RuntimeLoadError, ManifestError, GoldenMismatch: it must not serve, and why; a file that opens and then fails in a run too.
            DeviceLost, Draining, NotReady: this process can load nothing any more, whatever the version.
        """
        path = self.root / name / version / MODEL_FILE
        started = time.perf_counter()
        try:
            sha256 = file_sha256(path)
        except OSError as error:
            raise RuntimeLoadError(f"{path}: cannot be read: {error.strerror}") from error
        runtimes: dict[int, Runtime] = {}
        try:
            costs = self._prepare(path, runtimes, place_of)
        except Exception as error:
            for runtime in runtimes.values():
                runtime.close()
            if isinstance(error, (*KNOWN, *NOT_OF_THE_VERSION)):
                raise
            raise _cannot_run(path, error) from error
        finally:
            release_freed_memory()  # of the warm-up's large batches
        if not runtimes:
            raise RuntimeLoadError(f"{path}: every device of this process is lost; restart it")
        loaded = LoadedVersion(name, version, runtimes, costs, sha256, time.perf_counter() - started)
        _warn_of_other_identity(loaded.manifest, name, version)
        return loaded

    def _prepare(self, path: Path, runtimes: dict[int, Runtime], place_of: Callable[[int], Place]) -> CostTable:
        """A runtime of each device that is left: opened into `runtimes`, where the caller finds what to close, then warmed and checked."""
        costs: CostTable = {}
        for index, device in enumerate(self._devices):
            if index in self._lost:
                continue
            runtime = runtimes[index] = self._open_runtime(path, device, self._max_batch_size)
            place = place_of(index) if isinstance(runtime, OnnxRuntime) and runtime.graphs else here
            costs = _slower(costs, warm_up(runtime, self._max_batch_size, place, fills_up=runtime.provider != "cpu"))
            place(partial(check_golden, runtime))
            if isinstance(runtime, OnnxRuntime):
                runtime.trim()
        return costs

    def load_newest(self, name: str, place_of: Callable[[int], Place]) -> LoadedVersion:
        """The newest version that is valid; each one that is not is logged with its reason.

        Raises:
            NoModel: none is, with the reason of each. DeviceLost, Draining, NotReady: no version could be tried to its end.
        """
        reasons = []
        for version in find_models(self.root).get(name, []):
            try:
                return self.load(name, version, place_of)
            except KNOWN as error:
                logger.error("model %s version %s is not served: %s", name, version, error)
                reasons.append(f"version {version}: {_load_error(error)}")
        raise NoModel(
            f"model {name!r} has no version that can be served; " + ("; ".join(reasons) or f"no {MODEL_FILE} in {self.root / name}")
        )


def _cannot_run(path: Path, error: Exception) -> RuntimeLoadError:
    """The reason in the library's own words, where it had any: `InferenceFailed` around them speaks to who sent an image."""
    logger.debug("%s fails in its first runs", path, exc_info=error)
    return RuntimeLoadError(f"{path}: it cannot run: {first_line(error.__cause__ or error)}")


def _slower(costs: CostTable, others: CostTable) -> CostTable:
    """What either device needs at most, for the batches that fit into both: any device may get any batch."""
    return {key: max(costs.get(key, 0.0), seconds) for key, seconds in others.items() if not costs or key in costs}


def _warn_of_other_identity(manifest: Manifest, name: str, version: str) -> None:
    """The folder decides what a version is called; a copy under another name works, but is rarely meant."""
    if (manifest.name, manifest.version) != (name, version):
        logger.warning("%s version %s was exported as %s version %s", name, version, manifest.name, manifest.version)


def open_onnx(
    *,
    provider: str,
    intra_op_threads: int | None,
    gpu_memory_limit_bytes: int | None,
    cuda_graphs: bool = False,
    on_unsettled: Callable[[int], None] = lambda count: None,
) -> OpenRuntime:
    """How this process opens model files; the arguments are OnnxRuntime's."""

    def open_runtime(path: Path, device: int, largest_batch: int) -> Runtime:
        return OnnxRuntime(
            path,
            provider=provider,
            intra_op_threads=intra_op_threads,
            gpu_memory_limit_bytes=gpu_memory_limit_bytes,
            device_id=device,
            cuda_graphs=cuda_graphs,
            largest_batch=largest_batch,
            on_unsettled=on_unsettled,
        )

    return open_runtime


def from_runtime(runtime: Runtime, max_batch_size: int) -> LoadedVersion:
    """A version around a runtime that the caller made, warmed and checked like any other."""
    started = time.perf_counter()
    costs = warm_up(runtime, max_batch_size)
    check_golden(runtime)
    return LoadedVersion(runtime.manifest.name, runtime.manifest.version, {0: runtime}, costs, "", time.perf_counter() - started)
