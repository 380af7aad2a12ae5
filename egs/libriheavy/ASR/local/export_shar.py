"""Knows: a manifest, lhotse's Shar format. Must not know: how features were made, training.

    python local/export_shar.py --manifest data/fbank/libriheavy_cuts_train.jsonl.gz --to data/shar/train
    python local/export_shar.py --manifest ... --to ... --start 0 --stop 1000     # one machine's share

Writes cuts.NUMBER.jsonl.gz and features.NUMBER.tar (or recording.NUMBER.tar) of --shard_size cuts each by
lhotse's own CutSet.to_shar: read one after the other, for storage that is slow at many small reads and for
programs that take lhotse's Shar. Our own training reads manifests, not these. The manifest is read line by
line; a shard that is there is left alone, so that a killed export goes on when called again. Exit codes: 0
done; 2 refused; 3 cuts whose data could not be read were left out (they are printed).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lhotse import CutSet, MonoCut
from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.command_line import REFUSED, SKIPPED_SOME, parse_options
from icefall_fusion.data.cut_lines import parse_cut, read_lines
from icefall_fusion.data.datamodule import load_features

FIELDS = {"features": "lilcom", "recording": "flac"}


@dataclass(frozen=True)
class ExportSharOptions:
    """Export a manifest and its data as lhotse Shar.

    Args:
        manifest: of cuts with features, or with audio for ``--fields recording``.
        to: the folder of shards.
        fields: features (lilcom), recording (FLAC), or both.
        shard_size: cuts in a shard.
        start: first shard to write here, from 0.
        stop: the shard before which to stop here; none goes on to the last.
    """

    manifest: Path
    to: Path
    fields: tuple[str, ...] = ("features",)
    shard_size: int = 1000
    start: int = 0
    stop: Optional[int] = None

    def __post_init__(self) -> None:
        check(len(self.fields) > 0, "ExportSharOptions.fields", "name at least one field", self.fields)
        for field in self.fields:
            check_choice(field, FIELDS, "ExportSharOptions.fields")
        check_at_least(1, self, "shard_size")
        check_at_least(0, self, "start")
        rule = f"be above start ({self.start})"
        check(self.stop is None or self.stop > self.start, "ExportSharOptions.stop", rule, self.stop)


def main() -> int:
    """Run from the command line; return the exit code."""
    try:
        return run(parse_options(ExportSharOptions, sys.argv[1:], "python local/export_shar.py"))
    except (ValueError, TypeError, FileNotFoundError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED


def run(options: ExportSharOptions) -> int:
    """Write the shards that are not there; return the exit code."""
    if not options.manifest.is_file():
        raise FileNotFoundError(f"no manifest at {options.manifest}: compute its features first")
    options.to.mkdir(parents=True, exist_ok=True)
    lines, skipped = read_lines(options.manifest), 0
    with tqdm(unit="cut", smoothing=0.05) as bar:
        for number in itertools.count():
            chunk = list(itertools.islice(lines, options.shard_size))
            if not chunk or number == options.stop:
                break
            if number >= options.start and not _cuts_path(options.to, number).exists():
                cuts = [parse_cut(line, f"{options.manifest}, line {row}") for row, line in chunk]
                skipped += len(cuts) - _write_shard(options, number, cuts)
            bar.update(len(chunk))
    return SKIPPED_SOME if skipped else 0


def _cuts_path(folder: Path, number: int) -> Path:
    return folder / f"cuts.{number:06d}.jsonl.gz"


def _write_shard(options: ExportSharOptions, number: int, cuts: list[MonoCut]) -> int:
    """Write one shard, its cuts last: they say that it is whole. Return how many cuts it holds."""
    kept = [cut for cut in cuts if _is_readable(cut, options.fields)]
    fields = {field: FIELDS[field] for field in options.fields}
    with tempfile.TemporaryDirectory(prefix=".shard-", dir=options.to) as folder:
        writing = CutSet(kept)
        writing.to_shar(folder, fields, options.shard_size, shard_offset=number, warn_unused_fields=False)
        written = sorted(Path(folder).iterdir(), key=lambda path: path.name.startswith("cuts."))
        for path in written:
            os.replace(path, options.to / path.name)
    return len(kept)


def _is_readable(cut: MonoCut, fields: tuple[str, ...]) -> bool:
    try:
        if "features" in fields:
            check(cut.has_features, f"cut {cut.id}", "have features", cut.features)
            load_features(cut)
        if "recording" in fields:
            cut.load_audio()
    except Exception as error:  # lhotse's audio backends raise many kinds
        logging.warning("skipped %s: %s", cut.id, error)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
