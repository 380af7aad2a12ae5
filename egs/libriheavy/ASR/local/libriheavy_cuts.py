"""Knows: the manifests of LibriHeavy as they are downloaded, and those of the recipe.
Must not know: audio, features, vocabularies, models.

    python local/libriheavy_cuts.py --subsets dev test_clean test_other small --text lower
    python local/libriheavy_cuts.py --subsets small medium --split train      # one manifest of several parts

Reads download/libriheavy/libriheavy_cuts_SUBSET.jsonl.gz line by line and writes
data/manifests/libriheavy_cuts_SPLIT.jsonl.gz, whole or not at all; SPLIT is the subset, or --split.
A finished manifest whose inputs and options are the same is not written again.

Skipped are lines that are no JSON or lack a key, empty texts, cuts that reach beyond their recording,
repeated ids of a split and, with --check_audio true, cuts without a recording. libriheavy_cuts_SPLIT.json
beside the manifest counts them and has path, line, id and reason of the first 1,000. A split that lacks the
audio of more than --max_missing of its cuts is refused: the evaluation sets are drawn from all three parts of
Libri-Light. A file that was cut short is no line to skip but a failed download: its readable cuts are kept in
libriheavy_cuts_SPLIT.incomplete.jsonl.gz, which no stage takes for a manifest.

Exit codes: 0 done; 2 refused (a wrong option, a file that is missing or was cut short, too much audio that is
missing); 3 lines were skipped.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.command_line import REFUSED, SKIPPED_SOME, parse_options
from icefall_fusion.common.files import fingerprint, write_json
from icefall_fusion.data.cut_lines import TruncatedError, read_stream
from icefall_fusion.data.manifests import SeenIds, cuts_path, join_lines
from icefall_fusion.text.normalizer import normalize

CORPUS = "libriheavy"
PARTS = ("small", "medium", "large")  # of Libri-Light
FORMS = ("upper", "lower", "cased")
PREFIX = "download/"  # of all paths in the manifests; --download replaces it
TOLERANCE = 0.01  # seconds that a cut may end after its recording: one frame
LISTED, SHOWN = 1000, 20  # skipped lines that the summary has, and that are printed


@dataclass(frozen=True)
class LibriheavyCutsOptions:
    """Write the recipe's manifests from those of LibriHeavy.

    Args:
        subsets: small, medium, large, dev, test_clean, test_other, test_clean_large, test_other_large.
        split: one manifest of this name for all subsets together; none: one for each.
        download: the folder that has librilight and libriheavy.
        data_dir: where ``manifests/`` goes.
        text: upper or lower (normalized words), or cased (as printed).
        min_duration: seconds; shorter cuts are left out.
        max_duration: seconds; longer cuts are left out; none takes all.
        pre_text: keep the text printed before each cut, a prompt for LLMs. It is most of a manifest, and
            training does not need it.
        check_audio: skip cuts whose recording is not there.
        max_missing: with check_audio, the largest share of a split's cuts, 0 to 1, that may be skipped for
            this. The WER of the rest would be that of another set.
    """

    subsets: tuple[str, ...] = ("dev", "test_clean", "test_other", "small")
    split: str = ""
    download: Path = Path("download")
    data_dir: Path = Path("data")
    text: str = "lower"
    min_duration: float = 0.0
    max_duration: Optional[float] = None
    pre_text: bool = True
    check_audio: bool = False
    max_missing: float = 0.005

    def __post_init__(self) -> None:
        name = type(self).__name__
        check(len(self.subsets) > 0, f"{name}.subsets", "name at least one subset", self.subsets)
        check("/" not in self.split, f"{name}.split", "be a name without a slash", self.split)
        check_choice(self.text, FORMS, f"{name}.text")
        check(self.min_duration >= 0, f"{name}.min_duration", "be at least 0", self.min_duration)
        check(0 <= self.max_missing <= 1, f"{name}.max_missing", "lie in 0..1", self.max_missing)
        longest, rule = self.max_duration, f"be above min_duration ({self.min_duration})"
        check(longest is None or longest > self.min_duration, f"{name}.max_duration", rule, longest)


class LineError(ValueError):
    """A line that cannot be used, and of which ``kind`` it is in the summary."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Counts:
    """What became of the lines."""

    lines: int = 0
    too_short: int = 0
    too_long: int = 0
    skipped_count: int = 0
    skipped_as: dict[str, int] = field(default_factory=dict)
    missing_audio: dict[str, int] = field(default_factory=dict)  # cuts, by part of Libri-Light
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def skip(self, path: Path, number: int, id: Any, error: LineError) -> None:
        """Count, list and print a line that cannot be used."""
        self.skipped_count += 1
        self.skipped_as[error.kind] = self.skipped_as.get(error.kind, 0) + 1
        if error.kind == "audio":
            part = str(id).partition("/")[0]
            self.missing_audio[part] = self.missing_audio.get(part, 0) + 1
        if len(self.skipped) < LISTED:
            entry = {"path": str(path), "line": number, "id": id, "kind": error.kind, "error": str(error)}
            self.skipped.append(entry)
        if self.skipped_count <= SHOWN:
            tqdm.write(f"skipped {path}, line {number}, id {id}: {error}", file=sys.stderr)


def main() -> int:
    """Run from the command line; return the exit code."""
    try:
        return run(parse_options(LibriheavyCutsOptions, sys.argv[1:], "python local/libriheavy_cuts.py"))
    except (ValueError, TypeError, FileNotFoundError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def run(options: LibriheavyCutsOptions) -> int:
    """Write all manifests; return the exit code (see the top of the file)."""
    splits = {name: (name,) for name in options.subsets}
    if options.split:
        splits = {options.split: options.subsets}
    inputs = {
        split: [options.download / CORPUS / f"{CORPUS}_cuts_{subset}.jsonl.gz" for subset in subsets]
        for split, subsets in splits.items()
    }
    for path in (path for paths in inputs.values() for path in paths):
        if not path.is_file():
            raise FileNotFoundError(f"no manifest at {path}: download it first (local/download.sh)")
    codes = {write_split(options, split, paths) for split, paths in inputs.items()}
    return REFUSED if REFUSED in codes else max(codes)


def write_split(options: LibriheavyCutsOptions, split: str, paths: list[Path]) -> int:
    """Write one manifest and its summary, unless they are there already; return the exit code."""
    target = cuts_path(options.data_dir / "manifests", split, CORPUS)
    summary_path = target.with_name(f"{CORPUS}_cuts_{split}.json")
    made_from = {
        "options": json.loads(json.dumps(asdict(options), default=str)),
        "inputs": {str(path): fingerprint(path) for path in paths},
    }
    if target.is_file() and summary_path.is_file():
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        same = {name: summary.get(name) for name in made_from} == made_from
        if same and not summary.get("missing_audio"):  # it may be there by now
            print(f"{split}: already there, {target}")
            return SKIPPED_SOME if summary["skipped_count"] else 0
    counts, broken = Counts(), []
    partial = target.with_name(f"{CORPUS}_cuts_{split}.incomplete.jsonl.gz")
    totals = join_lines(convert_files(options, paths, counts, broken), partial)
    if broken:
        print(f"error: {broken[0]}: download it again", file=sys.stderr)
        print(f"{split}: no manifest; {totals['utterances']} cuts are kept in {partial}", file=sys.stderr)
        return REFUSED
    missing = sum(counts.missing_audio.values())
    if missing > options.max_missing * counts.lines:
        print(f"error: {split}: {_what_is_missing(options, counts)}", file=sys.stderr)
        partial.unlink()
        return REFUSED
    os.replace(partial, target)
    write_json(summary_path, {**totals, **asdict(counts), **made_from})
    left_out = f"{counts.too_short} too short, {counts.too_long} too long, {counts.skipped_count} skipped"
    print(f"{split}: {totals['hours']:.2f} h, {totals['utterances']} cuts, {left_out} -> {target}")
    return SKIPPED_SOME if counts.skipped_count else 0


def _what_is_missing(options: LibriheavyCutsOptions, counts: Counts) -> str:
    missing = counts.missing_audio
    share = 100 * sum(missing.values()) / counts.lines
    parts = ", ".join(f"{count} of {part}" for part, count in missing.items())
    largest = next((part for part in reversed(PARTS) if part in missing), PARTS[-1])
    return (
        f"{sum(missing.values())} of {counts.lines} cuts ({share:.1f} %) have no audio below "
        f"{options.download}/librilight ({parts}); at most {100 * options.max_missing:g} % may be missing "
        f"(max_missing). Fetch it: bash local/download.sh --to {options.download} --subset {largest}"
    )


def convert_files(
    options: LibriheavyCutsOptions, paths: list[Path], counts: Counts, broken: list[TruncatedError]
) -> Iterator[str]:
    """Yield the lines of the manifest; of a file that was cut short all that can be read."""
    size, seen = sum(path.stat().st_size for path in paths), SeenIds()
    with tqdm(total=size, unit="B", unit_scale=True, smoothing=0.05) as bar:
        for path in paths:
            before = bar.n
            with open(path, "rb") as file:
                try:
                    for number, line in read_stream(file, path):
                        counts.lines += 1
                        if number % 1000 == 0:
                            bar.update(before + file.tell() - bar.n)
                        yield from convert_line(options, path, number, line, counts, seen)
                except TruncatedError as error:
                    broken.append(error)
            bar.update(before + path.stat().st_size - bar.n)


def convert_line(
    options: LibriheavyCutsOptions, path: Path, number: int, line: bytes, counts: Counts, seen: SeenIds
) -> Iterator[str]:
    """Yield the line of the manifest, or count why there is none."""
    row: Any = None
    try:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LineError("json", f"no JSON: {error}") from None
        cut = convert_cut(options, row)
        if not seen.add(cut["id"]):
            raise LineError("twice", "has the id of an earlier cut")
    except LineError as error:
        counts.skip(path, number, row.get("id") if isinstance(row, dict) else None, error)
        return
    if cut["duration"] < options.min_duration:
        counts.too_short += 1
    elif cut["duration"] > (options.max_duration or math.inf):
        counts.too_long += 1
    else:
        yield json.dumps(cut, ensure_ascii=False) + "\n"


def convert_cut(options: LibriheavyCutsOptions, row: Any) -> dict[str, Any]:
    """Return LibriHeavy's cut as the recipe's.

    Raises:
        LineError: it cannot be used.
    """
    try:
        id, start, duration, recording = str(row["id"]), row["start"], row["duration"], row["recording"]
        (supervision,) = row["supervisions"]
        printed, custom = " ".join(supervision["custom"]["texts"][0].split()), supervision["custom"]
        end, length = start + duration, recording["num_samples"] / recording["sampling_rate"]
        audio = audio_path(options.download, recording["sources"][0]["source"])
        recording = {**recording, "sources": [{**recording["sources"][0], "source": audio}]}
        head = {"id": id, "recording_id": recording["id"], "start": 0.0, "duration": duration, "channel": 0}
        title = Path((row.get("custom") or {}).get("text_path") or audio).parent.name
    except KeyError as error:
        raise LineError("keys", f"has no key {error}") from None
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise LineError("keys", f"has values of other kinds: {error}") from None
    words = normalize(printed)
    if not words:
        raise LineError("text", f"has no words in its text {printed!r}")
    if not (start >= 0 and 0 < duration < math.inf and end <= length + TOLERANCE):
        raise LineError("beyond", f"reaches from {start} s to {end} s of a recording of {length} s, {audio}")
    if options.check_audio and not _is_file(audio):
        raise LineError("audio", f"has no recording at {audio}")
    kept = {"cased": printed, "book": title}
    language, speaker = supervision.get("language"), supervision.get("speaker")
    if options.pre_text:
        kept["pre_text"] = " ".join(((custom.get("pre_texts") or [""])[0]).split())
    text = {"upper": words.upper(), "lower": words, "cased": printed}[options.text]
    about = {"text": text, "language": language, "speaker": speaker, "custom": kept}
    cut = {"id": id, "start": start, "duration": duration, "channel": 0}
    return {**cut, "supervisions": [{**head, **about}], "recording": recording, "type": "MonoCut"}


def audio_path(download: Path, source: str) -> str:
    """Return where a recording lies: the manifests say download/librilight/..., whatever that folder is."""
    relative = source[len(PREFIX) :] if source.startswith(PREFIX) else source
    return os.path.abspath(download / relative)  # an absolute path stays


_is_file = functools.lru_cache(maxsize=1024)(os.path.isfile)  # the cuts of a recording follow each other


if __name__ == "__main__":
    sys.exit(main())
