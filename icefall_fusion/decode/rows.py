"""One row of ``results.json``: word errors and cost of a method on a test set; its WER files.
Knows: run files, references, word errors. Must not know: models, searches, how anything was decoded.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from icefall_fusion.common.files import PathLike
from icefall_fusion.decode.run_files import RunFile
from icefall_fusion.scoring.wer import MEASURES, oracle_errors
from icefall_fusion.scoring.wer_files import write_wer_files
from icefall_fusion.text.language import ENGLISH, Language

_COUNTERS = ("lm_forwards", "lm_tokens_forwarded", "lm_tokens_scored", "kv_bytes_peak")


def make_row(
    folder: PathLike, test_set: str, file: RunFile, references: Mapping[str, str | None],
    seconds: Mapping[str, float], options: Mapping[str, Any], printed: bool = False,
    language: Language = ENGLISH,
) -> dict[str, Any]:
    """Write the WER files of a finished method and return its row.

    Args:
        folder: where the files go.
        test_set: its name.
        file: lists and cost of the method.
        references: text by utterance; None where there is none.
        seconds: of audio by utterance.
        options: of the method; ``method`` is its name.
        printed: count words by the measures of cased text too (``wer_printed``, ``wer_libriheavy``).
        language: of the texts; where characters are counted the row has ``"unit": "characters"``.
    """
    audio = sum(seconds[utterance] for utterance in file)
    totals = {**dict.fromkeys(_COUNTERS, 0), **file.totals()}
    spent = sum(totals.get(stage, 0.0) for stage in ("features", "encoder", "search", "lm"))
    return {
        "method": options["method"],
        "test_set": test_set,
        **({} if language.unit == "words" else {"unit": language.unit}),
        **_scores(folder, test_set, options["method"], file, references, printed, language),
        "rtf": spent / audio if audio else 0.0,
        "search_seconds": totals.get("search", 0.0),
        "lm_seconds": totals.get("lm", 0.0),
        **{counter: int(totals[counter]) for counter in _COUNTERS},
        **({"histories_scored": int(totals["histories_scored"])} if "histories_scored" in totals else {}),
        **_density(totals),
        "peak_memory_bytes": int(totals.get("peak_memory_bytes", 0)),
        "options": dict(options),
        "audio_seconds": audio,
    }


def _density(totals: Mapping[str, float]) -> dict[str, float]:
    """Return the arcs a frame of the lattices, if a method read any."""
    frames = totals.get("lattice_frames", 0)
    return {"lattice_density": round(totals["lattice_arcs"] / frames, 2)} if frames else {}


def read_earlier_rows(path: PathLike) -> list[dict[str, Any]]:
    """Return the rows that an earlier call left in its folder, none if there is no such file.

    Raises:
        ValueError: the file holds no rows.
    """
    path = Path(path)
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        join_rows(rows, [])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold rows of methods and test sets, but says: {error!r}") from error
    return rows


def join_rows(earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows: first those of an earlier call that have no new row, then the new ones."""
    now = {(row["test_set"], row["method"]) for row in rows}
    return [row for row in earlier if (row["test_set"], row["method"]) not in now] + list(rows)


def _scores(
    folder: PathLike, test_set: str, method: str, file: RunFile, references: Mapping[str, str | None],
    printed: bool, language: Language,
) -> dict[str, Any]:
    """Return WER and oracle WER in percent and the number of words, of utterances that have a reference.

    Without words in the references both rates are None.
    """
    texts = {utterance: text for utterance in file if (text := references[utterance]) is not None}
    if not texts:
        return {"wer": None, "words": 0, "oracle_wer": None}
    hypotheses = {}
    for nbest in map(file.__getitem__, texts):
        hypotheses[nbest.utterance] = nbest[0].text if len(nbest) else ""
    errors = write_wer_files(folder, test_set, method, texts, hypotheses, language=language)
    if errors.words == 0:  # JSON has no word for infinity
        return {"wer": None, "words": 0, "oracle_wer": None}
    best = oracle_errors(texts, map(file.__getitem__, texts), language=language)
    scores = {"wer": errors.wer, "words": errors.words, "oracle_wer": best.wer}
    if printed:
        for measure in MEASURES[1:]:
            more = write_wer_files(folder, test_set, method, texts, hypotheses, measure, language)
            scores[f"wer_{measure}"] = more.wer
    return scores
