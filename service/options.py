"""What a request may ask for: parsed from the query, a form or JSON fields, with the nearest name for a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.errors import BadOption

BoxFormat = Literal["xyxy", "xywh", "cxcywh", "normalized"]
MAX_CLASSES = 256
MAX_NAME_CHARS = 128


class DetectOptions(BaseModel):
    """Per-request options of /v1/detect and /v1/detect/batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score_threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.5, description="Least score of a detection in the answer. Nothing below the model's own floor is ever given."
    )
    max_detections: Annotated[int, Field(ge=1, le=10_000)] = Field(100, description="Most detections in the answer, the best ones.")
    classes: Annotated[tuple[str, ...], Field(max_length=MAX_CLASSES)] = Field(
        (), description="Only these class names; repeated or comma-separated."
    )
    box_format: BoxFormat = Field(
        "xyxy",
        description="Pixels of the upright picture: corners, corner and size, centre and size; `normalized`: corners over the size.",
    )
    format: Literal["json", "image"] = Field(
        "json", description="`image` answers with the picture and its boxes drawn, as JPEG, PNG or WebP by Accept."
    )
    model: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = Field(
        None, description="`name`, or `name@version` for one version; the service's first model where left out."
    )
    timeout_ms: Annotated[int, Field(ge=1, le=600_000)] | None = Field(
        None, description="Give up after this long, with 504; the service's own limit where left out or larger."
    )
    priority: Literal["high", "low"] = Field("high", description="`low` lets requests with `high` overtake for a while.")

    @field_validator("classes", mode="before")
    @classmethod
    def _split_classes(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("expected class names")
        return tuple(name.strip() for part in parts for name in part.split(",") if name.strip())


OPTION_NAMES = tuple(DetectOptions.model_fields)
DEFAULTS = DetectOptions()


def parse_options(pairs: Iterable[tuple[str, Any]], *, also_known: Sequence[str] = ()) -> DetectOptions:
    """Options from (name, value) pairs: a query's, a form's or a JSON object's.

    Args:
        pairs: `classes` may come several times, the rest once.
        also_known: other names that are right here, offered when a name is misspelt.

    Raises:
        BadOption: an unknown name (with the nearest known one), a name given twice, or a value out of bounds.
    """
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name not in OPTION_NAMES:
            raise BadOption(f"option {_shown(name)} does not exist{nearest(name, (*OPTION_NAMES, *also_known))}")
        if name == "classes":
            given.setdefault("classes", []).extend(value if isinstance(value, list) else [value])
        elif name in given:
            raise BadOption(f"option {name!r} came twice; give it once")
        else:
            given[name] = value
    if not given:
        return DEFAULTS
    try:
        return DetectOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadOption(f"option {first['loc'][0]!r}: {first['msg']}, got {_shown(first['input'])}") from error


def select_labels(classes: Sequence[str], class_names: Sequence[str]) -> frozenset[int] | None:
    """Labels (1..K) of the class names asked for; None for all of them.

    Raises:
        BadOption: the model has no such class.
    """
    if not classes:
        return None
    labels: Mapping[str, int] = {name: label for label, name in enumerate(class_names, start=1)}
    for name in classes:
        if name not in labels:
            raise BadOption(f"class {_shown(name)} is none of this model's{nearest(name, class_names)}")
    return frozenset(labels[name] for name in classes)


def nearest(name: str, known: Sequence[str]) -> str:
    """How to go on after a misspelt name: the nearest of a few, and what there is."""
    near = get_close_matches(name[:MAX_NAME_CHARS], known, n=1, cutoff=0.5)
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {shown}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
