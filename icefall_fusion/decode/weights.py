"""The YAML file of weights by method.
Knows: YAML. Must not know: methods, models.
"""
from __future__ import annotations

from pathlib import Path
from typing import Mapping, Union

import yaml

from icefall_fusion.common.checks import check

Weights = Mapping[str, Mapping[str, float]]


def read_weights(weights: Union[str, Weights]) -> Weights:
    """Return weights by method; a string names a YAML file of them (maybe under ``weights:``)."""
    if not isinstance(weights, str):
        return weights
    if not weights:
        return {}
    if not Path(weights).is_file():
        raise FileNotFoundError(f"there is no YAML file of weights at {weights}")
    try:
        content = yaml.safe_load(Path(weights).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"weights in {weights} must be YAML: {error}") from error
    content = content.get("weights", content) if isinstance(content, dict) else content
    good = isinstance(content, dict) and all(isinstance(value, dict) for value in content.values())
    check(good, f"weights in {weights}", "be numbers by method and source", content)
    return content
