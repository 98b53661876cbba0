"""`--set KEY=VALUE`: single values of a configuration changed from the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from model.config import DetectorConfig, config_from_dict, to_dict

SECTIONS = ("detector", "training")


def with_settings(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Applies KEY=VALUE settings such as training.augment.vflip=0.5 to a copy; values are JSON, or else text.

    Args:
        values: plain values under "detector", "training" or both.

    Raises:
        ValueError: no such key, or no "=".
    """
    changed: dict[str, Any] = json.loads(json.dumps(values))
    sections = [name for name in SECTIONS if name in changed]
    for setting in settings:
        key, equals, text = setting.partition("=")
        *parents, leaf = key.split(".")
        section: Any = changed
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not parents or parents[0] not in sections or not isinstance(section, dict) or leaf not in section:
            any_key = " and ".join(f"{name}.*" for name in sections)
            known = ", ".join(sorted(section)) if isinstance(section, dict) and parents else any_key
            raise ValueError(f"--set {setting}: expected KEY=VALUE with a known key; known here: {known}")
        try:
            section[leaf] = json.loads(text)
        except json.JSONDecodeError:
            section[leaf] = text
    return changed


def with_detector_settings(config: DetectorConfig, settings: Sequence[str]) -> DetectorConfig:
    """The same for the detector alone, such as detector.roi.nms_thresh=0.6.

    Raises:
        ValueError: no such key, or a value that the configuration does not take.
    """
    return config_from_dict(with_settings({"detector": to_dict(config)}, settings)["detector"]) if settings else config


def add_detector_settings(parser: argparse.ArgumentParser) -> None:
    """`--set` for commands that take a trained checkpoint: what does not change its weights can still be chosen, on validation."""
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one value of the trained detector's configuration, such as detector.roi.nms_thresh=0.6",
    )
