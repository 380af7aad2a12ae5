"""What a better language model buys: word errors by the quality of the LM, and of the acoustic model.

    OMP_NUM_THREADS=1 python tools/bench/quality.py --acoustic shipped=pretrained/ctc_aed --dev DEV \\
        --tests test-clean=CUTS --lm none= 5-gram=ngram.arpa.gz SmolLM2=package:... adapted=exp/llm/export

Of every pair of models the weights are tuned on some utterances of dev, by decoding them, and the test sets
are decoded. The perplexity a word is that of dev's references, the end of each counted as a word. What is
finished is kept in --out: a run that was stopped goes on.
"""
from __future__ import annotations

import argparse
import functools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import torch  # noqa: E402
from pictures import Line, Panel, draw  # noqa: E402

from icefall_fusion.acoustic.sources import EmissionOptions  # noqa: E402
from icefall_fusion.decode import tune  # noqa: E402
from icefall_fusion.decode.job import DecodeOptions, DecodeRun  # noqa: E402
from icefall_fusion.decode.language_models import LmOptions  # noqa: E402
from icefall_fusion.decode.options import NgramOptions  # noqa: E402
from icefall_fusion.decode.weights import read_weights  # noqa: E402
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.ngram.piece_ngram import PieceNgram  # noqa: E402
from icefall_fusion.scoring.score import read_texts  # noqa: E402
from icefall_fusion.search import PrefixSearchOptions  # noqa: E402
from icefall_fusion.text.tokens import AcousticTokens  # noqa: E402


def is_ngram(path: str) -> bool:
    """Return whether a language model is an n-gram over the acoustic pieces."""
    return path.endswith((".arpa", ".arpa.gz"))


@functools.lru_cache(maxsize=None)  # no acoustic model changes it
def log_prob(path: str, dtype: str, device: str, texts: tuple[str, ...]) -> float:
    """Return log P of texts by a model, their ends included."""
    lm = CausalLm.from_pretrained(path, dtype=getattr(torch, dtype), device=device)
    return sum(lm.log_probs(texts, eos=True))


class Pair:
    """An acoustic model and a language model.

    Args:
        args: of the command line.
        acoustic, lm: name and path of each; a language model without a path is none.
    """

    def __init__(self, args: argparse.Namespace, acoustic: tuple[str, str], lm: tuple[str, str]) -> None:
        self.args, (self.acoustic, self.model), (self.lm, self.path) = args, acoustic, lm
        self.folder = Path(args.out) / self.acoustic / self.lm
        ngram = is_ngram(self.path)
        self.method = "ctc-prefix" if not self.path else "ngram-shallow" if ngram else args.method
        self.options = DecodeOptions(
            out=str(self.folder / "decode"), test_sets=dict(named.split("=", 1) for named in args.tests),
            emissions=EmissionOptions(model=self.model, device=args.device), methods=self.method,
            ngram=NgramOptions(self.path if ngram else ""),
            llm=LmOptions("" if ngram else self.path, dtype=args.dtype),
            limit=args.limit, batch_size=args.batch, threads=args.threads,
        )

    def weights(self) -> Path:
        """Tune the weights on dev unless that is done, and return their file."""
        path, args = self.folder / "weights.yaml", self.args
        if not path.is_file():
            scores = "ngram-nbest-rescoring" if is_ngram(self.path) else "llm-nbest-rescoring"
            dev = replace(self.options, out=str(self.folder / "dev"), test_sets={"dev": args.dev},
                          methods=scores, limit=args.tune)
            DecodeRun(replace(dev, search=PrefixSearchOptions(beam=20))).decode_all()
            lists = self.folder / "dev" / f"nbest-dev-{scores}.jsonl"
            tune.run(tune.TuneOptions([str(lists)], args.dev, str(path), self.method, confirm=dev))
        return path

    def perplexity(self) -> Optional[float]:
        """Return the perplexity a word of dev's references."""
        texts = [text for text in read_texts(self.args.dev).values() if text]
        words = sum(len(text.split()) + 1 for text in texts)
        if not self.path:
            return None
        if not is_ngram(self.path):
            return math.exp(-log_prob(self.path, self.args.dtype, self.args.device, tuple(texts)) / words)
        tokens = AcousticTokens.load(self.model)
        ends = [[tokens.size, *tokens.encode(text), tokens.size + 1] for text in texts]
        stream = torch.tensor([index for text in ends for index in text])
        scores, _ = PieceNgram.load(self.path, tokens.pieces).score_sentences(stream)
        return math.exp(-float(scores.double().sum()) / words)

    def row(self) -> dict[str, Any]:
        """Decode what is not decoded yet, and return the figures."""
        weights = str(self.weights()) if self.path else ""
        rows = DecodeRun(replace(self.options, weights=weights)).decode_all()
        return {
            "acoustic": self.acoustic, "lm": self.lm, "method": self.method, "perplexity": self.perplexity(),
            "wer": {row["test_set"]: row["wer"] for row in rows},
            "words": {row["test_set"]: row["words"] for row in rows},
            "lm_seconds": {row["test_set"]: row["lm_seconds"] for row in rows},
            "weights": read_weights(weights).get(self.method, {}) if weights else {},
        }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw word errors over perplexity, a panel a test set and a line an acoustic model and method."""
    panels = []
    for test_set in rows[0]["wer"]:
        lines = []
        known = [row for row in rows if row["perplexity"] is not None]
        for acoustic, method in dict.fromkeys((row["acoustic"], row["method"]) for row in known):
            some = [row for row in known if (row["acoustic"], row["method"]) == (acoustic, method)]
            some.sort(key=lambda row: row["perplexity"])
            errors = [row["wer"][test_set] for row in some]
            name = f"{acoustic}, {method}" if len({row["acoustic"] for row in known}) > 1 else method
            lines.append(Line(name, [r["perplexity"] for r in some], errors, [r["lm"] for r in some]))
        panels.append(Panel(test_set, "perplexity a word of dev (log)", "WER (%)", lines, True))
    draw(path, panels)


def main() -> None:
    """Parse the command line, measure, print, write JSON and a picture."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--acoustic", nargs="+", required=True, help="NAME=FOLDER of acoustic models")
    parser.add_argument("--lm", nargs="+", required=True, help="NAME=PATH: none, an ARPA file, or a model")
    parser.add_argument("--dev", required=True, help="manifest of dev")
    parser.add_argument("--tests", nargs="+", required=True, help="NAME=MANIFEST of test sets")
    parser.add_argument("--method", default="llm-delayed-shortest", help="of the models that are no n-gram")
    parser.add_argument("--tune", type=int, default=96, help="utterances of dev; 0: all")
    parser.add_argument("--limit", type=int, default=0, help="utterances of each test set; 0: all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", help="of language models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--out", default="bench/quality", help="folder of lists and weights")
    parser.add_argument("--picture", default="bench/quality.png")
    parser.add_argument("--output", default="bench/quality.json")
    args = parser.parse_args()
    rows = []
    for acoustic in args.acoustic:
        for lm in args.lm:
            row = Pair(args, tuple(acoustic.split("=", 1)), tuple(lm.split("=", 1))).row()
            rows.append(row)
            figures.save(args, rows)
            known = f"{row['perplexity']:9.1f}" if row["perplexity"] else " " * 9
            print(f"{row['acoustic']:14}{row['lm']:18}{known}  {row['method']:28}",
                  "  ".join(f"{name} {wer:.2f} %" for name, wer in row["wer"].items()), flush=True)
    picture(rows, Path(args.picture))
    figures.write(args, rows)


if __name__ == "__main__":
    main()
