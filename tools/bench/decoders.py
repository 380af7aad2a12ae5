"""Other people's CTC decoders behind one function type, each imported only if it can be.
Knows: their arguments. Must not know: how results are judged, our own search beyond its public API.
"""
from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np
import torch
from torch import Tensor

# decode(log_probs [B, T, V], lens [B]) -> per utterance the n-best piece lists, best first
Decode = Callable[[Tensor, Tensor], list[list[list[int]]]]


@dataclass
class Decoder:
    """A decoder at one beam: its name, how to make it, its exact settings in words, what devices it takes."""

    name: str
    beam: int
    settings: str
    make: Callable[[], Decode]
    any_device: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether it is made for a GPU: not by tensors, frame by frame, nor by the CPU."""
        return self.any_device and self.name not in ("ours, mass recovered", "ours, by tensors")


def collapse(path: list[int], blank: int) -> list[int]:
    """Return the pieces of an alignment."""
    return [v for i, v in enumerate(path) if v != blank and (i == 0 or path[i - 1] != v)]


def ours(beam: int, blank: int, **options: object) -> Callable[[], Decode]:
    """Return a maker of our search (whole call, N-best lists made, no text)."""

    def make() -> Decode:
        from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search

        chosen = PrefixSearchOptions(beam=beam, word_times=False, **options)  # type: ignore[arg-type]

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            nbests = ctc_prefix_search(log_probs, lens, chosen, blank_id=blank)
            return [[hypothesis.tokens for hypothesis in nbest] for nbest in nbests]

        return decode

    return make


def greedy(blank: int) -> Callable[[], Decode]:
    """Return a maker of our greedy search."""

    def make() -> Decode:
        from icefall_fusion.search import ctc_greedy_search

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            return [[nbest[0].tokens] for nbest in ctc_greedy_search(log_probs, lens, blank_id=blank)]

        return decode

    return make


def flashlight(beam: int, pieces: int, threshold: float, log_add: bool, blank: int) -> Callable[[], Decode]:
    """Return a maker of flashlight-text's lexicon-free decoder without language model."""

    def make() -> Decode:
        module = importlib.import_module("flashlight.lib.text.decoder")
        options = module.LexiconFreeDecoderOptions(
            beam_size=beam, beam_size_token=pieces, beam_threshold=threshold, lm_weight=0.0, sil_score=0.0,
            log_add=log_add, criterion_type=module.CriterionType.CTC)
        decoder = module.LexiconFreeDecoder(options, module.ZeroLM(), -1, blank, [])

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            found = []
            for rows, frames in zip(log_probs, lens.tolist()):
                results = decoder.decode(rows.data_ptr(), frames, rows.shape[1])
                found.append([collapse([v for v in r.tokens if v >= 0], blank) for r in results[:beam]])
            return found

        return decode

    return make


def torchaudio_cpu(beam: int, blank: int) -> Callable[[], Decode]:
    """Return a maker of torchaudio's CPU decoder (flashlight-text), lexicon-free, with its defaults."""

    def make() -> Decode:
        make_decoder = importlib.import_module("torchaudio.models.decoder").ctc_decoder
        state: dict[int, object] = {}

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            size = log_probs.shape[2]
            if size not in state:
                names = [f"p{v}" for v in range(size)]
                names[blank] = "-"
                state[size] = make_decoder(
                    lexicon=None, tokens=names, nbest=beam, beam_size=beam, sil_token="-", blank_token="-")
            found = state[size](log_probs, lens.int())  # type: ignore[operator]
            return [[[v for v in h.tokens.tolist() if v != blank] for h in nbest] for nbest in found]

        return decode

    return make


def torchaudio_cuda(beam: int, blank: int, nbest: Optional[int] = None) -> Callable[[], Decode]:
    """Return a maker of torchaudio's CUDA decoder, no frame skipped; ``nbest`` None: all of the beam.

    It makes lists of hypotheses in Python; with ``nbest`` 0 it makes none, which is the GPU's work alone.
    Blank must be piece 0, and the beam no larger than the vocabulary.
    """

    def make() -> Decode:
        make_decoder = importlib.import_module("torchaudio.models.decoder").cuda_ctc_decoder
        if not torch.cuda.is_available() or blank != 0:
            raise ImportError("it needs a CUDA device and blank to be piece 0")
        state: dict[int, object] = {}

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            size = log_probs.shape[2]
            if size not in state:
                names = [f"p{v}" for v in range(size)]
                count = beam if nbest is None else nbest
                state[size] = make_decoder(names, nbest=count, beam_size=beam, blank_skip_threshold=1.0)
            on_device = log_probs.cuda().contiguous(), lens.cuda().int()
            found = state[size](*on_device)  # type: ignore[operator]
            return [[list(h.tokens) for h in nbest] for nbest in found]

        return decode

    return make


def k2_best_path(beam: float, active: int, blank: int) -> Callable[[], Decode]:
    """Return a maker of k2's lattice of the CTC topology and its best path (1-best only)."""

    def make() -> Decode:
        k2 = importlib.import_module("k2")
        k2.Fsa  # noqa: B018 (a folder of this name imports too)
        if blank != 0:
            raise ImportError("it needs blank to be piece 0")
        state: dict[int, object] = {}

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            size = log_probs.shape[2]
            if size not in state:
                state[size] = k2.create_fsa_vec([k2.ctc_topo(size - 1, modified=False)])
            parts = [[row, 0, int(frames)] for row, frames in enumerate(lens)]
            segments = torch.tensor(parts, dtype=torch.int32)
            order = torch.argsort(lens, descending=True)
            dense = k2.DenseFsaVec(log_probs, segments[order])
            lattice = k2.intersect_dense_pruned(state[size], dense, beam, beam, 1, active)
            best = k2.shortest_path(lattice, True)
            found: list = [[[]]] * len(lens)
            for place, row in enumerate(order.tolist()):
                found[row] = [[v for v in best[place].aux_labels.tolist() if v > 0]]
            return found

        return decode

    return make


def pyctcdecode(beam: int, token_floor: float, beam_floor: float, blank: int) -> Callable[[], Decode]:
    """Return a maker of pyctcdecode's decoder; every piece is one character, so that text is pieces."""

    def make() -> Decode:
        module = importlib.import_module("pyctcdecode")
        state: dict[int, object] = {}

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            size = log_probs.shape[2]
            if size not in state:
                labels = ["" if v == blank else chr(0x4E00 + v) for v in range(size)]
                state[size] = module.build_ctcdecoder(labels)
            found = []
            for rows, frames in zip(log_probs.numpy(), lens.tolist()):
                beams = state[size].decode_beams(  # type: ignore[attr-defined]
                    rows[:frames], beam_width=beam, token_min_logp=token_floor, beam_prune_logp=beam_floor)
                found.append([[ord(sign) - 0x4E00 for sign in result[0]] for result in beams])
            return found

        return decode

    return make


def fast_ctc_decode(beam: int, cut: float, blank: int) -> Callable[[], Decode]:
    """Return a maker of fast-ctc-decode's beam search (probabilities, blank first, 1-best only)."""

    def make() -> Decode:
        module = importlib.import_module("fast_ctc_decode")
        if blank != 0:
            raise ImportError("it needs blank to be piece 0")

        def decode(log_probs: Tensor, lens: Tensor) -> list[list[list[int]]]:
            probs = np.exp(log_probs.numpy())
            alphabet = [chr(0x4E00 + v) for v in range(probs.shape[2])]
            found = []
            for rows, frames in zip(probs, lens.tolist()):
                text, _ = module.beam_search(rows[:frames], alphabet, beam_size=beam, beam_cut_threshold=cut)
                found.append([[ord(sign) - 0x4E00 for sign in text]])
            return found

        return decode

    return make


def all_decoders(beams: list[int], blank: int) -> list[Decoder]:
    """Return every decoder at every beam."""
    found = [Decoder("greedy (ours)", 1, "best path", greedy(blank), True)]
    for beam in beams:
        makers = {
            "ours": ("exact sum, all pieces", ours(beam, blank)),
            "ours, blank skip": ("frames with p(blank) > 0.99", ours(beam, blank, blank_skip=0.99)),
            "ours, mass recovered": ("exact sum", ours(beam, blank, recover_mass=True)),
            "ours, by tensors": ("exact sum", ours(beam, blank, recover_mass=True, engine="torch")),
            "flashlight log_add": ("pieces = beam, threshold 25", flashlight(beam, beam, 25.0, True, blank)),
            "flashlight log_add, 40": ("40 pieces, threshold 25", flashlight(beam, 40, 25.0, True, blank)),
            "flashlight max": ("40 pieces, threshold 50", flashlight(beam, 40, 50.0, False, blank)),
            "torchaudio": ("CPU, its defaults", torchaudio_cpu(beam, blank)),
            "torchaudio, CUDA": ("no frame skipped", torchaudio_cuda(beam, blank)),
            "k2, best path": ("search beam 20, states <= 10 a piece", k2_best_path(20.0, 10 * beam, blank)),
            "pyctcdecode": ("its defaults: token -5, beam -10", pyctcdecode(beam, -5, -10, blank)),
            "fast-ctc-decode": ("cut 5e-4, 1-best", fast_ctc_decode(beam, 5e-4, blank)),
        }
        found += [
            Decoder(name, beam, settings, make, name.startswith("ours") or name == "torchaudio, CUDA")
            for name, (settings, make) in makers.items()
        ]
    return found


def try_to_make(decoder: Decoder) -> tuple[Optional[Decode], str]:
    """Return the decoder's function, or None and why it cannot be had."""
    try:
        with torch.inference_mode():
            return decoder.make(), ""
    except Exception as error:  # other people's, not there or broken: no decoder stops the others
        return None, f"{type(error).__name__}: {error}"
