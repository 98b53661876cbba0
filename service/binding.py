"""Buffers that stay: a session whose inputs and outputs live at fixed places on a device, and one host buffer that batches are built in.

B images of a batch, H W a bucket's size.
"""

from __future__ import annotations

import ctypes
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.capture_gate import CAPTURES

BOUND_SHAPES = 32
"""Shapes whose device buffers are kept where any may come. Where batches are filled up there are few, and a recording keeps its addresses:
then all are."""
GRAPH_ID = "gpu_graph_id"
NO_GRAPH = "-1"
"""A run with this graph id is neither recorded nor replayed."""

CUDART_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
ELEMENT_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}

logger = logging.getLogger(__name__)

Pin = Callable[[int, int], bool]
"""(address, bytes) -> whether the memory is page-locked now."""


class HostBuffer:
    """One growing buffer for the batch that is built next. Views of it are valid until the next, larger `view`.

    A fresh array of some megabytes a batch costs a page fault every 4 KB, and what is not page-locked is copied once more on its way to a
    GPU; a buffer that stays saves both.
    """

    def __init__(self, pin: Pin | None = None, unpin: Callable[[int], None] | None = None) -> None:
        """Take the functions that page-lock memory and let it go; None on a CPU."""
        self._pin, self._unpin = pin, unpin
        self._bytes = np.empty(0, np.uint8)
        self._pinned = False

    def view(self, shape: Sequence[int]) -> NDArray[np.uint8]:
        """An array of this shape over the buffer; what it holds is whatever was written last."""
        needed = int(np.prod(shape))
        if needed > self._bytes.size:
            self.close()
            self._bytes = np.empty(needed, np.uint8)
            self._pinned = self._pin is not None and self._pin(self._bytes.ctypes.data, needed)
        return self._bytes[:needed].reshape(tuple(shape))

    def holds(self, array: NDArray[Any]) -> bool:
        """Whether the array begins where the buffer does: it was built in place."""
        return bool(self._bytes.size) and array.flags.c_contiguous and array.ctypes.data == self._bytes.ctypes.data

    def close(self) -> None:
        """Let page-locked memory go."""
        if self._pinned and self._unpin is not None:
            self._unpin(self._bytes.ctypes.data)
        self._pinned = False
        self._bytes = np.empty(0, np.uint8)


def pinned_buffer(device_id: int = 0, load: Callable[[str], Any] = ctypes.CDLL) -> HostBuffer:
    """A host buffer that CUDA copies from directly; a plain one where CUDA's runtime library cannot be found."""
    for name in CUDART_NAMES:
        try:
            library = load(name)
        except OSError:
            continue
        return _page_locking(library, device_id)
    logger.info("CUDA's runtime library was not found by name; batches go to the device from ordinary memory")
    return HostBuffer()


def _page_locking(cudart: Any, device_id: int) -> HostBuffer:
    """Each call names the device first, or CUDA would open a context on device 0 for it."""
    cudart.cudaHostRegister.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    cudart.cudaHostUnregister.argtypes = (ctypes.c_void_p,)
    portable = 1  # cudaHostRegisterPortable: page-locked for every device of the process

    def done(status: int) -> bool:
        if status != 0:
            cudart.cudaGetLastError()  # forgets it: the runtime's next look at this thread's last error would take it for its own
        return status == 0

    def pin(address: int, size: int) -> bool:
        with CAPTURES.beside():
            return done(cudart.cudaSetDevice(device_id)) and done(cudart.cudaHostRegister(address, size, portable))

    def unpin(address: int) -> None:
        with CAPTURES.beside():
            done(cudart.cudaSetDevice(device_id))
            done(cudart.cudaHostUnregister(address))

    return HostBuffer(pin, unpin)


@dataclass(slots=True)
class _Bound:
    binding: Any
    images: Any
    sizes_hw: Any
    outputs: list[Any]
    """Fixed output buffers; empty where the runtime allocates them."""
    options: Any


def full_size(count: int, largest: int | None = None) -> int:
    """How many images a batch of `count` is filled up to: the next power of two, or `largest` where that is less.

    Few sizes, so that a warm-up can run them all. A batch beyond `largest` stays as it is.
    """
    full = 1 << (count - 1).bit_length()
    return full if largest is None else max(count, min(full, largest))


class BoundSession:
    """Runs a session on buffers that stay on the device, one set a shape.

    Where the largest batch is known, smaller ones are filled up with empty pictures (`full_size`): a device that prepares itself for
    every new shape then meets none that the warm-up has not run. With `graphs` each shape's kernels are recorded once and replayed:
    inputs and outputs then have fixed addresses, and batches are filled up in any case.
    """

    def __init__(
        self,
        session: Any,
        outputs: Sequence[str],
        device_type: str,
        device_id: int = 0,
        *,
        graphs: bool = False,
        largest_batch: int | None = None,
        host: HostBuffer | None = None,
    ) -> None:
        """Take the session and the outputs to fetch.

        Args:
            graphs: the session was opened with `enable_cuda_graph`.
            largest_batch: no batch is larger, and smaller ones may be filled up; None runs every batch as it comes.
            host: where batches are built.
        """
        self.host = host or HostBuffer()
        self._session = session
        self._outputs = list(outputs)
        self._device = (device_type, device_id)
        self._graphs = graphs
        self._largest_batch = largest_batch
        self._fills_up = graphs or largest_batch is not None
        self._graph_ids = 0
        self._shapes: OrderedDict[tuple[int, ...], _Bound] = OrderedDict()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """[B, H, W, 3] of every batch that has buffers: what the session was run with."""
        return list(self._shapes)

    def run(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The outputs for images [B, H, W, 3] and sizes [B, 2]."""
        count = len(images)
        if self._fills_up:
            images, image_sizes_hw = self._fill_up(images, image_sizes_hw)
        new = images.shape not in self._shapes
        try:
            return self._run(self._bound(images.shape), images, image_sizes_hw, count)
        except Exception:
            if new:  # nothing was recorded, and its buffers are memory that a smaller batch may need
                self._shapes.pop(images.shape, None)
            raise

    def records(self, shape: Sequence[int]) -> bool:
        """Whether a batch of this shape would be recorded now."""
        count, *picture = shape
        return self._graphs and (full_size(count, self._largest_batch), *picture) not in self._shapes

    def _run(self, bound: _Bound, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64], count: int) -> list[NDArray[Any]]:
        bound.images.update_inplace(np.ascontiguousarray(images))
        bound.sizes_hw.update_inplace(np.ascontiguousarray(image_sizes_hw))
        self._session.run_with_iobinding(bound.binding, bound.options)
        if bound.outputs:
            return [np.array(value.numpy()[:count]) for value in bound.outputs]
        return [value[:count] for value in bound.binding.copy_outputs_to_cpu()]

    def _fill_up(self, images: NDArray[np.uint8], image_sizes_hw: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        count = len(images)
        full = full_size(count, self._largest_batch)
        if full == count:
            return images, image_sizes_hw
        built_in_place = self.host.holds(images)
        filled = self.host.view((full, *images.shape[1:]))
        if not (built_in_place and self.host.holds(images)):  # the buffer moved when it grew; the old one lives on in `images`
            filled[:count] = images
        return filled, np.concatenate([image_sizes_hw, np.zeros((full - count, 2), np.int64)])

    def _bound(self, shape: tuple[int, ...]) -> _Bound:
        if shape not in self._shapes:
            self._shapes[shape] = self._bind(shape)
            if len(self._shapes) > BOUND_SHAPES and not self._fills_up:
                self._shapes.popitem(last=False)
        self._shapes.move_to_end(shape)
        return self._shapes[shape]

    def _bind(self, shape: tuple[int, ...]) -> _Bound:
        images = self._allocate(shape, np.uint8)
        sizes_hw = self._allocate((shape[0], 2), np.int64)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", images)
        binding.bind_ortvalue_input("image_sizes_hw", sizes_hw)
        options = ort.RunOptions()
        if not self._graphs:
            for name in self._outputs:
                binding.bind_output(name, *self._device)
            return _Bound(binding, images, sizes_hw, [], options)
        self._graph_ids += 1  # never used twice: the runtime would replay the recording of another shape
        options.add_run_config_entry(GRAPH_ID, str(self._graph_ids))
        outputs = [self._output(name, shape[0]) for name in self._outputs]
        for name, value in zip(self._outputs, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        return _Bound(binding, images, sizes_hw, outputs, options)

    def _output(self, name: str, batch: int) -> Any:
        described = next(value for value in self._session.get_outputs() if value.name == name)
        return self._allocate((batch, *described.shape[1:]), ELEMENT_TYPES[described.type])

    def _allocate(self, shape: Sequence[int], element_type: Any) -> Any:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element_type, *self._device)
