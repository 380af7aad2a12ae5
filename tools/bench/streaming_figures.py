"""Figures of streams that were played: latency of words, stability, word errors; tables, aims, the plot.
Knows: what was shown when, reference times of words, rows. Must not know: models, how anything was decoded.
"""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional, Sequence

import numpy as np
import pictures
from gpu_tables import COLUMNS, Column, table
from pictures import Line, Panel
from streaming_clock import Played

from icefall_fusion.decode.tune_words import sight
from icefall_fusion.nbest import WordTime
from icefall_fusion.scoring.wer import EPS, WordErrors, align_words, count_errors

Row = Mapping[str, Any]
NEAR = 0.25  # seconds between the marks of one word in two hypotheses, at most
WHOLE, STREAM, CAPACITY = "whole", "stream", "capacity"
CTC, LLM = "ctc-prefix", "llm-delayed-shortest"
BUSY = 1000  # ms: a machine holds so many streams that 99 % of words are heard (`heard_after`) within them


def delays(played: Played) -> Iterator[tuple[float, float]]:
    """Yield of the words that are right how long after their end they were first shown, and committed.

    Seconds; below 0 where a word is recognized before it ends. A word counts as shown when it stands,
    complete, where the final text has it (`NEAR`), even if it vanishes for a while later. Of words that
    eSpeak NG speaks as one, the last alone has a known end.
    """
    final = played.sights[-1].words
    for right in sight(final, played.talk.truth):
        if right.end is None:
            continue
        place = next(number for number, word in enumerate(final) if word is right.mark)
        shown = next(seen.at for seen in played.sights
                     if any(_is_there(word, right.mark) for word in seen.words))
        committed = next(seen.at for seen in played.sights if seen.stable > place)
        yield shown - right.end, committed - right.end


def _is_there(word: WordTime, mark: WordTime) -> bool:
    return word.word == mark.word and abs(word.start - mark.start) <= NEAR


def heard_after(played: Played) -> Iterator[float]:
    """Yield how long after the end of each word a text is shown that has heard it, whatever it says.

    In seconds. This is what a machine adds that is slow or has many streams; how much must follow a word
    before it is recognized is left out.
    """
    for word in played.talk.truth:
        yield next(at for at, heard in played.heard if heard >= word.end - 1e-9) - word.end


def changes(played: Played) -> tuple[int, int, int, int]:
    """Return words shown, words taken back, texts shown, texts that take a word back.

    Shangguan et al. 2020 (arXiv 2006.01416) count such words by those of the final text. Texts that follow
    one another are aligned. A last word that only grows is not taken back: it is the same word, and counts
    once.
    """
    texts = [text for text, _ in itertools.groupby(seen.text for seen in played.sights) if text]
    gone, new = np.array([_changed(*pair) for pair in zip([[], *texts], texts)] or [(0, 0)]).T
    return int(new.sum()), int(gone.sum()), len(texts), int((gone > 0).sum())


def _changed(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """Return how many words went and came from a text to the next."""
    pairs = align_words(before, after)
    same = sum(one == other for one, other in pairs)
    last = next((other for one, other in reversed(pairs) if one != EPS), EPS)
    same += bool(before) and last != before[-1] and last.startswith(before[-1])
    return len(before) - same, len(after) - same


def spread_of(name: str, seconds: Sequence[float]) -> dict[str, Optional[float]]:
    """Return mean and percentiles in milliseconds; none of nothing."""
    values = np.array(seconds) * 1000
    points = {"mean": np.mean, **{f"p{p}": lambda x, p=p: np.percentile(x, p) for p in (50, 90, 99)}}
    return {f"{name}_{point}_ms": round(float(of(values)), 1) if len(values) else None
            for point, of in points.items()}


def measures(every: Sequence[Played]) -> dict[str, Any]:
    """Return latency, stability and word errors of talks."""
    found = [delay for played in every for delay in delays(played)]
    shown, back, texts, unstable = np.sum([changes(played) for played in every], 0).tolist()
    errors = sum((count_errors(played.talk.text, " ".join(played.sights[-1].text)) for played in every),
                 WordErrors())
    ends = [played.sights[-1].at - played.talk.seconds for played in every]
    return {
        "wer": round(errors.wer, 3), "words": errors.words, "measured": len(found),
        **spread_of("first", [first for first, _ in found]),
        **spread_of("heard", [delay for played in every for delay in heard_after(played)]),
        **spread_of("commit", [commit for _, commit in found]),
        **spread_of("final", ends),
        "instability": round(back / max(1, shown), 4), "unstable_texts": round(unstable / max(1, texts), 4),
    }


# --- aims -----------------------------------------------------------------------------------------------


def find(rows: Iterable[Row], kind: str, method: str, chunk: Optional[int] = None) -> Optional[Row]:
    """Return the row of a method and chunk, if it is there."""
    return next((row for row in rows if (row["kind"], row["method"], row.get("chunk_ms")) ==
                 (kind, method, chunk)), None)


def aims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what was aimed at, the figure, and whether it is met; only of what was measured."""
    made: list[dict[str, Any]] = []

    def aim(said: str, figure: float, most: float, form: str) -> None:
        made.append({"aim": said, "figure": form.format(figure), "met": figure <= most})

    for row in rows:
        whole, chunk = find(rows, WHOLE, row["method"]), row.get("chunk_ms")
        if row["kind"] == STREAM and chunk == 640 and whole is not None and whole["wer"]:
            said = f"{row['method']}, 640 ms: WER at most 5 % above that of whole utterances"
            aim(said, 100 * (row["wer"] / whole["wer"] - 1), 5, "{:+.1f} %")
        if row["kind"] != STREAM or row["method"] != LLM:
            continue
        if row["first_p90_ms"] is not None:
            said = f"{LLM}, {chunk} ms: p90 of first showing at most chunk + 300 ms"
            aim(said, row["first_p90_ms"], chunk + 300, "{:.0f} ms")
        bare = find(rows, STREAM, CTC, chunk)
        if bare is not None and bare["first_p90_ms"] is not None:
            more = row["first_p90_ms"] - bare["first_p90_ms"]
            aim(f"{LLM}, {chunk} ms: the LLM adds at most 150 ms at p90", more, 150, "{:+.0f} ms")
            taken, before = row["instability"], bare["instability"]
            said = f"{LLM}, {chunk} ms: words taken back at most 1.5 times as often as without"
            figure = f"{100 * taken:.1f} % to {100 * before:.1f} %"
            made.append({"aim": said, "figure": figure, "met": taken <= 1.5 * before})
    for row in rows:
        if row["kind"] == CAPACITY:
            said = f"{row['method']}, {row['chunk_ms']} ms: 20 streams on two cores, a process each"
            made.append({"aim": said, "figure": f"{2 * row['streams']}", "met": 2 * row["streams"] >= 20})
    return made


# --- pages ----------------------------------------------------------------------------------------------

def page(rows: Sequence[Row]) -> list[str]:
    """Return the tables as lines of Markdown."""
    played = [{**row, "chunk_ms": row["chunk_ms"] or "whole"} for row in rows if row["kind"] != CAPACITY]
    lines = table(played, COLUMNS["streams"]) if played else []
    capacity = [row for row in rows if row["kind"] == CAPACITY]
    if capacity:
        lines += ["", f"Streams that one core holds, so that 99 % of words are heard within {BUSY} ms:", "",
                  *table(capacity, COLUMNS["capacity"])]
    found = aims(rows)
    columns = [Column("aim", "aim"), Column("measured", "figure"),
               Column("", lambda row: "met" if row["met"] else "missed")]
    return [*lines, "", *table(found, columns)] if found else lines


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Draw WER against the p90 latency of first showing, a line a method; dashed: whole utterances."""
    shown = [row for row in rows if row["kind"] == STREAM and row["first_p90_ms"] is not None]
    lines = []
    for method in dict.fromkeys(row["method"] for row in shown):
        own = sorted((row for row in shown if row["method"] == method), key=lambda row: row["chunk_ms"])
        whole = find(rows, WHOLE, method)
        lines.append(Line(method, [row["first_p90_ms"] for row in own], [row["wer"] for row in own],
                          [] if lines else [str(row["chunk_ms"]) for row in own], whole and whole["wer"]))
    title = "Streams by chunk size (ms); dashed: whole utterances"
    x = "p90 of the latency of words, from their end to their first showing (ms)"
    pictures.draw(Path(path), [Panel(title, x, "WER of committed text (%)", lines)])
