"""Which versions serve: loaded aside, swapped in one step, rolled back, retired when their last request is answered.

Everything here runs on the event loop; the loader's blocking work goes to a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from service.errors import LoadFailed, ModelNotFound, NotReady
from service.images import Prepared
from service.loading import MODEL_FILE, LoadedVersion, Loader, NoModel, find_models, parse_reference
from service.manifest import Bucket, Manifest
from service.metrics import Metrics
from service.scheduler import Assemble, Run, Scheduler

logger = logging.getLogger(__name__)

DRIFT_MARGIN = 4.0
"""How much slower than its warm-up a device may get before the queue's own estimate is asked."""

MakeSteps = Callable[[LoadedVersion], tuple[Assemble, Run]]
_serials = itertools.count(1)


def grey_picture(bucket: Bucket) -> Prepared:
    """A picture that fills its bucket and that any device which is well can look at. It takes no memory: every pixel is the same one."""
    return Prepared(np.broadcast_to(np.uint8(114), (*bucket, 3)), bucket, bucket)


class ServedVersion:
    """A version that takes requests. Whoever uses it holds a lease; it is closed when it is retired and no lease is left."""

    def __init__(self, loaded: LoadedVersion) -> None:
        self.loaded = loaded
        self._serial = next(_serials)
        self._leases = 0
        self.slowest_image_s = DRIFT_MARGIN * max(seconds / size for (_, size), seconds in loaded.costs.items())
        """More than an image takes, decoding left out."""
        self._unused = asyncio.Event()
        self._unused.set()

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def version(self) -> str:
        return self.loaded.version

    @property
    def manifest(self) -> Manifest:
        return self.loaded.manifest

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    def lane(self, bucket: Bucket) -> tuple[int, Bucket]:
        """The scheduler's lane for one bucket of this very load: loading the same version again makes other lanes."""
        return (self._serial, bucket)

    @property
    def lanes(self) -> list[tuple[int, Bucket]]:
        return [self.lane(bucket) for bucket in self.manifest.input.buckets]

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Keep the version open for the length of one request."""
        self._leases += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._leases -= 1
            if self._leases == 0:
                self._unused.set()

    async def unused(self) -> None:
        """Wait until no lease is left."""
        await self._unused.wait()


class Repository:
    """The versions in service, by name and by name@version."""

    def __init__(
        self, loader: Loader | None, scheduler: Scheduler, metrics: Metrics, make_steps: MakeSteps, *, max_batch_size: int
    ) -> None:
        self._loader = loader
        self._scheduler = scheduler
        self._metrics = metrics
        self._make_steps = make_steps
        self._max_batch_size = max_batch_size
        self._active: dict[str, ServedVersion] = {}
        self._default: str | None = None
        """The name that a request means which names no model; it stays the default while it is unloaded."""
        self._unloaded: set[str] = set()
        self._pinned: dict[tuple[str, str], ServedVersion] = {}
        self._beside: list[ServedVersion] = []
        self._previous: dict[str, str] = {}
        self._tried: dict[tuple[str, str], tuple[int, int]] = {}
        self._loading = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    # Lookup

    @property
    def served(self) -> list[ServedVersion]:
        """Every version that takes requests, the default model's first."""
        versions = sorted(self._active.values(), key=lambda served: served.name != self._default)
        return versions + [pinned for pinned in self._pinned.values() if pinned not in versions]

    def is_active(self, served: ServedVersion) -> bool:
        """Whether requests that name no version of this model get this one."""
        return self._active.get(served.name) is served

    def resolve(self, reference: str | None) -> ServedVersion:
        """The version that a request means: the default model, a name's active version, or exactly name@version.

        Raises:
            ModelNotFound: says what is served. NotReady: nothing is, yet or any more.
        """
        if not self._active:
            raise NotReady(self.why_nothing_is_served(), retry_after_s=2.0)
        if reference is None:
            assert self._default is not None  # set with the first active version
            reference = self._default
        name, _, version = reference.partition("@")
        active = self._active.get(name)
        if active is not None and version in ("", active.version):
            return active
        pinned = self._pinned.get((name, version))
        if pinned is not None:
            return pinned
        known = [served.reference for served in self.served]
        if name in self._unloaded:
            raise ModelNotFound(f"model {name!r} was unloaded and answers again when it is loaded; served: {', '.join(known)}")
        near = get_close_matches(reference, [*known, *self._active], n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelNotFound(f"model {reference[:80]!r} is not served; {hint}served: {', '.join(known)}")

    def why_nothing_is_served(self) -> str:
        """A sentence for clients and probes while no version takes requests."""
        if not self._unloaded:
            return "no model is loaded yet; ask again in a moment"
        return f"every model was unloaded ({', '.join(sorted(self._unloaded))}); load one to have answers again"

    def was_unloaded(self, name: str) -> bool:
        """Whether the model left service on request, and nothing brought it back."""
        return name in self._unloaded

    def on_disk(self) -> dict[str, list[str]]:
        """Names in the repository's folder -> their versions, newest first."""
        return find_models(self._loader.root) if self._loader is not None else {}

    def versions_on_disk(self, name: str) -> list[str]:
        """Version folders of a model, newest first."""
        return self.on_disk().get(name, [])

    # Change

    async def start(self, wanted: Sequence[tuple[str, str | None]]) -> None:
        """Load what the settings ask for. Raises NoModel, RuntimeLoadError, ManifestError or GoldenMismatch."""
        async with self._loading:
            for name, version in wanted:
                self.adopt(await self._open(name, version), pinned=version is not None)

    def adopt(self, loaded: LoadedVersion, *, pinned: bool = False) -> ServedVersion:
        """Take a loaded version into service; it becomes its name's active one unless that name has one already."""
        served = self.enter(loaded, group=loaded.name)
        self._activate(loaded.name, self._active.get(loaded.name, served))
        if pinned:
            self._pinned[loaded.name, loaded.version] = served
        return served

    def enter(self, loaded: LoadedVersion, *, group: str) -> ServedVersion:
        """Open the version's lanes, without making it anybody's default."""
        served = ServedVersion(loaded)
        assemble, run = self._make_steps(loaded)
        for bucket in loaded.manifest.input.buckets:
            costs, key = loaded.bucket_costs(bucket), served.lane(bucket)
            self._scheduler.add_lane(
                key, run, costs=costs, max_batch_size=self._max_batch_size, group=group, assemble=assemble, known_good=grey_picture(bucket)
            )
        self._metrics.model_info.labels(loaded.name, loaded.version, loaded.sha256, loaded.provider).set(1)
        self._metrics.model_load_seconds.observe(loaded.load_seconds)
        fields = {"model": loaded.name, "version": loaded.version, "provider": loaded.provider, "seconds": round(loaded.load_seconds, 3)}
        logger.info("version in service", extra={"fields": fields})
        return served

    async def enter_beside(self, name: str, version: str) -> ServedVersion:
        """Load a version that no request can ask for: a shadow's candidate."""
        async with self._loading:
            loaded = await self._open(name, version)
        self._beside.append(self.enter(loaded, group=name))
        return self._beside[-1]

    async def load(self, name: str, version: str | None = None) -> ServedVersion:
        """Load a version aside (the newest valid one where none is named), then let it answer in place of the active one.

        Raises:
            ModelNotFound: no such folder. LoadFailed: why; the version before it still serves.
        """
        loader = self._require_loader()
        on_disk = self.versions_on_disk(name)
        if not on_disk or (version is not None and version not in on_disk):
            shown = name if version is None else f"{name}@{version}"
            raise ModelNotFound(f"no {shown[:80]!r} in the repository; it holds {', '.join(find_models(loader.root)) or 'no model'}")
        async with self._loading:
            try:
                loaded = await self._open(name, version)
            except Exception as error:
                self._metrics.reloads["failed"].inc()
                logger.error("model %s was not loaded: %s", name, error)
                still = self._active.get(name)
                kept = f"; {still.reference} still serves" if still is not None else ""
                raise LoadFailed(f"{error}{kept}") from error
            self._metrics.reloads["ok"].inc()
            return self._swap(loaded)

    async def rollback(self, name: str) -> ServedVersion:
        """Serve the version that served before, or else the next older one on disk. The newer one is not watched for again.

        Raises:
            ModelNotFound: nothing to go back to. LoadFailed: it does not load any more.
        """
        active = self._active.get(name)
        if active is None:
            raise ModelNotFound(f"model {name[:80]!r} is not served; served: {', '.join(self._active)}")
        older = [version for version in self.versions_on_disk(name) if int(version) < int(active.version)]
        target = self._previous.get(name) or next(iter(older), None)
        if target is None:
            raise ModelNotFound(f"{active.reference} has no version before it; on disk: {', '.join(self.versions_on_disk(name)) or 'none'}")
        self._tried[name, active.version] = self._signature(name, active.version)
        served = await self.load(name, target)
        self._previous.pop(name, None)
        return served

    async def unload(self, name: str) -> None:
        """Take every version of a model out of service until it is loaded again. Requests in flight finish, then its memory is given back.

        Raises:
            ModelNotFound: it never was in service.
        """
        async with self._loading:  # a load that is under way ends first, so that it cannot bring the model back
            leaving = [served for served in self.served if served.name == name]
            if not leaving and name in self._unloaded:
                return
            if not leaving:
                known = ", ".join(served.reference for served in self.served) or "nothing"
                raise ModelNotFound(f"model {name[:80]!r} is not served, so it cannot be unloaded; served: {known}")
            self._active.pop(name, None)
            self._pinned = {key: served for key, served in self._pinned.items() if served not in leaving}
            self._unloaded.add(name)
            for served in leaving:
                self._retire_soon(served)
        logger.info("model unloaded", extra={"fields": {"model": name, "versions": [served.version for served in leaving]}})

    async def _open(self, name: str, version: str | None) -> LoadedVersion:
        loader, place_of = self._require_loader(), self._scheduler.place
        if version is None:
            return await asyncio.to_thread(loader.load_newest, name, place_of)
        return await asyncio.to_thread(loader.load, name, version, place_of)

    def _activate(self, name: str, served: ServedVersion) -> None:
        self._active[name] = served
        self._default = self._default or name
        self._unloaded.discard(name)

    def _swap(self, loaded: LoadedVersion) -> ServedVersion:
        served = self.enter(loaded, group=loaded.name)
        old = self._active.get(loaded.name)
        self._activate(loaded.name, served)
        if old is None and self._previous.get(loaded.name) == loaded.version:
            del self._previous[loaded.name]  # it came back itself after it was unloaded
        if (loaded.name, loaded.version) in self._pinned:
            replaced = self._pinned[loaded.name, loaded.version]
            self._pinned[loaded.name, loaded.version] = served
            if replaced is not old:
                self._retire_soon(replaced)
        if old is not None:
            if old.version != loaded.version:
                self._previous[loaded.name] = old.version
            if old not in self._pinned.values():
                self._retire_soon(old)
        return served

    def _retire_soon(self, served: ServedVersion) -> None:
        task = asyncio.create_task(self.retire(served))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def retire(self, served: ServedVersion) -> None:
        """Let what is in flight finish, then give the version's memory back."""
        await served.unused()
        await self._scheduler.remove_lanes(served.lanes)
        loaded = served.loaded
        await asyncio.to_thread(loaded.close)
        if not any(
            (other.name, other.version, other.loaded.sha256) == (loaded.name, loaded.version, loaded.sha256) for other in self.served
        ):
            self._metrics.model_info.remove(loaded.name, loaded.version, loaded.sha256, loaded.provider)
        logger.info("version retired", extra={"fields": {"model": loaded.name, "version": loaded.version}})

    async def close(self) -> None:
        """Wait for retirements and close what is left; the scheduler must have stopped."""
        await asyncio.gather(*self._retiring, return_exceptions=True)
        for served in [*self.served, *self._beside]:
            await asyncio.to_thread(served.loaded.close)
        self._active.clear()
        self._pinned.clear()

    # Watching

    async def watch(self, every_s: float) -> None:
        """Look for versions newer than the active ones, for ever. A file that failed is tried again only after it changed."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._take_newer()
            except Exception as error:  # a disk that cannot be read now may be read at the next look
                logger.error("new versions cannot be looked for; the next look is in %g s", every_s, exc_info=error)

    async def _take_newer(self) -> None:
        for name, version in await asyncio.to_thread(self._find_newer):
            if name not in self._active:  # unloaded meanwhile
                continue
            try:
                await self.load(name, version)
            except (LoadFailed, ModelNotFound) as error:
                logger.error("new version %s@%s is not served: %s", name, version, error.detail)

    def _find_newer(self) -> list[tuple[str, str]]:
        """The newest version of each served name that is newer than the active one and was not tried in this state."""
        newer = []
        for name, served in list(self._active.items()):
            for version in self.versions_on_disk(name):
                if int(version) <= int(served.version):
                    break
                signature = self._signature(name, version)
                if self._tried.get((name, version)) != signature:
                    self._tried[name, version] = signature
                    newer.append((name, version))
                    break
        return newer

    def _signature(self, name: str, version: str) -> tuple[int, int]:
        """Changes when the file does: modification time and size."""
        path: Path = self._require_loader().root / name / version / MODEL_FILE
        try:
            stat = path.stat()
        except OSError:
            return (0, 0)
        return (stat.st_mtime_ns, stat.st_size)

    def _require_loader(self) -> Loader:
        if self._loader is None:
            raise LoadFailed(
                "this service was given its runtime and has no repository; start it with DETECTOR_MODEL_REPOSITORY to load versions"
            )
        return self._loader


__all__ = ["NoModel", "Repository", "ServedVersion", "parse_reference"]
