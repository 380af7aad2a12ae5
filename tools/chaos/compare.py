"""Knows: the files of fbank, training and decoding; tells where two runs differ, and how far a run is.
Must not know: how runs are started or killed.

All functions return one line for each difference; none means that the runs are the same.
"""
from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np
import torch
from safetensors.torch import load_file

from icefall_fusion.data.cut_lines import parse_cut, read_lines
from icefall_fusion.data.datamodule import load_features
from icefall_fusion.nbest import read_nbests
from icefall_fusion.train.checkpoints import list_checkpoints, load_checkpoint

#: Keys of a checkpoint and of a line of log.jsonl that depend on time.
_TIMES = ("seconds", "minutes", "data_wait")
#: Largest difference of a score in an N-best list, in nats; texts and error rates must be the same.
SCORE_TOLERANCE = 1e-3


def fbank(one: Path, two: Path) -> list[str]:
    """Compare the manifests with features of two data folders line by line, and all features bit by bit."""
    names = _names(one / "fbank", two / "fbank", "*.jsonl.gz")
    differences = [*names.differences]
    for name in names.common:
        differences += _manifests(one / "fbank" / name, two / "fbank" / name)
    reports = _names(one / "fbank", two / "fbank", "compute-fbank-*.json")
    differences += reports.differences
    for name in reports.common:
        if (one / "fbank" / name).read_bytes() != (two / "fbank" / name).read_bytes():
            differences.append(f"{name} differs")
    rows = (row for name in names.common for row in _rows(two / "fbank" / name))
    unused = set((two / "fbank").glob("*/*.lca")) - {Path(row["features"]["storage_path"]) for row in rows}
    return differences + [f"{path} is in no manifest" for path in sorted(unused)]


def _manifests(one: Path, two: Path) -> list[str]:
    rows = [list(_rows(path)) for path in (one, two)]
    if len(rows[0]) != len(rows[1]):
        return [f"{two} has {len(rows[1])} cuts instead of {len(rows[0])}"]
    differences = []
    for number, (first, second) in enumerate(zip(*rows), 1):
        features = [load_features(parse_cut(json.dumps(row).encode(), str(two))) for row in (first, second)]
        for row in (first, second):
            row["features"]["storage_path"] = Path(row["features"]["storage_path"]).name.rpartition("-")[0]
        if first != second:
            differences.append(f"{two}, line {number}: {_first_difference(first, second)}")
        elif not torch.equal(*features):
            differences.append(f"{two}, line {number}: features of {first['id']} differ")
    return differences


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for _, line in read_lines(path))


def training(one: Path, two: Path) -> list[str]:
    """Compare two experiment folders: newest checkpoints, exports, loss curves and n-grams, bit by bit."""
    models = sorted({path.parent.name for path in one.glob("*/log.jsonl")})
    differences = [] if models else [f"{one} holds no training"]
    for name in models:
        newest = [list_checkpoints(folder / name)[-1:] for folder in (one, two)]
        if not all(newest) or newest[0][0].name != newest[1][0].name:
            differences.append(f"{two / name}: newest checkpoint {newest[1]} instead of {newest[0]}")
            continue
        states = [_without_times(load_checkpoint(path)) for (path,) in newest]
        difference = _first_difference(*states)
        if difference:
            differences.append(f"{newest[1][0]}: {difference}")
        differences += _curves(one / name / "log.jsonl", two / name / "log.jsonl")
    names = _names(one, two, "**/*.safetensors")
    differences += names.differences
    for name in names.common:
        difference = _first_difference(load_file(one / name), load_file(two / name))
        differences += [f"{two / name}: {difference}"] if difference else []
    names = _names(one, two, "**/*.arpa.gz")
    for name in names.common:
        if gzip.decompress((one / name).read_bytes()) != gzip.decompress((two / name).read_bytes()):
            differences.append(f"{two / name} differs")
    return differences + names.differences


def _curves(one: Path, two: Path) -> list[str]:
    """Compare loss curves: a resumed run may say a step twice, but must say the same."""
    curves = []
    for path in (one, two):
        curve: dict[tuple[int, str], Any] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for name, value in _without_times(row).items():
                before = curve.setdefault((row["step"], name), value)
                if before != value:
                    return [f"{path}: step {row['step']} has {name} {before!r} and, resumed, {value!r}"]
        curves.append(curve)
    difference = _first_difference(*curves)
    return [f"{two}: {difference}"] if difference else []


def decoding(one: Path, two: Path) -> list[str]:
    """Compare two experiment folders: tuned weights, recognized texts, errors, rates and N-best lists."""
    names = _names(one, two, "*/recogs-*", "*/errs-*", "*/wer-summary-*", "weights.yaml")
    differences = [*names.differences] + ([] if names.common else [f"{one} holds no decoding"])
    differences += [f"{two / name} differs" for name in names.common
              if (one / name).read_bytes() != (two / name).read_bytes()]
    results = _names(one, two, "*/results.json")
    differences += results.differences
    for name in results.common:
        rows = [{(row["test_set"], row["method"]): [row[rate] for rate in ("wer", "oracle_wer", "words")]
                 for row in json.loads((folder / name).read_text())} for folder in (one, two)]
        difference = _first_difference(*rows)
        differences += [f"{two / name}: {difference}"] if difference else []
    lists = _names(one, two, "*/nbest-*.jsonl")
    for name in lists.common:
        differences += _lists(one / name, two / name)
    differences += [f"{path} was left behind" for path in sorted(two.glob("*/rank-*"))]
    for path in two.glob("*/run.json"):
        run = json.loads(path.read_text())
        if run["status"] != "done" or run["skipped"]:
            differences.append(f"{path}: status {run['status']!r}, {len(run['skipped'])} skipped")
    return differences + lists.differences


def _lists(one: Path, two: Path) -> list[str]:
    lists = [{nbest.utterance: nbest for nbest in read_nbests(path)} for path in (one, two)]
    if lists[0].keys() != lists[1].keys() or len(read_nbests(two)) != len(lists[1]):
        return [f"{two} has not each utterance once"]
    for utterance, first in lists[0].items():
        second = lists[1][utterance]
        if [h.tokens for h in first] != [h.tokens for h in second]:
            return [f"{two}: hypotheses of {utterance} differ"]
        for h, other in zip(first, second):
            if h.scores.keys() != other.scores.keys():
                return [f"{two}: {utterance} has scores of {sorted(other.scores)}, not {sorted(h.scores)}"]
            apart = max(abs(h.scores[source] - other.scores[source]) for source in h.scores)
            if not apart <= SCORE_TOLERANCE:
                return [f"{two}: scores of {utterance} differ by {apart} nats"]
    return []


# --- how far a run is -----------------------------------------------------------------------------------


def fbank_progress(data: Path) -> str:
    """Return what there is of the features."""
    shards, splits = len(list(data.glob("fbank/.parts/*/*.gz"))), len(list(data.glob("fbank/*.jsonl.gz")))
    return f"{shards} shards, {splits} sets joined"


def training_progress(exp: Path) -> str:
    """Return what there is of the models."""
    models = sorted({path.parent for path in exp.glob("*/checkpoint-*.pt")})
    steps = [f"{model.name} {list_checkpoints(model)[-1].stem.rpartition('-')[2]}" for model in models]
    return ", ".join([*(f"{step} steps" for step in steps), *_marks(exp)]) or "nothing"


def decoding_progress(exp: Path) -> str:
    """Return how much is decoded."""
    batches = sum(path.read_bytes().count(b'"cost":') for path in exp.glob("**/nbest-*.jsonl"))
    return ", ".join([f"{batches} batches", *_marks(exp)])


def _marks(folder: Path) -> list[str]:
    return [f"{path.name[1:-5]} done" for path in sorted(folder.glob(".*.done"))]


# --- values ---------------------------------------------------------------------------------------------


class _Names:
    """File names below two folders.

    Attributes:
        common: those that both have.
        differences: a line for each that one has not.
    """

    def __init__(self, one: Path, two: Path, patterns: tuple[str, ...]) -> None:
        names = [{str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)
                  if not path.name.startswith(".")} for folder in (one, two)]
        self.common = sorted(names[0] & names[1])
        self.differences = [f"{two / name} is missing" for name in sorted(names[0] - names[1])]
        self.differences += [f"{two / name} is too much" for name in sorted(names[1] - names[0])]


def _names(one: Path, two: Path, *patterns: str) -> _Names:
    return _Names(one, two, patterns)


def _without_times(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _TIMES}


def _first_difference(one: Any, two: Any, where: str = "") -> str:
    """Return where two values, of mappings, sequences, tensors and plain values, first differ; or nothing."""
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        if one.keys() != two.keys():
            return f"{where or 'it'} has other keys: {sorted(map(str, one.keys() ^ two.keys()))[:3]}"
        differences = (_first_difference(one[key], two[key], f"{where}[{key!r}]") for key in one)
        return next(filter(None, differences), "")
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        if len(one) != len(two):
            return f"{where} has {len(two)} parts instead of {len(one)}"
        differences = (_first_difference(*pair, f"{where}[{n}]") for n, pair in enumerate(zip(one, two)))
        return next(filter(None, differences), "")
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return "" if torch.equal(one, two) else f"{where} are other numbers"
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        return "" if np.array_equal(one, two) else f"{where} are other numbers"
    return "" if one == two else f"{where} is {two!r} instead of {one!r}"
