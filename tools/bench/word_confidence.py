"""How well the confidence of words tells right ones: found on dev, held to other voices and sentences.
Knows: synthetic speech, tune-words. Must not know: how words are recognized, what evidence means.

    python tools/bench/word_confidence.py --model MODEL --method llm-delayed-shortest-ahead --sentences 120 \\
        --json bench/word_confidence.json
    python tools/bench/word_confidence.py --cuts dev=DEV.jsonl.gz clean=CLEAN.jsonl.gz other=OTHER.jsonl.gz

The first set is dev. Beside the method's own confidence: its posterior in the N-best list alone, and greedy
decoding with the least probability of a word's pieces, each as it is and as a logistic regression on dev.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Sequence

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from figures import write
from word_times import SPLITS, parser_of, show, speech

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.decode.pretrained import with_pretrained, with_shipped_lms
from icefall_fusion.decode.recognizer import RecognizerOptions
from icefall_fusion.decode.tune_words import EvidenceRecognizer, Observed, observe
from icefall_fusion.decode.word_evidence import NAMES
from icefall_fusion.scoring.calibration import Logistic, area_under_curve, calibration_error

GREEDY = "ctc-greedy"


def rows_of(name: str, seen: dict[str, Observed], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row a set: accuracy, calibration error, area under the curve of a fit on the first set."""
    at = [NAMES.index(column) for column in columns]
    dev = next(iter(seen.values()))
    fitted = Logistic.fit(columns, dev.evidence[:, at], dev.right).calibrated(dev.evidence[:, at], dev.right)
    rows = []
    for split, those in seen.items():
        sure = fitted(those.evidence[:, at])
        rows.append({"confidence": name, "set": split, **_measures(sure, those.right)})
    return rows


def raw_rows(name: str, seen: dict[str, Observed], column: str, odds: bool) -> list[dict[str, Any]]:
    """Return a row a set of a probability as it is: log odds or log-probs of a column."""
    rows = []
    for split, those in seen.items():
        values = those.evidence[:, NAMES.index(column)]
        sure = 1 / (1 + np.exp(-values)) if odds else np.exp(values)
        rows.append({"confidence": name, "set": split, **_measures(sure, those.right)})
    return rows


def _measures(sure: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    return {"words": len(right), "right_%": round(100 * float(right.mean()), 2),
            "ece_%": round(100 * calibration_error(sure, right), 2),
            "auc": round(area_under_curve(sure, right), 4)}


def observed(options: RecognizerOptions, method: str, sets: dict[str, str]) -> dict[str, Observed]:
    """Decode all sets by a method; with more than two sets, all but dev are there together too."""
    recognizer = EvidenceRecognizer(options, method)
    seen = {name: observe(recognizer, cuts) for name, cuts in sets.items()}
    tests = list(seen.values())[1:]
    if len(tests) > 1:
        evidence, right = (np.concatenate([getattr(test, part) for test in tests])
                           for part in ("evidence", "right"))
        seen["all tests"] = Observed([], evidence, right)
    return seen


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = parser_of(__doc__, "word_confidence", "llm-delayed-shortest-ahead")
    parser.add_argument("--cuts", nargs="*", default=[], help="NAME=MANIFEST, dev first; none: the demo's")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = arguments(given)
    options = RecognizerOptions(emissions=EmissionOptions(model=args.model, device=args.device))
    options = with_shipped_lms(options) if args.model else with_pretrained(options)
    sets = dict(pair.split("=", 1) for pair in args.cuts)
    sets = sets or {split: speech(args, split) for split in SPLITS}
    seen, greedy = (observed(options, method, sets) for method in (args.method, GREEDY))
    size = next(iter(seen.values())).evidence.shape[1]
    rows = rows_of(args.method, seen, NAMES[:size])
    rows += rows_of(f"{args.method}, list alone", seen, ["list"])
    rows += raw_rows(f"{args.method}, list as it is", seen, "list", odds=True)
    rows += rows_of(f"{GREEDY}, least probability", greedy, ["piece_least"])
    rows += raw_rows(f"{GREEDY}, least probability as it is", greedy, "piece_least", odds=False)
    show(rows)
    write(args, rows)


if __name__ == "__main__":
    main()
