"""From utterances to N-best lists by any methods: models are loaded once, nothing is written.
Knows: sources of log-probs, language models, methods, segments. Must not know: test sets, files of a run.

Log-probs of a batch are made once and shared by all methods. Where memory runs out, half as much is decoded
at once from then on.
"""
from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any, Callable, Container, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.acoustic.sources import EmissionSource, open_source
from icefall_fusion.common.checks import check
from icefall_fusion.common.counters import add_counters
from icefall_fusion.common.memory import FreedMemory, peak_memory_bytes, reset_peak_memory
from icefall_fusion.common.processes import Processes
from icefall_fusion.decode.language_models import LM_SOURCES, LanguageModels
from icefall_fusion.decode.method_names import choose_methods, parse_method
from icefall_fusion.decode.methods import Decoded, Method
from icefall_fusion.decode.options import RecognizerOptions
from icefall_fusion.decode.segments import Recognized, Segment, segments_of
from icefall_fusion.decode.utterances import InputError, Utterance, batches
from icefall_fusion.decode.weights import is_tuned, read_weights, weights_of
from icefall_fusion.lattice.source import LatticeSource, open_lattices
from icefall_fusion.nbest import NBest
from icefall_fusion.text.language import ENGLISH, language_of

#: Bytes by which a process on a CPU may grow before the C library is asked to give memory back: asking is too
#: much for each search of a small batch.
_GROWTH = 60_000_000


class Batch(NamedTuple):
    """Segments that are decoded together: their log-probs, and the seconds a segment of each stage."""

    segments: list[Segment]
    emissions: Emissions
    seconds: dict[str, float]


class Recognizer:
    """An acoustic model, language models and methods, ready for any number of utterances.

    Args:
        options: models and the search.
        methods: names, see `parse_methods`.
        processes: all that decode, this one among them; each has its own GPU.

    Attributes:
        methods: ready to run; weights: of each, by name.
        source: of log-probs; models: the language models.
        language: of the text: that of the options, else the acoustic model's.
        unreadable: utterances that could not be read so far, with the reason.
        oom_backoffs: times that memory ran out.

    Raises:
        ValueError: a method that is named lacks a model, or a model does not serve it.
    """

    kind = Method

    def __init__(
        self, options: RecognizerOptions, methods: Union[str, Sequence[str]],
        processes: Optional[Processes] = None,
    ) -> None:
        processes = processes or Processes()
        self.options = options
        self.device = device = processes.device(options.emissions.device)
        if torch.device(device).index is not None:  # "cuda" alone is the current one
            torch.cuda.set_device(device)
        self.source: EmissionSource = open_source(replace(options.emissions, device=device))
        known = getattr(self.source, "language", ENGLISH)
        self.language = language_of(options.language, options.normalizer, known.plain())
        lms = {name: getattr(options, name) for name in LM_SOURCES}
        lms = {name: replace(lm, device=processes.device(lm.device)) for name, lm in lms.items()}
        self.models = LanguageModels(lms, device, options.ngram, self.source.tokens, options.wordngram,
                                     options.hotwords, options.lodr)
        self._lattices: Optional[LatticeSource] = None
        tuned = read_weights(options.weights)
        names = choose_methods(methods, self._available())
        self.weights = {name: weights_of(name, tuned) for name in names}
        for name in names:
            if not is_tuned(name, tuned) and len(self.weights[name]) > 1:
                logging.warning("no tuned weights for %s: %s are used", name, self.weights[name])
        self.methods = [self.make_method(name, self.weights[name]) for name in names]
        needed = set().union(*(method.spec.needs for method in self.methods))
        for source in sorted(needed & set(LM_SOURCES)):
            self.models.get(source)  # of second passes too: an error is raised before anything is decoded
        self._carries = self.models.carry({s for method in self.methods for s in method.spec.sources})
        self.unreadable: list[tuple[Utterance, InputError]] = []
        self._limits = options.batch_limits(device)
        self.oom_backoffs, self._most_rows = 0, self._limits[0]
        self._freed = FreedMemory(_GROWTH)

    def _available(self) -> set[str]:
        """Return the models that the options name (see `MethodSpec.needs`)."""
        options = self.options
        named = options.named_models() | options.k2.sources()
        heads = {"attention": self.source.model, "transducer": self.source.transducer,
                 "ctc_head": True if self.source.has_ctc else None}
        return named | {name for name, head in heads.items() if head is not None}

    def make_method(self, name: str, weights: Mapping[str, float]) -> Method:
        """Return a method with these models, and lattices where it needs them."""
        if self._lattices is None and "graph" in parse_method(name).needs:
            self._lattices = open_lattices(self.options.k2, self.source.tokens, self.device)
        rule = "have an acoustic model with a CTC head (its transducer is searched by the methods rnnt-*)"
        check(self.source.has_ctc or parse_method(name).of_transducer, f"method {name!r}", rule, None)
        prior = self.options.emissions.prior if self.options.emissions.prior_scale else ""
        rule = f"be empty (or its scale 0) for method {name!r}, which reads no log-probs of CTC"
        reads = self.source.has_ctc and parse_method(name).reads_ctc
        check(not prior or reads, "emissions.prior", rule, prior)
        return self.kind(name, weights, self.options.search, self.models, self._lattices, self.options.k2,
                         self.language, self.source.transducer)

    def batches(self, utterances: Sequence[Utterance]) -> Iterator[list[Utterance]]:
        """Yield batches of utterances of similar length, the longest first."""
        return batches(utterances, *self._limits, self.options.longest)

    def emit(self, utterances: Sequence[Utterance]) -> Iterator[Batch]:
        """Yield the segments of utterances with their log-probs; long utterances have several.

        Where a language model carries text from segment to segment, the first segments of all come first,
        then the second ones, and so on. An utterance that cannot be read goes to `unreadable`; its further
        segments are not yielded.
        """
        begun = time.perf_counter()
        segments = self._cut(utterances)
        cut_seconds = (time.perf_counter() - begun) / max(len(segments), 1)
        size, seconds = self._limits
        if any(segment.number for segment in segments):
            size = min(size, max(1, int(seconds / self.options.longest)))
        if self._carries:
            segments.sort(key=lambda segment: segment.number)
        first = 0
        while first < len(segments):
            some = segments[first : first + min(size, self._most_rows)]
            if self._carries:
                some = [segment for segment in some if segment.number == some[0].number]
            begun, values = time.perf_counter(), []
            try:
                for segment in some:
                    values.append(segment.load())
            except InputError as error:  # an utterance is decoded whole or not at all
                lost = some[len(values)].utterance
                self._note_unreadable(lost, error)
                segments[first:] = [segment for segment in segments[first:] if segment.utterance is not lost]
                continue
            loaded = time.perf_counter()
            try:
                emissions = self.source.emit([segment.id for segment in some], values)
                if emissions.log_probs.is_cuda:
                    torch.cuda.synchronize()
            except torch.OutOfMemoryError as error:
                self._back_off(len(some), error)
                continue
            seconds = {"features": cut_seconds + (loaded - begun) / len(some)}
            seconds["encoder"] = (time.perf_counter() - loaded) / len(some)
            yield Batch(some, emissions, seconds)
            first += len(some)

    def _cut(self, utterances: Sequence[Utterance]) -> list[Segment]:
        segments = []
        for utterance in utterances:
            try:
                if self.source.wants == "nothing":
                    segments.append(Segment(utterance, 0, 1, 0.0, utterance.load))
                else:
                    segments += segments_of(utterance, self.options.longest)
            except InputError as error:
                self._note_unreadable(utterance, error)
        return segments

    def _note_unreadable(self, utterance: Utterance, error: InputError) -> None:
        logging.warning("skipped: %s", error)
        self.unreadable.append((utterance, error))

    def transcribe(self, utterances: Sequence[Utterance]) -> Iterator[NBest]:
        """Yield the N-best lists of the first method, in any order."""
        for batch in self.batches(utterances):
            for recognized in self.recognize(batch).values():
                yield from recognized.join()

    def recognize(
        self, utterances: Sequence[Utterance], done: Optional[Mapping[str, Container[str]]] = None,
        keep: Optional[Callable[[Batch], None]] = None,
    ) -> dict[str, Recognized]:
        """Return the lists of each method by its name.

        Args:
            utterances: a batch, see `batches`.
            done: ids of utterances that a method does not decode.
            keep: called with the log-probs of each batch of segments.
        """
        recognized = {method.name: Recognized() for method in self.methods}
        begin = len(self.unreadable)
        for batch in self.emit(utterances):
            if keep is not None:
                keep(batch)
            for method in self.methods:
                ready = (done or {}).get(method.name, ())
                rows = [row for row, s in enumerate(batch.segments) if s.utterance.id not in ready]
                if rows:
                    self.decode(method, batch, rows, recognized[method.name])
        lost = {utterance.id for utterance, _ in self.unreadable[begin:]}
        for result in recognized.values():
            result.drop(lost)
        return {name: result for name, result in recognized.items() if result.segments}

    def decode(self, method: Method, batch: Batch, rows: Sequence[int], result: Recognized) -> None:
        """Decode some rows of a batch by one method, and add their lists to its ``result``."""
        whole = len(rows) == len(batch.segments)
        emissions = batch.emissions if whole else batch.emissions.select(list(rows))
        segments = [batch.segments[row] for row in rows]
        customs = {s.id: None if s.number else s.utterance.custom for s in segments}
        prompts = self.models.prompts(customs, result.earlier_texts(segments) if self._carries else None)
        references = {s.id: s.utterance.text for s in segments if s.count == 1}
        nbests: list[NBest] = []
        cost = {stage: seconds * len(rows) for stage, seconds in batch.seconds.items()}
        while len(nbests) < len(segments):  # a result does not depend on its batch
            chosen = list(range(len(segments)))[len(nbests) : len(nbests) + self._most_rows]
            some = emissions if len(chosen) == len(segments) else emissions.select(chosen)
            try:
                more, more_cost = self.search(method, some, references, prompts)
            except torch.OutOfMemoryError as error:
                self._back_off(len(chosen), error)
                add_counters(cost, {"oom_backoffs": 1})
                continue
            nbests += more
            add_counters(cost, more_cost)
        result.add(segments, nbests, cost)

    def search(self, method: Method, emissions: Emissions, *context: Any) -> Decoded:
        """Decode utterances at once by a method; arguments as of `Method.decode` without its model."""
        if not emissions.log_probs.is_cuda:
            self._freed.watch()
        reset_peak_memory()
        nbests, cost = method.decode(emissions, self.source.model, *context)
        peak = peak_memory_bytes() - self.models.unused_bytes(method.spec.needs)
        return Decoded(nbests, {**cost, "peak_memory_bytes": peak})

    def _back_off(self, rows: int, error: torch.OutOfMemoryError) -> None:
        """Decode half as many segments at once from now on.

        Raises:
            OutOfMemoryError: it was one alone.
        """
        if rows == 1:
            raise error
        self._most_rows = rows // 2
        self.oom_backoffs += 1
        logging.warning("out of memory with %d utterances at once: %d from now on", rows, self._most_rows)
        torch.cuda.empty_cache()
