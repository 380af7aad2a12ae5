"""Job ``internal-lm``: what an acoustic model itself knows of text, from its own output on training audio.
Knows: recognizers, priors of labels, n-grams over pieces. Must not know: how a search or a fusion works.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from icefall_fusion.acoustic.prior import PriorCounter, write_prior
from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.ngram.arpa import longest_order, write_arpa
from icefall_fusion.ngram.kneser_ney import count_ngrams, kneser_ney

PRIOR, NGRAM = "prior.json", "lodr.arpa.gz"


@dataclass(frozen=True)
class InternalLmOptions:
    """Estimate the prior of CTC labels and a low-order n-gram of the acoustic model's own output.

    Writes ``prior.json`` (for --emissions.prior) and ``lodr.arpa.gz`` (for --lodr).

    Args:
        emissions: the acoustic model, or saved log-probs; without a prior.
        cuts: manifest of audio that the model was trained on.
        out: folder.
        order: longest n-gram.
        limit: use only so many utterances, spread over the manifest; 0: all.
        batch_size: utterances decoded together; none: as in a decode.
    """

    cuts: str
    out: str
    emissions: EmissionOptions = field(default_factory=EmissionOptions)
    order: int = 2
    limit: int = 0
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_at_least(1, self, "order")
        check_at_least(0, self, "limit")
        rule = "be left out: the prior is what is estimated"
        check(not self.emissions.prior, "InternalLmOptions.emissions.prior", rule, self.emissions.prior)


def run(options: InternalLmOptions) -> int:
    """Run the job ``internal-lm``; the exit code is 3 if some audio could not be read.

    Raises:
        ValueError: no frame was read, or the order is too long.
    """
    recognizer = Recognizer(
        RecognizerOptions(emissions=options.emissions, batch_size=options.batch_size), "ctc-greedy"
    )
    tokens = recognizer.source.tokens
    longest = longest_order(tokens.size)
    check(options.order <= longest, "InternalLmOptions.order", f"be at most {longest}", options.order)
    utterances = spread(read_cuts(options.cuts, recognizer.source.wants), options.limit)
    prior, texts = PriorCounter(tokens.size), []
    for some in recognizer.batches(utterances):
        for batch in recognizer.emit(some):
            prior.add(batch.emissions)
            found = recognizer.methods[0].decode(batch.emissions).nbests
            texts += [nbest[0].tokens for nbest in found if nbest[0].tokens]
    check(bool(texts), "InternalLmOptions.cuts", "have audio in which the model hears text", options.cuts)
    out = Path(options.out)
    write_prior(out / PRIOR, prior.log_prior(), tokens, prior.frames)
    ends = np.cumsum([len(ids) + 2 for ids in texts])
    bounds = np.stack([ends - [len(ids) + 2 for ids in texts], ends], axis=1)
    stream = np.array([index for ids in texts for index in (0, *ids, 0)], np.int64)
    estimates = kneser_ney(count_ngrams(stream, bounds, tokens.size, options.order), tokens.size)
    write_arpa(out / NGRAM, estimates, tokens.pieces)
    sizes = ", ".join(f"{len(estimate.keys)} {n}-grams" for n, estimate in enumerate(estimates, 1))
    blank = float(prior.log_prior()[tokens.blank_id].exp())
    print(f"{out}: prior of {prior.frames} frames ({100 * blank:.1f} % blank); {sizes} of {len(texts)} texts")
    for utterance, error in recognizer.unreadable:
        logging.warning("skipped %s: %s", utterance.id, error)
    return SKIPPED_SOME if recognizer.unreadable else 0
