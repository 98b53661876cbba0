"""Settings: environment variables with the prefix DETECTOR_ in one frozen object. Units stand in the names."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

ENV_PREFIX = "DETECTOR_"
MEBIBYTE = 1024 * 1024
MAX_PIXELS_CEILING = 178_956_970
"""Of service.decoding, where the reason stands; written again so that settings import nothing."""

Provider = Literal["auto", "tensorrt", "cuda", "cpu"]
Names = Annotated[tuple[str, ...], NoDecode]
"""Comma-separated in the environment."""


KUBERNETES_LINK = re.compile(r"DETECTOR_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
"""What Kubernetes puts into the environment of every pod beside a Service named `detector` or `detector-...`."""


class SettingsError(ValueError):
    """A setting that does not exist or a value out of bounds, as a sentence that names the variable."""


class _StrictEnvironment(EnvSettingsSource):
    """The environment, where a misspelt name is an error instead of a default that nobody asked for."""

    def __call__(self) -> dict[str, Any]:
        known = [ENV_PREFIX + name.upper() for name in self.settings_cls.model_fields]
        for name in os.environ:
            if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
                if KUBERNETES_LINK.fullmatch(name) or os.environ[name].startswith("tcp://"):
                    raise SettingsError(
                        f"{name} is not a setting: Kubernetes adds it because a Service here has a name that begins with `detector`; "
                        "set `enableServiceLinks: false` in the pod's spec, as deploy/kubernetes does"
                    )
                near = get_close_matches(name.upper(), known, n=1, cutoff=0.0)
                raise SettingsError(f"{name} is not a setting; did you mean {near[0]}? `python -m service --help` lists all of them")
        return super().__call__()


class Settings(BaseSettings):
    """Everything an operator can choose. Each field is the variable DETECTOR_<NAME>."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104  (a container's port is reached from outside)
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    operations_port: int | None = Field(
        None, ge=0, le=65535, description="Move /metrics and the admin routes from `port` to this one; unset keeps one port."
    )

    model_repository: Path = Field(Path("model_repository"), description="Folder with <name>/<version>/model.onnx.")
    model: Names = Field(
        (), description="Models to serve, comma-separated, each `name` (newest valid version) or `name@version`; unset serves every name."
    )
    watch_repository_seconds: float = Field(0.0, ge=0, le=3600, description="Look for new versions this often; 0 never.")
    shadow: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9._-]*@[1-9][0-9]*=(0(\.[0-9]+)?|1(\.0+)?)$",
        description="Run a candidate beside the served version on a share of the traffic and count disagreements: `name@version=0.05`.",
    )

    provider: Provider = Field("auto", description="Execution provider; one that is asked for and missing is an error at start.")
    device_ids: Names = Field(("0",), description="CUDA devices, comma-separated: one session and one worker each.")
    gpu_memory_limit_bytes: int | None = Field(
        None, ge=256 * MEBIBYTE, description="Most memory of a session's CUDA arena; unset: no limit."
    )
    cuda_graphs: bool = Field(
        False, description="On CUDA, record each batch shape once and replay it; needs files exported with `--nms dense`."
    )
    intra_op_threads: int | None = Field(
        None, ge=1, le=512, description="Threads of one inference; unset: 1 on a GPU, the container's CPU quota on a CPU."
    )
    decode_threads: int | None = Field(None, ge=1, le=512, description="Threads that decode pictures; unset: the container's CPU quota.")
    max_batch_size: int = Field(16, ge=1, le=256, description="Most images in one inference.")
    max_queue_images: int = Field(
        128, ge=1, le=100_000, description="Most images accepted and not yet answered; more are refused with 429."
    )
    max_queue_bytes: int = Field(
        512 * MEBIBYTE, ge=MEBIBYTE, description="Most bytes of bodies and decoded images held at once; more are 429."
    )

    request_timeout_ms: int = Field(10_000, ge=1, le=600_000, description="Longest a request may take; `timeout_ms` can only lower it.")
    max_upload_bytes: int = Field(32 * MEBIBYTE, ge=1024, description="Largest body, before and after inflating; 413 beyond.")
    max_image_pixels: int = Field(
        50_000_000, ge=1024, le=MAX_PIXELS_CEILING, description="Most pixels of a picture, read from its header; 413 beyond."
    )
    max_batch_images: int = Field(64, ge=1, le=4096, description="Most images in one batch request.")
    max_header_bytes: int = Field(32 * 1024, ge=1024, le=MEBIBYTE, description="Largest request line and headers together; 431 beyond.")
    header_timeout_ms: int = Field(10_000, ge=100, le=600_000, description="Longest a client may take to send its headers.")
    body_timeout_ms: int = Field(30_000, ge=100, le=600_000, description="Longest a client may take to send its body; 408 beyond.")
    max_connections: int = Field(2048, ge=1, le=100_000, description="Most open connections; more are answered 503 and closed.")

    api_keys_file: Path | None = Field(None, description="File with one `name:sha256` a line; unset leaves the API open.")
    admin_keys_file: Path | None = Field(None, description="The same for admin routes; unset: admin routes do not exist.")
    cors_origins: Names = Field((), description="Origins allowed to call from a browser, comma-separated, or `*`.")

    drain_seconds: float = Field(
        5.0, ge=0, le=3600, description="Keep serving this long after SIGTERM while unready, so that balancers notice."
    )
    watchdog_seconds: float = Field(
        60.0, ge=1, le=3600, description="An inference that takes longer is a hung device: unready, exit code 5."
    )
    canary_seconds: float = Field(
        10.0, ge=0, le=3600, description="Readiness needs a good inference at most this old, else one is made; 0 never."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe record that is written.")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="One JSON object a line, or text for people; auto: text on a terminal."
    )
    access_log: bool = Field(False, description="One record a request.")
    metrics_triton_aliases: bool = Field(False, description="Also export the counters under Triton's nv_inference_* names.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments of the constructor, then the environment; no hidden files."""
        return init_settings, _StrictEnvironment(settings_cls)

    @field_validator("model", "cors_origins", "device_ids", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("device_ids")
    @classmethod
    def _check_device_ids(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(part.isdigit() for part in value) or len(set(value)) != len(value):
            raise ValueError("expected different device numbers such as `0,1`")
        return value

    @model_validator(mode="after")
    def _check_ports(self) -> Self:
        if self.operations_port is not None and self.operations_port == self.port != 0:
            raise ValueError(f"operations_port is the same as port, {self.port}; leave it unset to share one port")
        return self

    @model_validator(mode="after")
    def _check_cuda_graphs(self) -> Self:
        if self.cuda_graphs and self.provider != "cuda":
            raise ValueError(
                f"DETECTOR_CUDA_GRAPHS works with DETECTOR_PROVIDER=cuda alone, and the provider is {self.provider!r}; "
                "set the provider, or unset DETECTOR_CUDA_GRAPHS"
            )
        return self


def load_settings(**overrides: Any) -> Settings:
    """Read the environment, with overrides (from the command line) on top.

    Raises:
        SettingsError: names the variable, what came, and what was expected.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:  # else it is about several
            message = f"{ENV_PREFIX}{str(first['loc'][0]).upper()}: {message} (got {first['input']!r})"
        raise SettingsError(message) from error


def describe_settings() -> str:
    """One line a setting, for --help: variable, default, meaning."""
    lines = []
    for name, field in Settings.model_fields.items():
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(default)
        shown = "unset" if default in (None, "") else default
        lines.append(f"  {ENV_PREFIX + name.upper():<36}{field.description} [{shown}]")
    return "\n".join(lines)
