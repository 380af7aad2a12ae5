"""The card of a training: what was heard, for how long, how well, by which options and versions.
Knows: files that jobs leave. Must not know: how they are run.
"""
from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any


def write(path: Path, facts: dict[str, Any], data: Path, exp: Path) -> None:
    """Write a card, whole or not at all.

    Args:
        path: of the card.
        facts: that the caller knows.
        data: folder of the speech.
        exp: folder of the acoustic model's training.
    """
    from icefall_fusion.common.environment import describe_environment

    device, hours = facts["options"]["device"], spoken_hours(data)
    content = {
        **facts,
        "hours spoken": hours,
        "training": training(exp, hours.get("train", 0.0)),
        "curve": curve(exp / "log.jsonl"),
        "machine": describe_environment(device),
        "files": "ctc_aed/ is a model folder: --emissions.model of decode and transcribe",
    }
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
    os.replace(temporary, path)


def spoken_hours(data: Path) -> dict[str, float]:
    """Return the hours of each split that has been spoken."""
    hours = {}
    for path in sorted((data / "manifests").glob("minibooks_cuts_*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            seconds = sum(json.loads(line)["duration"] for line in lines)
        hours[path.name.split("cuts_")[1].split(".")[0]] = round(seconds / 3600, 3)
    return hours


def training(exp: Path, hours: float) -> dict[str, Any]:
    """Return steps, minutes, epochs and hours heard, from the newest checkpoint; nothing if there is none."""
    from icefall_fusion.train.checkpoints import load_checkpoint, newest_checkpoint

    path = newest_checkpoint(exp) if exp.is_dir() else None
    if path is None:
        return {}
    state = load_checkpoint(path)
    order = state["processes"][0]["batches"]["full"]
    return {
        "steps": state["step"],
        "minutes": round(state["seconds"] / 60, 2),
        "tokens": state["items_seen"],
        "skipped steps": state["skipped"],
        "whole epochs": order["epoch"],
        "batches of the next": order["used"],
        "hours heard, whole epochs": round(order["epoch"] * hours, 1),
        "options": state["options"],
    }


def curve(log: Path) -> list[dict[str, Any]]:
    """Return the validations of a log: step, minutes, loss and error rates of each."""
    from icefall_fusion.train.training_log import read_validations

    kept = ("step", "minutes", "valid_loss", "valid_ctc", "valid_greedy_wer", "valid_word_perplexity",
            "data_wait")
    return [{name: line[name] for name in kept if name in line} for line in read_validations(log)]


def word_errors(results: Path) -> list[dict[str, Any]]:
    """Return test set, method and word error rate of each row of a decode, if there is one."""
    if not results.is_file():
        return []
    kept = ("test_set", "method", "wer", "words", "utterances")
    rows = json.loads(results.read_text(encoding="utf-8"))
    return [{name: row[name] for name in kept if name in row} for row in rows]
