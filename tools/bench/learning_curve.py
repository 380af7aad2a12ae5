"""The learning curve of an acoustic model: audio heard against word errors of dev, table and picture.

    python tools/bench/learning_curve.py --logs exp/ctc_aed/log.jsonl --tokens exp/ctc_aed/export \\
        --manifest data/manifests/minibooks_cuts_train.jsonl.gz --picture pretrained/learning-curve.png

Hours are those of all training audio times the share of its tokens that were trained on: a batch counts the
tokens of its texts, and audio that is heard twice counts twice.
"""
from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from pictures import Line, Panel, draw  # noqa: E402

from icefall_fusion.common.files import write_json  # noqa: E402
from icefall_fusion.text.tokens import AcousticTokens  # noqa: E402
from icefall_fusion.train.training_log import read_validations  # noqa: E402


def hours_a_token(manifest: Path, tokens: AcousticTokens) -> float:
    """Return hours of audio over the tokens of its texts, an end each included."""
    seconds, count = 0.0, 0
    with gzip.open(manifest, "rt", encoding="utf-8") as lines:
        for line in lines:
            cut = json.loads(line)
            seconds += cut["duration"]
            count += sum(len(tokens.encode(part["text"])) + 1 for part in cut["supervisions"])
    return seconds / 3600 / count


def read(log: Path, rate: float) -> list[dict[str, Any]]:
    """Return step, hours heard, loss and word error rate of each validation."""
    return [
        {"step": line["step"], "hours": round(line["items"] * rate, 1), "loss": round(line["valid_loss"], 4),
         "wer": round(line["valid_greedy_wer"], 2)}
        for line in read_validations(log) if "valid_greedy_wer" in line
    ]


def main() -> None:
    """Parse the command line, print the table, draw the picture."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--logs", nargs="+", required=True, help="log.jsonl of trainings, or NAME=FILE")
    parser.add_argument("--manifest", required=True, help="cuts of the training audio")
    parser.add_argument("--tokens", required=True, help="folder of the acoustic model, or its bpe.model")
    parser.add_argument("--before", type=float, default=0.0, help="hours heard before the first log begins")
    parser.add_argument("--picture", default="bench/learning-curve.png")
    parser.add_argument("--output", default="bench/learning-curve.json")
    args = parser.parse_args()
    rate = hours_a_token(Path(args.manifest), AcousticTokens.load(args.tokens))
    curves = {}
    for named in args.logs:
        name, _, path = named.rpartition("=")
        curves[name or "greedy CTC"] = rows = read(Path(path), rate)
        for row in rows:
            row["hours"] = round(row["hours"] + args.before, 1)
            print(f"{name:12}{row['step']:8,}{row['hours']:9.1f} h  loss {row['loss']:.3f}"
                  f"  WER {row['wer']:.2f} %")
    lines = [
        Line(name, [row["hours"] for row in rows], [row["wer"] for row in rows])
        for name, rows in curves.items()
    ]
    title = "Word errors of dev while training"
    draw(Path(args.picture), [Panel(title, "hours of audio heard", "WER (%)", lines)])
    write_json(args.output, {"options": vars(args), "curves": curves})


if __name__ == "__main__":
    main()
