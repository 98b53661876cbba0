"""Keys, profiles, options and plans of TensorRT engines: everything but TensorRT itself."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import onnxruntime as ort
import pytest
from service_onnx import write_model

from service import tensorrt
from service.device_calls import here
from service.errors import InferenceFailed
from service.loading import Loader
from service.providers import ProviderMissing, RuntimeLoadError, provider_stack
from service.runtime import OnnxRuntime
from service.tensorrt import (
    EngineKey,
    EnginePlan,
    engine_folder,
    gpu_and_driver,
    input_ranges,
    load_plan,
    profile_options,
    require_engines,
    tensorrt_version,
)

BUCKETS = ((320, 448), (448, 320))
KEY = EngineKey("NVIDIA H100 80GB HBM3", "580.65.06", "10.13.3", "1.31.1", "ab" * 32)


def make_plan(folder: Path, **changes) -> EnginePlan:
    plan = EnginePlan(folder, BUCKETS, 8, input_ranges(BUCKETS, 8))
    return replace(plan, **changes)


def test_one_profile_holds_every_bucket_and_batch():
    assert profile_options(input_ranges(BUCKETS, 8)) == {
        "trt_profile_min_shapes": "images:1x320x320x3,image_sizes_hw:1x2",
        "trt_profile_opt_shapes": "images:4x320x448x3,image_sizes_hw:4x2",
        "trt_profile_max_shapes": "images:8x448x448x3,image_sizes_hw:8x2",
    }
    assert profile_options({}) == {}
    assert profile_options(input_ranges(BUCKETS[:1], 1))["trt_profile_opt_shapes"] == "images:1x320x448x3,image_sizes_hw:1x2"
    low, usual, high = input_ranges(((320, 448), (448, 320), (384, 384)), 3)["images"]
    assert (low, usual, high) == ((1, 320, 320, 3), (1, 384, 384, 3), (3, 448, 448, 3))


def test_the_folder_changes_with_everything_that_an_engine_depends_on():
    names = {KEY.folder_name, *(replace(KEY, **{field: value + "0"}).folder_name for field, value in asdict(KEY).items())}
    assert len(names) == 6
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)
    assert KEY.folder_name.startswith("nvidia-h100-80gb-hbm3-trt-10-13-3-")


def test_options_name_the_folder_the_profile_and_what_stays_on_cuda(tmp_path):
    options = make_plan(tmp_path).provider_options(2)
    assert options.items() >= profile_options(input_ranges(BUCKETS, 8)).items()
    assert options["trt_op_types_to_exclude"] == "NonMaxSuppression,NonZero,RoiAlign"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(tmp_path)
    assert (options["device_id"], options["trt_engine_cache_enable"]) == ("2", "1")
    assert not any(name in options for name in ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable")), "types are the file's"
    stack = provider_stack("tensorrt", device_id=2, tensorrt=options)
    assert [entry if isinstance(entry, str) else entry[0] for entry in stack] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]
    assert stack[0][1] == options


def test_a_plan_comes_back_as_it_was_saved(tmp_path):
    plan = make_plan(tmp_path, ranges={**input_ranges(BUCKETS, 8), "/fpn/p2": ((1, 2), (4, 2), (8, 2))})
    assert load_plan(tmp_path) is None
    plan.save()
    assert load_plan(tmp_path) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', '{"format": 1, "buckets": [[1]]}', "[1, 2]"])
def test_a_plan_that_makes_no_sense_is_none(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    assert load_plan(tmp_path) is None


@pytest.mark.parametrize("shape", [(9, 320, 448, 3), (1, 320, 320, 3), (1, 448, 448, 3)])
def test_a_shape_without_an_engine_is_refused_in_a_sentence(tmp_path, shape):
    plan = make_plan(tmp_path)
    plan.check_shape((8, 448, 320, 3))
    with pytest.raises(InferenceFailed, match="built for up to 8 images of 320x448, 448x320; lower DETECTOR_MAX_BATCH_SIZE"):
        plan.check_shape(shape)


def test_gpu_and_driver_come_from_the_drivers_own_tool(tmp_path):
    tool = tmp_path / "tool.py"
    tool.write_text("import sys; assert '--id=3' in sys.argv; print('NVIDIA H200, 580.65.06')")
    assert gpu_and_driver(3, (sys.executable, str(tool))) == ("NVIDIA H200", "580.65.06")


def test_no_driver_and_no_such_device_are_sentences(tmp_path):
    with pytest.raises(ProviderMissing, match="no NVIDIA driver here"):
        gpu_and_driver(0, (str(tmp_path / "nvidia-smi"),))
    tool = tmp_path / "tool.py"
    tool.write_text("print('No devices were found'); raise SystemExit(6)")
    with pytest.raises(ProviderMissing, match=r"on device 7, but .* does not find it: No devices were found"):
        gpu_and_driver(7, (sys.executable, str(tool)))


def test_the_librarys_version_number_is_read_as_people_write_it():
    def load(name):
        if name != "libnvinfer.so.10":
            raise OSError(name)
        return SimpleNamespace(getInferLibVersion=lambda: 101303)

    assert tensorrt_version(load) == "10.13.3"

    def missing(name):
        raise OSError(name)

    with pytest.raises(ProviderMissing, match=r"its library is not found .*LD_LIBRARY_PATH"):
        tensorrt_version(missing)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(tensorrt, "gpu_and_driver", lambda device: ("NVIDIA H100", "580.65.06"))
    monkeypatch.setattr(tensorrt, "tensorrt_version", lambda: "10.13.3")


def test_engines_that_were_never_built_are_refused_with_the_command_that_builds_them(tmp_path, on_a_gpu):
    path = write_model(tmp_path)
    with pytest.raises(RuntimeLoadError, match=r"no TensorRT engines for NVIDIA H100.*python -m export build-engines .*--device 1"):
        require_engines(path, 1)
    (path.parent / "engines" / "nvidia-a10-trt-9").mkdir(parents=True)
    with pytest.raises(RuntimeLoadError, match=r"there are engines for nvidia-a10-trt-9"):
        require_engines(path, 0)


def test_engines_of_other_weights_are_not_taken(tmp_path, on_a_gpu):
    path = write_model(tmp_path)
    make_plan_for(path)
    assert require_engines(path, 0).max_batch_size == 8
    write_model(tmp_path, score=0.5)
    with pytest.raises(RuntimeLoadError, match="and this file"):
        require_engines(path, 0)


def make_plan_for(path: Path) -> None:
    folder = engine_folder(path, tensorrt.engine_key(path, 0))
    folder.mkdir(parents=True)
    make_plan(folder).save()


def test_a_runtime_asks_for_engines_before_it_opens_anything(tmp_path, on_a_gpu, monkeypatch):
    path = write_model(tmp_path)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr("service.runtime.open_session", lambda *_: pytest.fail("a session would build engines"))
    with pytest.raises(RuntimeLoadError, match="no TensorRT engines"):
        OnnxRuntime(path, provider="tensorrt")


def test_a_version_whose_engines_are_too_small_is_passed_over_and_says_what_to_do(tmp_path, caplog):
    opened = []

    def open_runtime(path, device, largest_batch):
        opened.append(OnnxRuntime(path, provider="cpu", intra_op_threads=1))
        built_for = 4 if path.parent.name == "1" else 1
        opened[-1]._plan = make_plan(path.parent, buckets=tuple(opened[-1].manifest.input.buckets), max_batch_size=built_for)
        return opened[-1]

    for version in ("1", "2"):
        write_model(tmp_path, version=version)
    loaded = Loader(tmp_path, open_runtime, devices=[0], max_batch_size=4).load_newest("blobs", lambda index: here)
    assert loaded.version == "1"
    assert [runtime._session is None for runtime in opened] == [True, False]
    assert "it cannot run: 2 images of 96x160: the TensorRT engines were built for up to 1 images" in caplog.text
    assert "lower DETECTOR_MAX_BATCH_SIZE or build the engines again" in caplog.text
    loaded.close()
