from __future__ import annotations

import pytest

from service import decoding
from service.settings import ENV_PREFIX, MAX_PIXELS_CEILING, Settings, SettingsError, describe_settings, load_settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def test_defaults_stand_without_any_environment():
    settings = load_settings()
    assert (settings.port, settings.max_batch_size, settings.provider) == (8000, 16, "auto")


def test_environment_is_read_and_arguments_win(monkeypatch):
    monkeypatch.setenv("DETECTOR_PORT", "9000")
    monkeypatch.setenv("DETECTOR_CORS_ORIGINS", "https://a.example, https://b.example")
    monkeypatch.setenv("DETECTOR_GPU_MEMORY_LIMIT_BYTES", "")
    settings = load_settings()
    assert settings.port == 9000
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.gpu_memory_limit_bytes is None
    assert load_settings(port=9001).port == 9001


def test_a_misspelt_name_is_refused_with_the_nearest_one(monkeypatch):
    monkeypatch.setenv("DETECTOR_MAX_BATCHSIZE", "4")
    with pytest.raises(SettingsError, match="did you mean DETECTOR_MAX_BATCH_SIZE"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DETECTOR_SERVICE_HOST", "10.0.0.7"),
        ("DETECTOR_SERVICE_PORT_HTTP", "80"),
        ("DETECTOR_PORT_80_TCP_ADDR", "10.0.0.7"),
        ("DETECTOR_GPU_PORT", "tcp://10.0.0.7:80"),
    ],
)
def test_variables_that_kubernetes_adds_for_a_service_are_told_from_misspelt_ones(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name} is not a setting: Kubernetes adds it .* `enableServiceLinks: false`"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DETECTOR_PORT", "abc"),
        ("DETECTOR_PORT", "70000"),
        ("DETECTOR_PROVIDER", "gpu"),
        ("DETECTOR_MAX_BATCH_SIZE", "0"),
        ("DETECTOR_DEVICE_IDS", "0,x"),
        ("DETECTOR_DEVICE_IDS", "0,0"),
        ("DETECTOR_SHADOW", "cells=0.5"),
        ("DETECTOR_SHADOW", "cells@2=1.5"),
    ],
)
def test_a_value_out_of_bounds_names_the_variable_and_the_value(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as caught:
        load_settings()
    assert value.split(",")[0] in str(caught.value)


def test_one_port_cannot_be_two():
    with pytest.raises(SettingsError, match="operations_port"):
        load_settings(port=8000, operations_port=8000)


@pytest.mark.parametrize("provider", ["auto", "cpu", "tensorrt"])
def test_cuda_graphs_are_never_silently_ignored(provider):
    with pytest.raises(SettingsError, match=f"^DETECTOR_CUDA_GRAPHS works with DETECTOR_PROVIDER=cuda alone, .* '{provider}'"):
        load_settings(provider=provider, cuda_graphs=True)
    assert load_settings(provider="cuda", cuda_graphs=True).cuda_graphs


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1


def test_every_setting_has_a_line_of_help_and_a_name_with_its_unit():
    text = describe_settings()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert ENV_PREFIX + name.upper() in text
        if field.annotation is float:
            assert name.endswith("_seconds"), name


def test_the_bound_on_pixels_is_the_decoder_s():
    """Above it, some readers refuse on their own, and ImageLimits cannot be made."""
    assert MAX_PIXELS_CEILING == decoding.MAX_PIXELS_CEILING
    assert Settings(max_image_pixels=MAX_PIXELS_CEILING).max_image_pixels == MAX_PIXELS_CEILING
    with pytest.raises(SettingsError, match=r"DETECTOR_MAX_IMAGE_PIXELS: .*178956970"):
        load_settings(max_image_pixels=MAX_PIXELS_CEILING + 1)
