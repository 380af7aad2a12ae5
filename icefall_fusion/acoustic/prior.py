"""The prior of CTC labels, divided out of the log-probs (pseudo-likelihoods).
Knows: log-probs, a file of priors. Must not know: searches, language models, how the prior was estimated.

A CTC model gives posteriors. With a language model, scaled likelihoods ``log P(label | frame) - scale * log
P(label)`` are used, as in hybrid systems; the prior is the mean of the model's own posteriors over training
frames, blank included (Zeyer et al. 2021, arXiv 2105.14849; Manohar et al. 2015 for lattice-free models).
Each frame is normalized again. That adds the same number to all hypotheses, so it changes no decision.
"""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Sequence

import torch
from torch import Tensor

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.acoustic.loading import loading
from icefall_fusion.common.checks import check, is_number
from icefall_fusion.common.files import PathLike, write_json
from icefall_fusion.text.language import ENGLISH
from icefall_fusion.text.tokens import AcousticTokens

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources.base import EmissionSource

#: Nats; rarer labels count as this rare: where the model has never seen one, its prior says nothing.
LEAST = -20.0


class SourceWithPrior:
    """A source of log-probs whose prior is divided out; see `EmissionSource`.

    Args:
        source: of posteriors.
        prior: [V] natural-log prior of each label.
        scale: of the log prior, above 0.
    """

    def __init__(self, source: EmissionSource, prior: Tensor, scale: float) -> None:
        check(is_number(scale) and scale > 0, "scale", "be above 0", scale)
        rule = f"have {source.tokens.size} labels"
        check(prior.shape == (source.tokens.size,), "prior", rule, tuple(prior.shape))
        check(source.has_ctc, "EmissionOptions.prior", "be empty for a model without a CTC head", "given")
        self.wants, self.tokens, self.model = source.wants, source.tokens, source.model
        self.transducer, self.has_ctc = source.transducer, True
        self.language = getattr(source, "language", ENGLISH)
        self._source, self._taken = source, scale * prior.float().clamp(min=LEAST)

    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        """Return the log-probs of a batch, the prior divided out."""
        emissions = self._source.emit(ids, inputs)
        log_probs = emissions.log_probs.float() - self._taken.to(emissions.log_probs.device)
        return replace(emissions, log_probs=log_probs.log_softmax(-1))


class PriorCounter:
    """Adds up posteriors over frames.

    Args:
        pieces: V.
    """

    def __init__(self, pieces: int) -> None:
        self.frames, self._sum = 0, torch.zeros(pieces, dtype=torch.float64)

    def add(self, emissions: Emissions) -> None:
        """Add the frames of a batch."""
        log_probs, lens = emissions.log_probs, emissions.lens.to(emissions.log_probs.device)
        inside = torch.arange(log_probs.shape[1], device=log_probs.device) < lens[:, None]
        self._sum += log_probs[inside].double().exp().sum(0).cpu()
        self.frames += int(lens.sum())

    def log_prior(self) -> Tensor:
        """Return the natural log of the mean posterior [V] float32.

        Raises:
            ValueError: there was no frame.
        """
        check(self.frames > 0, "frames", "be at least 1", self.frames)
        return (self._sum / self._sum.sum()).log().clamp(min=LEAST).float()


def write_prior(path: PathLike, prior: Tensor, tokens: AcousticTokens, frames: int) -> None:
    """Write a prior [V] as JSON, with the vocabulary's fingerprint."""
    write_json(path, {"pieces": tokens.fingerprint(), "frames": frames, "log_prior": prior.tolist()})


def read_prior(path: PathLike, tokens: AcousticTokens) -> Tensor:
    """Return the natural-log prior [V] of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of `write_prior`, or of another vocabulary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no prior of labels at {path}")
    with loading(path, "a prior of labels (see the job internal-lm)"):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        values, pieces = torch.tensor(content["log_prior"], dtype=torch.float32), content["pieces"]
        bad = values.dim() != 1 or not bool((values <= 1e-3).all())
    check(not bad, str(path), "hold log-probs", "others")
    check(pieces == tokens.fingerprint(), str(path), f"be of these {tokens.size} acoustic pieces", pieces)
    return values
