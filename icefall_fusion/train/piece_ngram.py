"""Job ``train-ngram``: a back-off n-gram over the acoustic pieces, from a stream of ids to an ARPA file.
Knows: token streams, options. Must not know: neural models, search, fusion, how n-grams are estimated.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.ngram.arpa import longest_order, write_arpa
from icefall_fusion.ngram.kneser_ney import count_ngrams, kneser_ney, with_marks
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.ngram.pruning import prune
from icefall_fusion.text.tokens import AcousticTokens
from icefall_fusion.train.token_stream import document_bounds


@dataclass(frozen=True)
class TrainNgramOptions:
    """Train an n-gram over the acoustic pieces, for shallow fusion and for the look-ahead of delayed fusion.

    All n-grams are in memory: about 60 bytes for each piece of the text and each order.

    Args:
        data: folder with ``train.npy`` and ``dev.npy``: ids of documents ``bos t1 .. tn eos`` end to end.
        tokens: the acoustic model's ``bpe.model``, or its folder.
        out: the ARPA file to write; gzipped if it ends in .gz.
        order: longest n-gram.
        cutoffs: for n = 2, 3, ...: the smallest count that is kept; missing cutoffs are 1 (all are kept). The
            longest n-grams count their occurrences, shorter ones the different pieces before them.
        prune: leave out n-grams without which the perplexity of the text rises by less than this share, e.g.
            1e-8; 0 leaves out none. At equal size a better model than by cutoffs alone.
        digits: significant digits of the numbers in the file, 2 to 9; fewer make it smaller.
    """

    data: str
    tokens: str
    out: str
    order: int = 3
    cutoffs: tuple[int, ...] = (1, 3, 5)
    prune: float = 0.0
    digits: int = 5

    def __post_init__(self) -> None:
        check_at_least(1, self, "order")
        for name in ("data", "tokens", "out"):
            check(bool(getattr(self, name)), f"TrainNgramOptions.{name}", "not be empty", getattr(self, name))
        good = all(cutoff >= 1 for cutoff in self.cutoffs)
        check(good, "TrainNgramOptions.cutoffs", "be at least 1", self.cutoffs)
        check_at_least(0, self, "prune")
        check(2 <= self.digits <= 9, "TrainNgramOptions.digits", "be 2 to 9", self.digits)


def run(options: TrainNgramOptions) -> int:
    """Run the job ``train-ngram``; print the sizes and dev's perplexity a word, as ``train-lm`` counts it.

    Raises:
        FileNotFoundError, ValueError: streams or vocabulary are missing or do not fit each other.
    """
    tokens = AcousticTokens.load(options.tokens)
    mark = tokens.sos_eos_id
    check(mark is not None, f"pieces of {options.tokens}", "have <sos/eos>", mark)
    longest = longest_order(tokens.size)
    rule = f"be at most {longest} for {tokens.size} pieces"
    check(options.order <= longest, "TrainNgramOptions.order", rule, options.order)
    streams = []
    for name in ("train", "dev"):
        path = Path(options.data) / f"{name}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        stream = np.load(path)
        largest = int(stream.max(initial=0))
        check(largest < tokens.size, f"ids of {path}", f"be below {tokens.size}", largest)
        streams.append((stream, document_bounds(stream, mark, mark, str(path))))
    (train, bounds), (dev, dev_bounds) = streams
    counts = count_ngrams(train, bounds, tokens.size, options.order)
    estimates = kneser_ney(counts, tokens.size, options.cutoffs)
    if options.prune > 0:
        estimates = prune(estimates, counts, tokens.size + 2, options.prune)
    write_arpa(options.out, estimates, tokens.pieces, options.digits)
    words = sum(len(tokens.words(dev[begin + 1 : end - 1].tolist())) + 1 for begin, end in dev_bounds)
    marked = torch.from_numpy(with_marks(dev, dev_bounds, tokens.size))
    scores, _ = PieceNgram.load(options.out, tokens.pieces).score_sentences(marked)
    perplexity = math.exp(-float(scores.double().sum()) / words)
    sizes = ", ".join(f"{len(estimate.keys)} {n}-grams" for n, estimate in enumerate(estimates, 1))
    print(f"{options.out}: {sizes}; {perplexity:.1f} perplexity a word on dev")
    return 0
