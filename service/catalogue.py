"""/v1/models: which models and versions there are, and which answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from service import errors
from service.loading import parse_reference
from service.manifest import InputSpec
from service.openapi import error_responses
from service.parts import parts_of
from service.repository import Repository, ServedVersion

router = APIRouter(prefix="/v1", tags=["models"])


class ModelVersion(BaseModel):
    """A version in service."""

    name: str
    version: str
    state: Literal["active", "pinned"] = Field(description="`active` answers requests that name no version.")
    provider: str
    sha256: str = Field(description="Of model.onnx; empty for a runtime without a file.")
    architecture: str
    class_names: list[str]
    input: InputSpec
    score_floor: float
    detections_per_image: int
    metrics: dict[str, float | str | None] = Field(description="As measured when it was trained.")
    batch_seconds: dict[str, float] = Field(description="Measured at warm-up: `HEIGHTxWIDTH/BATCH` to seconds.")
    loaded_at: datetime


class Model(BaseModel):
    """A name with its versions."""

    name: str
    version: str = Field(description="The one that answers requests that name no version.")
    versions: list[ModelVersion] = Field(description="In service.")
    versions_on_disk: list[str] = Field(description="In the repository, newest first.")


class ModelList(BaseModel):
    """All models in service, the default one first."""

    models: list[Model]


def describe_version(repository: Repository, served: ServedVersion) -> ModelVersion:
    """What there is to say of one version."""
    loaded, manifest = served.loaded, served.manifest
    return ModelVersion(
        name=served.name,
        version=served.version,
        state="active" if repository.is_active(served) else "pinned",
        provider=loaded.provider,
        sha256=loaded.sha256,
        architecture=manifest.architecture,
        class_names=manifest.class_names,
        input=manifest.input,
        score_floor=manifest.score_floor,
        detections_per_image=manifest.detections_per_image,
        metrics=manifest.training.metrics,
        batch_seconds={f"{height}x{width}/{size}": round(s, 6) for ((height, width), size), s in loaded.costs.items()},
        loaded_at=datetime.fromtimestamp(loaded.loaded_at, UTC),
    )


def _describe(repository: Repository, name: str) -> Model:
    versions = [describe_version(repository, served) for served in repository.served if served.name == name]
    active = repository.resolve(name).version
    return Model(name=name, version=active, versions=versions, versions_on_disk=repository.versions_on_disk(name))


@router.get("/models", responses=error_responses((errors.Unauthorised,)))
def list_models(request: Request) -> ModelList:
    """Every model in service."""
    repository = parts_of(request).repository
    return ModelList(models=[_describe(repository, name) for name in dict.fromkeys(served.name for served in repository.served)])


@router.get("/models/{name}", responses=error_responses((errors.Unauthorised, errors.ModelNotFound, errors.NotReady)))
def show_model(request: Request, name: str) -> Model:
    """One model: its classes, its input, its versions."""
    repository = parts_of(request).repository
    try:
        known, _ = parse_reference(name)
    except ValueError as error:
        raise errors.ModelNotFound(f"model {error}") from error
    return _describe(repository, repository.resolve(known).name)
