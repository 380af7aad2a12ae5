"""The memory plan of each test set of a decode, and the peak that it came to.
Knows: sources of emissions, language models, memory in use. Must not know: utterances, methods.
"""
from __future__ import annotations

import logging
from typing import Any, Iterable, Mapping

import torch

from icefall_fusion.acoustic.sources import EmissionSource
from icefall_fusion.common.memory import give_back_memory, memory_in_use, peak_memory_bytes, reset_peak_memory
from icefall_fusion.data.fbank import DIM, FRAME_SHIFT
from icefall_fusion.decode.language_models import Lms
from icefall_fusion.decode.memory_plan import BatchShape, MethodShape, describe_plan, plan_memory

_TRIED = 4  # on a CPU the encoder is tried with one of so many utterances
#: What libraries and the allocator of a process gather beside what is asked for, and more for each method
#: that takes turns with others, seen in decodes on a CPU.
_GATHERED, _GATHERED_A_METHOD = 50_000_000, 10_000_000
_LOOSE = 60_000_000  # so much more than before and the allocator is asked to give back


class MemoryWatch:
    """Plans memory, watches it.

    Args:
        source: of emissions.
        lms: the language models, loaded.

    Attributes:
        sets: by test set, what `plan_memory` returns, and ``peak``.
    """

    def __init__(self, source: EmissionSource, lms: Lms) -> None:
        self._source, self._lms = source, lms
        models = [lm.model for lm in lms.loaded().values()] + [source.network]
        self._on_gpu = any(p.is_cuda for model in models if model is not None for p in model.parameters())
        self._peak = self._least = 0
        self.sets: dict[str, dict[str, Any]] = {}

    def plan(self, name: str, batches: Iterable[BatchShape], methods: Mapping[str, MethodShape]) -> None:
        """Say what decoding a test set will take, and begin to watch.

        Args:
            name: of the test set.
            batches: all shapes that there will be.
            methods: see `plan_memory`.
        """
        shapes = list(batches)
        if not shapes:  # an earlier run has decoded all
            return
        measures = (lambda s: s.rows * s.seconds, lambda s: s.rows * s.seconds**2, lambda s: s.seconds)
        largest = {max(shapes, key=measure) for measure in measures}
        if self._source.wants != "nothing":  # what libraries keep from the first time on is no batch's
            self._source.emit(["0"], [torch.zeros(self._input_shape(max(s.seconds for s in shapes)))])
        give_back_memory()
        gathered = 0 if self._on_gpu else _GATHERED + _GATHERED_A_METHOD * len(methods)
        self.sets[name] = plan = plan_memory(
            self._source.network, self._lms.loaded(), largest, methods, self._try_encoder,
            memory_in_use(), self._lms.ngram_bytes(), gathered,
            {source: self._lms.prompt_tokens(source) for source in self._lms.loaded()},
        )  # fmt: skip
        logging.info("memory of %s: %s", name, describe_plan(plan))
        self._least = memory_in_use()
        reset_peak_memory()
        self._peak = 0

    def between_searches(self) -> None:
        """Remember the peak so far, which is reset next; bound what the allocator keeps for itself."""
        self._note()
        if not self._on_gpu and memory_in_use() > self._least + _LOOSE:
            give_back_memory()
            self._least = memory_in_use()

    def _note(self) -> None:
        self._peak = max(self._peak, peak_memory_bytes())

    def end(self, name: str) -> None:
        """Say what decoding a test set took."""
        if name in self.sets:
            self._note()
            self.sets[name]["peak"] = self._peak
            logging.info("memory of %s: the peak was %.0f MB", name, self._peak / 1e6)

    def _input_shape(self, seconds: float) -> tuple[int, ...]:
        if self._source.wants == "features":
            return (round(seconds / FRAME_SHIFT), DIM)
        return (round(seconds * self._source.sample_rate),)

    def _try_encoder(self, batch: BatchShape) -> tuple[int, int]:
        """Return the bytes that emissions take, and those beside them while they are made: of silence."""
        if self._source.wants == "nothing":
            return 0, 0
        rows = batch.rows if self._on_gpu else -(-batch.rows // _TRIED)
        shape = self._input_shape(batch.seconds)
        while True:
            values = [torch.zeros(shape) for _ in range(rows)]
            give_back_memory()  # what was freed before would be used again, and seem to cost nothing
            reset_peak_memory()
            before = memory_in_use()
            try:
                made = self._source.emit([str(row) for row in range(rows)], values)
                break
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                logging.warning("out of memory with %d utterances of %.0f s", rows, batch.seconds)
                rows //= 2
                torch.cuda.empty_cache()
        kept = _bytes(x for x in (made.log_probs, made.encoder_out) if x is not None)
        more = max(0, peak_memory_bytes() - before - kept)
        if not made.log_probs.is_cuda:
            kept += _bytes(values)
        return kept * batch.rows // rows, more * batch.rows // rows


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
