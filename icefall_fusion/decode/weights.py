"""The weights of a method's sources: those of a YAML file, else the usual ones.
Knows: YAML, names of methods. Must not know: models.
"""
from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Container, Mapping, Union

import yaml

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.decode.method_names import DEFAULT_WEIGHTS, NO_LMS, parse_method

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


def is_tuned(name: str, weights: Container[str]) -> bool:
    """Return whether there are weights for a method (see `weights_of`)."""
    return name in weights or _not_late(name) in weights


def _not_late(name: str) -> str:
    return re.sub(r"-late-\d+", "", name)


def weights_of(name: str, tuned: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the weight of every source of a method, and of ``words`` (its word bonus).

    Args:
        name: the method.
        tuned: weights by method, as in the YAML file that ``tune`` writes. A method ``...-late-N`` that it
            does not name has the weights of the same method without ``-late-N``.

    Raises:
        ValueError: a weight is negative, not a number, or of a source that the method does not have.
    """
    spec = parse_method(name)
    sources, acoustic = spec.sources, spec.acoustic
    if not sources:
        return {acoustic: 1.0}
    wanted = [*sources, "words"]
    usual = {**DEFAULT_WEIGHTS, **({} if set(sources) - set(NO_LMS) else {"words": 0.0})}
    weights = dict(tuned.get(name, tuned.get(_not_late(name), {})))
    weights.pop(acoustic, None)
    for source, weight in weights.items():
        check_choice(source, wanted, f"weights of {name}: the source")
        number = isinstance(weight, (int, float)) and math.isfinite(weight)
        check(number, f"weights.{name}.{source}", "be a number", weight)
        check(weight >= 0 or source == "words", f"weights.{name}.{source}", "be at least 0", weight)
    return {acoustic: 1.0, **{source: float(weights.get(source, usual[source])) for source in wanted}}
