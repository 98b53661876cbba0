"""The generated Triton configuration, read by Triton's own protobuf schema."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import tritonclient
from conftest import ROOT
from service_fakes import make_manifest

from export.triton import triton_config
from service.v2_models import TENSOR_INPUTS, TENSOR_SUFFIX


@pytest.fixture(scope="module")
def model_config() -> ModuleType:
    """The schema module alone: its package needs grpc, which nothing here speaks."""
    path = Path(tritonclient.__path__[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_triton_reads_the_generated_configuration_as_the_graph_contract(model_config: ModuleType) -> None:
    from google.protobuf import text_format

    manifest = make_manifest()
    config = text_format.Parse(triton_config(manifest, max_batch_size=8), model_config.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (manifest.name, "onnxruntime", 8)
    names = {0: "", **{number: name for name, number in model_config.DataType.items()}}
    inputs = {tensor.name: (names[tensor.data_type], list(tensor.dims)) for tensor in config.input}
    outputs = {tensor.name: (names[tensor.data_type], list(tensor.dims)) for tensor in config.output}
    count = manifest.detections_per_image
    assert inputs == {"images": ("TYPE_UINT8", [-1, -1, 3]), "image_sizes_hw": ("TYPE_INT64", [2])}
    assert outputs == {
        "boxes": ("TYPE_FP32", [count, 4]),
        "scores": ("TYPE_FP32", [count]),
        "labels": ("TYPE_INT64", [count]),
        "num_detections": ("TYPE_INT64", [1]),
    }
    assert config.HasField("dynamic_batching")
    assert len(config.model_warmup) == len(manifest.input.buckets)


def test_the_service_takes_a_triton_clients_tensors_under_the_name_that_the_readme_says(model_config: ModuleType) -> None:
    from google.protobuf import text_format

    config = text_format.Parse(triton_config(make_manifest()), model_config.ModelConfig())
    assert [tensor.name for tensor in config.input] == [spec.name for spec in TENSOR_INPUTS]
    assert f"`blood-cells{TENSOR_SUFFIX}`" in (ROOT / "deploy" / "triton" / "README.md").read_text()


def test_a_count_without_an_axis_of_its_own_is_reshaped(model_config: ModuleType) -> None:
    from google.protobuf import text_format

    config = text_format.Parse(triton_config(make_manifest()), model_config.ModelConfig())
    count = next(tensor for tensor in config.output if tensor.name == "num_detections")
    assert count.HasField("reshape")
    assert list(count.reshape.shape) == []
