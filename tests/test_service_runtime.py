from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail
from service_fakes import FakeRuntime, detect_colours, make_manifest
from service_onnx import colour_graph, golden, write_model

from service.batch_costs import BatchCosts
from service.binding import BoundSession
from service.device_calls import here
from service.device_errors import DeviceLost, DeviceOutOfMemory, classify_device_error
from service.errors import InferenceFailed
from service.golden import GoldenMismatch, check_golden
from service.loading import Loader
from service.manifest import ManifestError
from service.providers import open_session, provider_stack
from service.runtime import (
    OUTPUTS,
    Detections,
    OnnxRuntime,
    ProviderMissing,
    RuntimeLoadError,
    provider_candidates,
)
from service.warm_up import telling_picture, warm_up

BATCHES = [(1, 96, 160), (2, 160, 96), (3, 128, 128), (7, 96, 160)]


def random_batch(shape):
    batch, height, width = shape
    rng = np.random.default_rng(sum(shape))
    images = np.zeros((batch, height, width, 3), np.uint8)
    sizes_hw = np.stack([rng.integers(height // 2, height, batch), rng.integers(width // 2, width, batch)], axis=1)
    for image, (h, w) in zip(images, sizes_hw, strict=True):
        image[:h, :w] = rng.integers(0, 255, 3)
    return images, sizes_hw


@pytest.mark.parametrize("shape", BATCHES)
def test_onnx_runtime_answers_as_computed_by_hand(tmp_path, shape):
    runtime = OnnxRuntime(write_model(tmp_path))
    images, sizes_hw = random_batch(shape)
    for found, expected in zip(runtime.run(images, sizes_hw), detect_colours(images, sizes_hw), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_provider_in_use_is_known_and_the_manifest_read(tmp_path):
    runtime = OnnxRuntime(write_model(tmp_path), provider="auto", intra_op_threads=1)
    assert runtime.provider == ("cuda" if "CUDAExecutionProvider" in ort.get_available_providers() else "cpu")
    assert runtime.manifest.class_names == ["red", "green", "blue"]


def test_missing_provider_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderMissing, match=r"'cuda' was asked for.*DETECTOR_PROVIDER=auto"):
        provider_candidates("cuda")
    assert provider_candidates("auto") == ["cpu"]


def test_a_provider_that_does_not_load_is_no_silent_fallback(tmp_path, monkeypatch):
    """ONNX Runtime falls back to the CPU with a mere warning when CUDA's libraries are missing; the session tells what it took."""
    path = write_model(tmp_path)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    only_cpu = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    monkeypatch.setattr("service.runtime.open_session", lambda *_: only_cpu)
    with pytest.raises(ProviderMissing, match="did not load"):
        OnnxRuntime(path, provider="cuda")
    assert OnnxRuntime(path, provider="auto").provider == "cpu"


def test_a_provider_that_fails_is_not_replaced_behind_our_back(tmp_path, capsys):
    """Python's class of ONNX Runtime would print a line and open or run the session on the CPU."""
    path = write_model(tmp_path)
    broken = [("TensorrtExecutionProvider", "no options"), "CPUExecutionProvider"]
    with pytest.raises(RuntimeLoadError, match=r"cannot open it with the provider 'tensorrt'.*\(string, dict\)"):
        open_session(path, "tensorrt", broken)
    session = open_session(path, "cpu", provider_stack("cpu"))

    def fail(*_):
        raise EPFail("engine could not be executed")

    session._sess = SimpleNamespace(run=fail, is_webgpu_graph_capture_enabled=lambda: False)
    images, sizes_hw = random_batch((1, 96, 160))
    with pytest.raises(EPFail, match="engine could not be executed"):
        session.run(None, {"images": images, "image_sizes_hw": sizes_hw})
    assert "alling back" not in capsys.readouterr().out


def test_auto_takes_the_cpu_where_cuda_cannot_be_opened(tmp_path, monkeypatch, caplog):
    path = write_model(tmp_path)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    def no_device(path, provider, stack, threads=None):
        if provider == "cuda":
            raise RuntimeLoadError("CUDA failure 100: no CUDA-capable device is detected")
        return open_session(path, provider, stack, threads)

    monkeypatch.setattr("service.runtime.open_session", no_device)
    assert OnnxRuntime(path, provider="auto").provider == "cpu"
    assert "no CUDA-capable device" in caplog.text
    with pytest.raises(RuntimeLoadError, match="no CUDA-capable device"):
        OnnxRuntime(path, provider="cuda")


def test_garbage_is_refused_with_a_sentence(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is no model" * 100)
    with pytest.raises(RuntimeLoadError, match=r"is it a complete model\.onnx"):
        OnnxRuntime(path)


def test_half_a_file_is_refused(tmp_path):
    path = write_model(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((RuntimeLoadError, ManifestError)):
        OnnxRuntime(path)


def test_a_file_without_manifest_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(colour_graph(), path)
    with pytest.raises(ManifestError, match="python -m export"):
        OnnxRuntime(path)


def test_a_file_with_other_inputs_is_refused(tmp_path):
    graph = colour_graph()
    for node in graph.graph.node:
        node.input[:] = ["picture" if name == "images" else name for name in node.input]
    graph.graph.input[0].name = "picture"
    path = tmp_path / "model.onnx"
    onnx.save(graph, path)
    with pytest.raises(RuntimeLoadError, match=r"expected inputs .*found \['image_sizes_hw', 'picture'\]"):
        OnnxRuntime(path)


def test_a_closed_runtime_answers_nothing(tmp_path):
    runtime = OnnxRuntime(write_model(tmp_path))
    runtime.close()
    with pytest.raises(InferenceFailed, match="closed"):
        runtime.run(*random_batch((1, 96, 160)))


def test_a_failing_session_becomes_an_inference_failure(tmp_path):
    runtime = OnnxRuntime(write_model(tmp_path))
    with pytest.raises(InferenceFailed):
        runtime.run(np.zeros((1, 96, 160), np.uint8), np.zeros((1, 2), np.int64))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", DeviceOutOfMemory),
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 123", DeviceOutOfMemory),
        ("CUDA failure 700: an illegal memory access was encountered", DeviceLost),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0", DeviceLost),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0", DeviceLost),
        ("GPU 0000:3b:00.0 has fallen off the bus", DeviceLost),
        ("BFCArena::Extend: CUDA failure 719: unspecified launch failure ; expr=cudaMalloc", DeviceLost),
        ("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", DeviceOutOfMemory),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", DeviceOutOfMemory),
        ("CUDA failure 1: invalid argument ; GPU=0", InferenceFailed),
        ("CUDA failure 70: something else", InferenceFailed),
        ("Got invalid dimensions for input: images", InferenceFailed),
    ],
)
def test_device_errors_are_told_apart_by_their_words(text, kind):
    assert type(classify_device_error(RuntimeError(text))) is kind


@pytest.mark.parametrize("code", [46, 100, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999])
def test_a_cuda_error_after_which_nothing_runs_is_known_by_its_number(code):
    assert type(classify_device_error(RuntimeError(f"CUDA failure {code}: words of another release ; GPU=0"))) is DeviceLost


def test_warm_up_times_every_bucket_and_stops_where_batches_bring_nothing():
    linear = FakeRuntime(seconds_per_image=0.004)
    table = warm_up(linear, 16)
    assert {bucket for bucket, _ in table} == set(linear.manifest.input.buckets)
    assert max(size for _, size in table) <= 4
    assert all(seconds > 0 for seconds in table.values())


def test_warm_up_goes_to_the_largest_batch_where_batching_pays():
    constant = FakeRuntime(seconds=0.02)
    assert {size for _, size in warm_up(constant, 12)} == {1, 2, 4, 8, 12}


@pytest.fixture
def patient(monkeypatch):
    """A warm-up that tries every size, however long a busy machine took for the one before."""
    monkeypatch.setattr("service.warm_up.WORTHWHILE", float("inf"))


def shapes_run_in_warm_up(runtime: FakeRuntime, max_batch_size: int) -> set[tuple[int, tuple[int, int]]]:
    shapes = set()
    runtime.before_run = lambda images: shapes.add((len(images), images.shape[1:3]))
    warm_up(runtime, max_batch_size)
    return shapes


@pytest.mark.usefixtures("patient")
def test_every_shape_is_run_on_a_device_that_prepares_itself_for_shapes():
    runtime = FakeRuntime(seconds=0.003)
    assert shapes_run_in_warm_up(runtime, 6) == {(size, bucket) for size in (1, 2, 4, 6) for bucket in runtime.manifest.input.buckets}


class BoundRuntime(FakeRuntime):
    """A runtime whose session sits behind the buffers that a GPU's has."""

    def __init__(self, path: Path, largest_batch: int) -> None:
        super().__init__()
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.bound = BoundSession(self.session, OUTPUTS, "cpu", largest_batch=largest_batch)

    def run(self, images, image_sizes_hw):
        return Detections(*self.bound.run(images, image_sizes_hw))


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("largest", [1, 5, 8, 12])
def test_no_batch_that_the_scheduler_may_take_brings_a_shape_that_was_not_warmed(tmp_path, largest):
    runtime = BoundRuntime(write_model(tmp_path), largest)
    table = warm_up(runtime, largest, fills_up=True)
    warmed = set(runtime.bound.shapes)
    assert set(table) == {(bucket, size) for bucket in runtime.manifest.input.buckets for size in range(1, largest + 1)}
    for bucket, size in table:
        images, sizes_hw = random_batch((size, *bucket))
        for found, expected in zip(runtime.run(images, sizes_hw), detect_colours(images, sizes_hw), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert set(runtime.bound.shapes) == warmed


@pytest.mark.usefixtures("patient")
def test_a_size_that_is_filled_up_is_charged_what_it_really_takes():
    runtime = FakeRuntime(seconds=0.002, seconds_per_image=0.001)
    assert set(warm_up(runtime, 8)) == {(bucket, size) for bucket in runtime.manifest.input.buckets for size in (1, 2, 4, 8)}
    table = warm_up(runtime, 8, fills_up=True)
    for bucket in make_manifest().input.buckets:
        assert len({table[bucket, size] for size in (5, 6, 7, 8)}) == 1
        assert table[bucket, 3] == table[bucket, 4] != table[bucket, 8]


def test_the_warm_up_shows_a_picture_with_something_to_find():
    manifest = make_manifest(golden=[golden(0.9)])
    runtime, shown = FakeRuntime(manifest, seconds=0.001), []
    runtime.before_run = shown.append
    warm_up(runtime, 1)
    original = telling_picture(manifest)
    assert {image.shape[1:3] for image in shown} == set(manifest.input.buckets)
    for images in shown:
        height, width = (min(sides) for sides in zip(images.shape[1:3], original.shape[:2], strict=True))
        np.testing.assert_array_equal(images[0, :height, :width], original[:height, :width])
        assert images[0, -1, -1].tolist() == [220, 30, 30]  # to the last corner
    assert telling_picture(make_manifest()).std() > 50


def fits(most: int):
    def check(images):
        if len(images) > most:
            raise DeviceOutOfMemory("CUDA failure 2: out of memory")

    return check


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("provider", ["fake", "cpu"])
def test_a_warm_up_ends_where_the_memory_does(provider, caplog):
    runtime = FakeRuntime(seconds=0.003)
    runtime.provider, runtime.before_run = provider, fits(4)
    with caplog.at_level("WARNING"):
        table = warm_up(runtime, 16)
    assert {bucket for bucket, _ in table} == set(runtime.manifest.input.buckets)
    assert max(size for _, size in table) == 4
    assert "8 pictures of 96x160 do not fit" in caplog.text
    costs = BatchCosts({size: seconds for (bucket, size), seconds in table.items() if bucket == (96, 160)}, 16)
    assert costs.favoured(16) <= 4


@pytest.mark.parametrize("provider", ["fake", "cpu"])
def test_a_device_without_room_for_one_picture_is_a_sentence(provider):
    runtime = FakeRuntime()
    runtime.provider, runtime.before_run = provider, fits(0)
    with pytest.raises(RuntimeLoadError, match=r"model blobs: one picture does not fit .*raise DETECTOR_GPU_MEMORY_LIMIT_BYTES"):
        warm_up(runtime, 16)


@pytest.mark.usefixtures("patient")
def test_a_version_on_two_devices_takes_the_batches_that_fit_into_both(tmp_path):
    write_model(tmp_path)

    def open_runtime(path, device, largest_batch):
        runtime = FakeRuntime(seconds=0.004 if device else 0.002)
        runtime.before_run = fits(16 if device else 2)
        return runtime

    costs = Loader(tmp_path, open_runtime, devices=[0, 1], max_batch_size=4).load("blobs", "1", lambda index: here).costs
    assert {size for _, size in costs} == {1, 2}
    alone = Loader(tmp_path, open_runtime, devices=[1], max_batch_size=4).load("blobs", "1", lambda index: here).costs
    assert {size for _, size in alone} == {1, 2, 3, 4}  # a GPU fills three up to four
    assert min(costs.values()) >= 0.004


def test_a_cpu_runs_the_smallest_and_the_largest_bucket_and_reckons_the_rest():
    buckets = [(96, 160), (128, 160), (160, 160), (160, 96)]
    runtime = FakeRuntime(make_manifest(input=make_manifest().input.model_copy(update={"buckets": buckets})), seconds=0.003)
    runtime.provider = "cpu"
    table = warm_up(runtime, 4)
    assert set(table) == {(bucket, size) for bucket in buckets for size in (1, 2, 4)}
    assert table[(160, 96), 2] == table[(96, 160), 2]
    smallest, middle, largest = (table[bucket, 1] for bucket in buckets[:3])
    assert middle == pytest.approx((smallest + largest) / 2)
    assert shapes_run_in_warm_up(runtime, 4) == {(1, (96, 160)), (2, (96, 160)), (4, (96, 160)), (1, (160, 160))}


def test_golden_images_pass_and_fail(tmp_path):
    check_golden(OnnxRuntime(write_model(tmp_path, version="1")))
    with pytest.raises(GoldenMismatch, match=r"expected label 1 with score 0\.65"):
        check_golden(OnnxRuntime(write_model(tmp_path, version="2", golden_score=0.4)))


def test_golden_check_finds_an_extra_detection():
    runtime = FakeRuntime(make_manifest(golden=[golden(0.6 + 0.3 * 220 / 255).model_copy(update={"detections": []})]))
    with pytest.raises(GoldenMismatch, match="not expected"):
        check_golden(runtime)


TRIMMED = """
import sys
from pathlib import Path
import numpy as np
from service.runtime import OnnxRuntime

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

runtime = OnnxRuntime(Path(sys.argv[1]), provider="cpu")
images = np.random.default_rng(0).integers(0, 255, (4, 384, 512, 3), np.uint8)
sizes_hw = np.array([[384, 512]] * 4, np.int64)
before = runtime.run(images, sizes_hw)
held = resident_mib()
runtime.trim()
print(held - resident_mib())
for found, expected in zip(runtime.run(images, sizes_hw), before, strict=True):
    np.testing.assert_array_equal(found, expected)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_trim_gives_a_large_batchs_memory_back_and_changes_no_answer():
    file = next((ROOT / "model_repository").glob("*/1/model.onnx"))
    # in a process of its own: in this one malloc may serve the batch from memory that earlier tests freed
    done = subprocess.run([sys.executable, "-c", TRIMMED, str(file)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 50
