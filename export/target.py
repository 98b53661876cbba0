"""Which file a command means: a path, or a name in the model repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from service.loading import MODEL_FILE, find_models, parse_reference

REPOSITORY = Path("model_repository")


def add_version_arguments(parser: argparse.ArgumentParser) -> None:
    """One target, as `find_version` takes it."""
    parser.add_argument("file", metavar="FILE", help="model.onnx, a version folder, or `name` or `name@version` of the repository")
    add_repository_argument(parser)


def add_repository_argument(parser: argparse.ArgumentParser) -> None:
    """The option that says where a target's name is looked up."""
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help=f"where names are looked up ({REPOSITORY})")


def find_version(target: str, repository: Path) -> Path:
    """The file that a target means: a file, a version folder, a model's folder (its newest version), or a name in the repository.

    Raises:
        ValueError: none of these; says what the repository holds.
    """
    path = Path(target)
    if path.is_file():
        return path
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    found = find_models(path.parent).get(path.name) if path.is_dir() else None
    if found:
        return path / found[0] / MODEL_FILE
    held = find_models(repository)
    try:
        name, version = parse_reference(target)
    except ValueError:
        name, version = "", None
    versions = held.get(name, [])
    if not versions or (version is not None and version not in versions):
        offered = ", ".join(f"{known}@{number}" for known, numbers in held.items() for number in numbers) or "nothing"
        raise ValueError(f"{target} is no model file, version folder or version of {repository}, which holds {offered}")
    return repository / name / (version or versions[0]) / MODEL_FILE
