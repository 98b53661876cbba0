"""Buffers that stay: reused in real sessions on the CPU, page-locked through a stand-in for CUDA, graphs told apart by their ids."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from service_fakes import detect_colours
from service_onnx import write_model
from test_service_runtime import BATCHES, random_batch

from service.binding import BOUND_SHAPES, GRAPH_ID, BoundSession, HostBuffer, full_size, pinned_buffer
from service.providers import PROVIDER_NAMES, RuntimeLoadError, provider_stack, session_options, strict_session
from service.runtime import OUTPUTS, OnnxRuntime
from service.tensorrt import EnginePlan


class Told:
    """A session that notes the options of every run; the work is done by the real one."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.graph_ids: list[str] = []
        self.batch_sizes: list[int] = []

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run_with_iobinding(self, binding, options):
        self.graph_ids.append(options.get_run_config_entry(GRAPH_ID))
        self._session.run_with_iobinding(binding, options)
        self.batch_sizes.append(len(binding.copy_outputs_to_cpu()[0]))


@pytest.fixture
def session(tmp_path):
    return ort.InferenceSession(str(write_model(tmp_path)), providers=["CPUExecutionProvider"])


def assert_right(found, images, sizes_hw):
    for part, expected in zip(found, detect_colours(images, sizes_hw), strict=True):
        assert part.dtype == expected.dtype
        np.testing.assert_allclose(part, expected, atol=1e-4)


def test_bound_buffers_answer_as_plain_runs_and_are_bounded(session):
    bound = BoundSession(session, OUTPUTS, "cpu")
    for shape in [*BATCHES, BATCHES[0], *((1 + n % 40, 32, 64 + 32 * (n % 3)) for n in range(60))]:
        images, sizes_hw = random_batch(shape)
        assert_right(bound.run(images, sizes_hw), images, sizes_hw)
    assert len(bound._shapes) == BOUND_SHAPES


def test_a_shape_keeps_its_device_buffers(session):
    bound = BoundSession(session, OUTPUTS, "cpu")
    addresses = set()
    for _ in range(3):
        bound.run(*random_batch((2, 96, 160)))
        addresses.add(next(iter(bound._shapes.values())).images.data_ptr())
    assert len(addresses) == 1


def test_an_answer_outlives_the_runs_after_it(session):
    bound = BoundSession(session, OUTPUTS, "cpu", graphs=True)
    first = random_batch((2, 96, 160))
    answer = bound.run(*first)
    bound.run(np.full((2, 96, 160, 3), 9, np.uint8), np.array([[40, 50]] * 2))
    assert_right(answer, *first)


def test_graphs_run_powers_of_two_at_fixed_addresses_with_an_id_a_shape(session):
    told = Told(session)
    bound = BoundSession(told, OUTPUTS, "cpu", graphs=True)
    outputs = set()
    for count in (1, 3, 4, 3, 7, 1):
        images, sizes_hw = random_batch((count, 96, 160))
        assert_right(bound.run(images, sizes_hw), images, sizes_hw)
        outputs.add((count, tuple(value.data_ptr() for value in bound._bound((1 << (count - 1).bit_length(), 96, 160, 3)).outputs)))
    assert told.batch_sizes == [1, 4, 4, 4, 8, 1]
    assert told.graph_ids == ["1", "2", "2", "2", "3", "1"]  # 0 is the runtime's own, and a recording belongs to one shape
    assert len(outputs) == 4  # one set of addresses for each count that came


def test_batches_are_filled_up_to_powers_of_two_and_not_beyond_the_largest():
    assert [full_size(count, 12) for count in (1, 2, 3, 4, 5, 8, 9, 12, 13)] == [1, 2, 4, 4, 8, 8, 12, 12, 13]
    assert [full_size(count) for count in (1, 3, 9)] == [1, 4, 16]


def test_a_session_that_knows_its_largest_batch_keeps_the_buffers_of_every_size(session):
    bound = BoundSession(session, OUTPUTS, "cpu", largest_batch=6)
    widths = range(32, 32 * 20, 32)
    for width in widths:
        for count in (3, 5, 6, 1, 2, 4):
            images, sizes_hw = random_batch((count, 96, width))
            assert_right(bound.run(images, sizes_hw), images, sizes_hw)
    assert sorted(bound.shapes) == sorted((count, 96, width, 3) for width in widths for count in (1, 2, 4, 6))


def test_a_batch_built_in_the_host_buffer_is_filled_up_without_losing_rows(session):
    host = HostBuffer()
    bound = BoundSession(session, OUTPUTS, "cpu", graphs=True, host=host)
    for count in (3, 5, 6, 2):
        images, sizes_hw = random_batch((count, 96, 160))
        view = host.view(images.shape)
        view[:] = images
        assert host.holds(view)
        assert_right(bound.run(view, sizes_hw), images, sizes_hw)


def test_the_host_buffer_is_one_piece_of_memory_that_only_grows():
    host = HostBuffer()
    large = host.view((4, 96, 160, 3))
    address = large.ctypes.data
    assert host.view((2, 160, 96, 3)).ctypes.data == address
    assert not host.holds(np.zeros((2, 3), np.uint8))
    host.view((8, 96, 160, 3))
    assert host.view((4, 96, 160, 3)).shape == (4, 96, 160, 3)


class CudaRuntime:
    """Stands in for CUDA's runtime library: notes every call, and answers with the status that it was given."""

    class Function:
        def __init__(self, name, status, calls):
            self.name, self.status, self.calls = name, status, calls

        def __call__(self, *arguments):
            self.calls.append((self.name, *arguments))
            return self.status

    def __init__(self, **statuses):
        self.calls = []
        for name in ("cudaSetDevice", "cudaHostRegister", "cudaHostUnregister", "cudaGetLastError"):
            setattr(self, name, self.Function(name, statuses.get(name, 0), self.calls))

    def load(self, name):
        if name != "libcudart.so.12":
            raise OSError("not here")
        return self


def test_page_locked_memory_is_locked_once_and_let_go_when_it_grows():
    cuda = CudaRuntime()
    host = pinned_buffer(1, cuda.load)
    small = host.view((1, 10, 10, 3)).ctypes.data
    host.view((1, 10, 10, 3))
    host.view((1, 5, 5, 3))
    device = ("cudaSetDevice", 1)  # before every call: another one would open a context on device 0
    assert cuda.calls == [device, ("cudaHostRegister", small, 300, 1)]
    large = host.view((2, 10, 10, 3)).ctypes.data
    host.close()
    unlock_small, lock_large, unlock_large = (
        ("cudaHostUnregister", small),
        ("cudaHostRegister", large, 600, 1),
        ("cudaHostUnregister", large),
    )
    assert cuda.calls[2:] == [device, unlock_small, device, lock_large, device, unlock_large]


@pytest.mark.parametrize("failing", ["cudaHostRegister", "cudaSetDevice"])
def test_memory_that_cannot_be_locked_is_ordinary_and_leaves_no_error_behind(failing):
    cuda = CudaRuntime(**{failing: 2})
    host = pinned_buffer(0, cuda.load)
    host.view((2, 3))[:] = 7
    host.close()
    names = [name for name, *_ in cuda.calls]
    assert names[names.index(failing) + 1] == "cudaGetLastError"
    assert "cudaHostUnregister" not in names


def test_without_cudas_library_or_its_consent_memory_is_ordinary():
    def missing(name):
        raise OSError(name)

    freed = []
    for host in (pinned_buffer(0, missing), HostBuffer(lambda address, size: False, freed.append)):
        host.view((2, 3))[:] = 7
        host.close()
    assert freed == []


def test_a_runtime_builds_its_batches_in_one_place(tmp_path):
    runtime = OnnxRuntime(write_model(tmp_path))
    addresses = set()
    for shape in ((3, 96, 160), (2, 160, 96), (3, 96, 160)):
        images, sizes_hw = random_batch(shape)
        buffer = runtime.input_buffer(images.shape)
        buffer[:] = images
        addresses.add(buffer.ctypes.data)
        assert_right(runtime.run(buffer, sizes_hw), images, sizes_hw)
    assert len(addresses) == 1


def test_cuda_graphs_are_refused_for_a_file_that_waits_for_the_host(tmp_path, monkeypatch):
    path = write_model(tmp_path)
    real = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    told = SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider"],
        get_inputs=real.get_inputs,
        get_outputs=real.get_outputs,
        get_overridable_initializers=real.get_overridable_initializers,
        get_modelmeta=real.get_modelmeta,
    )
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("service.runtime.open_session", lambda *_: told)
    with pytest.raises(RuntimeLoadError, match=r"CUDA graphs need a file with dense NMS.*unset DETECTOR_CUDA_GRAPHS"):
        OnnxRuntime(path, provider="cuda", cuda_graphs=True)


def test_a_file_that_cuda_graphs_cannot_record_is_not_called_incomplete(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("This session cannot use the graph capture feature as requested by the user")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(RuntimeLoadError, match=r"CUDA graphs cannot record this file.*unset DETECTOR_CUDA_GRAPHS") as raised:
        OnnxRuntime(write_model(tmp_path), provider="cuda", cuda_graphs=True)
    assert "complete model.onnx" not in str(raised.value)


@pytest.mark.parametrize(("provider", "expected"), [("cuda", ["1"]), ("tensorrt", [None])])
def test_shapes_are_recorded_only_where_cuda_itself_runs_the_file(tmp_path, monkeypatch, provider, expected):
    asked = []

    def note(path, name, stack, threads):
        options = dict(entry for entry in stack if isinstance(entry, tuple))
        asked.append(options["CUDAExecutionProvider"].get("enable_cuda_graph"))
        raise RuntimeLoadError("seen enough")

    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDER_NAMES.values()))
    monkeypatch.setattr("service.runtime.require_engines", lambda path, device: EnginePlan(tmp_path, (), 1, {}))
    monkeypatch.setattr("service.runtime.open_session", note)
    with pytest.raises(RuntimeLoadError, match="seen enough"):
        OnnxRuntime(write_model(tmp_path), provider=provider, cuda_graphs=True)
    assert asked == expected


@pytest.mark.parametrize(("provider", "given", "expected"), [("cpu", None, None), ("tensorrt", None, "0"), ("tensorrt", "1", "1")])
def test_nvidias_libraries_are_told_to_leave_fp32_alone_before_they_load(provider, given, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", given or "")
    if given is None:
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    seen = []
    monkeypatch.setattr(ort, "preload_dlls", lambda: seen.append(os.environ.get("NVIDIA_TF32_OVERRIDE")), raising=False)
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: seen.append(os.environ.get("NVIDIA_TF32_OVERRIDE")))
    strict_session(write_model(tmp_path), session_options(provider), provider_stack(provider))
    assert set(seen) == {expected}


def test_threads_spin_for_a_moment_within_a_run_and_leave_the_cpu_after_it():
    options = session_options("cpu")
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.get_session_config_entry("session.intra_op.spin_duration_us") == "50"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_cuda_options_are_those_for_few_fixed_shapes():
    (name, options), fallback = provider_stack("cuda", device_id=1, memory_limit=1 << 30, cuda_graphs=True)
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {
        "device_id": 1,
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        "gpu_mem_limit": 1 << 30,
        "enable_cuda_graph": "1",
    }
    assert "enable_cuda_graph" not in provider_stack("cuda")[0][1]
    assert provider_stack("cpu", cuda_graphs=True) == ["CPUExecutionProvider"]
