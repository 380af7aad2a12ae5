"""Job ``decode``: test sets through one acoustic model and any methods; N-best lists, WER files, run.json.
Knows: emissions, methods, run logs, WER. Must not know: how a search or a fusion works.

Emissions of a batch are made once and shared by all methods. Every batch's lists are flushed: a killed run
goes on.
"""
from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Container, Iterator, Mapping, Optional, Sequence

import torch
from tqdm import tqdm

from icefall_fusion.acoustic.emissions import Emissions, save_emissions
from icefall_fusion.acoustic.sources import EmissionSource, open_source
from icefall_fusion.common.counters import add_counters
from icefall_fusion.common.environment import describe_environment
from icefall_fusion.common.files import fingerprint, write_json
from icefall_fusion.common.memory import peak_memory_bytes, reset_peak_memory
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.language_models import LM_SOURCES, Lms
from icefall_fusion.decode.memory_plan import BatchShape, MethodShape
from icefall_fusion.decode.memory_watch import MemoryWatch
from icefall_fusion.decode.methods import Method, choose_methods, is_named, needs, weights_of
from icefall_fusion.decode.options import DecodeOptions, read_weights
from icefall_fusion.decode.rows import join_rows, make_row, read_earlier_rows
from icefall_fusion.decode.segments import Found, Stretch, stretches
from icefall_fusion.decode.shards import Processes, ShardedLog
from icefall_fusion.decode.utterances import InputError, Utterance, batches, read_cuts
from icefall_fusion.lattice.source import LatticeSource, open_lattices
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.table import table

SKIPPED_SOME = 3  # exit code: done, but some inputs could not be read

def run(options: DecodeOptions) -> int:
    """Run the job ``decode``."""
    decoder = Decoder(options)
    rows = [row for name, path in options.test_sets.items() for row in decoder.decode_set(name, path)]
    decoder.write_run("done")
    if decoder.processes.rank == 0:
        print(table(rows) if rows else "nothing was decoded")
    # torchrun takes every code but 0 for a crash; run.json lists what was skipped
    return SKIPPED_SOME if decoder.skipped and decoder.processes.world == 1 else 0


class Decoder:
    """An acoustic model and methods, ready for any number of test sets.

    Args:
        options: of the job.
        bar_line: line of the progress bar, where several processes show theirs.
    """

    def __init__(self, options: DecodeOptions, bar_line: int = 0) -> None:
        self.bar_line = bar_line
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.out = Path(options.out)
        self.processes = Processes.join()
        self._device = device = self.processes.device(options.emissions.device)
        if torch.device(device).index is not None:  # "cuda" alone is the current one
            torch.cuda.set_device(device)  # whose memory is planned and watched
        self.source: EmissionSource = open_source(replace(options.emissions, device=device))
        lms = {name: getattr(options, name) for name in LM_SOURCES}
        lms = {name: replace(lm, device=self.processes.device(lm.device)) for name, lm in lms.items()}
        self.lms = Lms(lms, device, options.ngram, self.source.tokens)
        given = read_weights(options.weights)
        names = choose_methods(options.methods, self._available())
        self.weights = {name: weights_of(name, given) for name in names}
        for name in names:
            if not is_named(name, given) and len(self.weights[name]) > 1:
                logging.warning("no tuned weights for %s: %s are used", name, self.weights[name])
        self.lattices: LatticeSource | None = None
        self.methods = [self.make_method(name, self.weights[name]) for name in names]
        needed = set().union(*(method.needs for method in self.methods))
        for source in sorted(needed & set(LM_SOURCES)):
            self.lms.get(source)  # of second passes too: what is wrong is told before anything is decoded
        self.carries = self.lms.carry({part.source for method in self.methods for part in method.parts})
        self.memory = MemoryWatch(self.source, self.lms)
        self._saved: list[Path] = []  # emissions of the batch at hand
        self.skipped: list[dict[str, str]] = []
        self.oom_backoffs, self._most_rows = 0, options.batch_size
        self.report: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self._earlier_rows = read_earlier_rows(self.out / "results.json")
        self._fingerprints: dict[str, str] = {}
        self._references: dict[str, str | None] = {}  # of whole utterances
        self._started = time.time()

    def _available(self) -> set[str]:
        """Return the sources of scores that there are models for (see ``methods.needs``)."""
        options = self.options
        named = {name for name in (*LM_SOURCES, "ngram") if getattr(options, name).path}
        named |= options.k2.sources()
        return named if self.source.model is None else named | {"attention"}

    def make_method(self, name: str, weights: Mapping[str, float]) -> Method:
        """Return a method with this decoder's models, and lattices where it needs them."""
        if self.lattices is None and "graph" in needs(name):
            self.lattices = open_lattices(self.options.k2, self.source.tokens, self._device)
        return Method(name, weights, self.options.search, self.lms, self.lattices, self.options.k2)

    def decode_set(self, name: str, manifest: str) -> list[dict[str, Any]]:
        """Decode one test set by all methods, write its files and return its rows of ``results.json``."""
        options = self.options
        utterances = spread(read_cuts(manifest, self.source.wants), options.limit)
        data = {"cuts": manifest, "cuts_fingerprint": fingerprint(manifest), "limit": options.limit}
        received = {method.name: {**self._received(method), **data} for method in self.methods}
        logs = {
            method: ShardedLog(self.processes, self.out, name, method, values, options.restart)
            for method, values in received.items()
        }
        todo = [u for u in utterances if any(u.id not in log.done for log in logs.values())]
        todo = self.processes.share(sorted(todo, key=lambda u: -u.seconds))  # like lengths for each process
        self._plan(name, todo)
        self.write_run("running")
        skipped = self._decode_share(name, todo, logs)
        self.memory.end(name)
        if skipped:
            logging.warning("%s: %d utterances skipped: %s", name, len(skipped), sorted(skipped)[:10])
        for log in logs.values():
            log.finish(u.id for u in utterances if u.id not in skipped)
        if self.processes.rank > 0:
            return []
        references = {u.id: u.text for u in utterances}
        seconds = {u.id: u.seconds for u in utterances}
        rows = [
            make_row(self.out, name, log.whole, references, seconds, received[method], options.printed_wer)
            for method, log in logs.items()
        ]
        for row, log in zip(rows, logs.values()):
            self.report.setdefault(name, {})[row["method"]] = {**row, "stages": log.whole.totals()}
            log.whole.close()
        self.rows += rows
        earlier = [] if options.restart else self._earlier_rows
        write_json(self.out / "results.json", join_rows(earlier, self.rows))
        return rows

    def _decode_share(
        self, name: str, utterances: Sequence[Utterance], logs: Mapping[str, ShardedLog]
    ) -> set[str]:
        """Decode what this process has to, and return the ids of what no process could read."""
        options, begin = self.options, len(self.skipped)
        done = {method: log.done for method, log in logs.items()}
        line = {"desc": name, "unit": "utt", "smoothing": 0.05}
        position = self.bar_line + self.processes.local_rank
        with tqdm(total=len(utterances), position=position, **line) as bar:
            for batch in batches(utterances, options.batch_size, options.batch_seconds, options.longest):
                for method, found in self._decode_batch(name, batch, done).items():
                    logs[method].append(found.join(), found.line)
                bar.update(len(batch))
        shares = self.processes.gather(self.skipped[begin:])
        self.skipped[begin:] = [entry for share in shares for entry in share]
        return {entry["id"] for entry in self.skipped[begin:]}

    def _received(self, method: Method) -> dict[str, Any]:
        """Return what a method's result depends on, from the objects that the search receives."""
        used = {part.source for part in method.parts} & set(LM_SOURCES)
        search = dataclasses.asdict(method.search)
        del search["frame_shift"]  # the acoustic model's
        received = {
            "method": method.name,
            "weights": method.weights,
            "parts": method.describe(),
            "search": search,
            "emissions": dataclasses.asdict(self.options.emissions),
            "longest": self.options.longest,
            "fingerprint": self._fingerprint(self.options.emissions.model),
        }
        for name in sorted(used):
            lm = getattr(self.options, name)
            received[name] = {**dataclasses.asdict(lm), "fingerprint": self._fingerprint(lm.path)}
            if not lm.carry:
                del received[name]["carry"]  # so that a run from before there was such an option goes on
        ngram = self.options.ngram
        if any(part.look_ahead for part in method.parts):
            received["look_ahead"] = {"scale": ngram.scale, "every": ngram.every}
        if "graph" in method.needs:
            k2 = self.options.k2
            received["k2"] = dataclasses.asdict(k2)
            received["k2"]["fingerprints"] = {
                name: self._fingerprint(getattr(k2, name))
                for name in ("graph", "ngram", "saved")
                if getattr(k2, name)
            }
        if "ngram" in method.needs:
            received["ngram"] = {"path": ngram.path, "fingerprint": self._fingerprint(ngram.path)}
        return received

    def _fingerprint(self, path: str) -> str:
        """Return that of a model, read once: all methods and test sets ask for it."""
        if path not in self._fingerprints:
            self._fingerprints[path] = fingerprint(path)
        return self._fingerprints[path]

    def _plan(self, name: str, utterances: Sequence[Utterance]) -> None:
        """Say what memory these utterances of a test set will take, on this process's device."""
        options = self.options
        shapes, longest = set(), options.longest
        for batch in batches(utterances, options.batch_size, options.batch_seconds, longest):
            rows, seconds = len(batch), batch[0].seconds
            if seconds > longest and self.source.wants != "nothing":
                parts = math.ceil(2 * seconds / longest)
                rows, seconds = 1 if self.carries else min(self._parts_at_once(), parts), longest
            shapes.add(BatchShape(rows, seconds))
        beam, lattice = options.search.beam, (options.k2.beam.beam, options.k2.lattice.paths)
        plain = (beam, options.search.nbest or beam)
        methods = {
            method.name: MethodShape(
                *(lattice if "graph" in method.needs else plain),
                [(part.kind, part.source) for part in method.parts],
            )
            for method in self.methods
        }
        self.memory.plan(name, shapes, methods)

    def _parts_at_once(self) -> int:
        return min(self.options.batch_size, max(1, int(self.options.batch_seconds / self.options.longest)))

    # --- a batch -----------------------------------------------------------------------------------------

    def transcribe(self, utterances: Sequence[Utterance]) -> Iterator[NBest]:
        """Yield the N-best lists of the first method, in any order, and write nothing."""
        options = self.options
        for batch in batches(utterances, options.batch_size, options.batch_seconds, options.longest):
            found = self._decode_batch("", batch, {})
            yield from (nbest for name in found for nbest in found[name].join())

    def _decode_batch(
        self, name: str, batch: Sequence[Utterance], done: Mapping[str, Container[str]]
    ) -> dict[str, Found]:
        """Return what each method found for those utterances that it has not done."""
        found: dict[str, Found] = {}
        begin = len(self.skipped)
        for parts, emissions, seconds in self.emit_parts(name, batch):
            for method in self.methods:
                ready = done.get(method.name, ())
                rows = [row for row, part in enumerate(parts) if part.utterance.id not in ready]
                if rows:
                    self.tell(parts, found.get(method.name))
                    chosen = emissions if len(rows) == len(parts) else emissions.select(rows)
                    nbests, line = self._search(method, chosen)
                    line.update({stage: value * len(rows) for stage, value in seconds.items()})
                    found.setdefault(method.name, Found()).add([parts[row] for row in rows], nbests, line)
        for ours in found.values():
            ours.drop({entry["id"] for entry in self.skipped[begin:]})
        return {name: ours for name, ours in found.items() if ours.parts}

    def tell(self, parts: Sequence[Stretch], found: Optional[Found] = None) -> None:
        """Note references, and give the language models what precedes the parts decoded next.

        Args:
            parts: of utterances.
            found: what the method that decodes them has found of the parts before.
        """
        customs = {part.id: None if part.number else part.utterance.custom for part in parts}
        recognized = found.earlier_texts(parts) if found is not None and self.carries else None
        self.lms.tell(customs, recognized)
        self._references = {part.id: part.utterance.text for part in parts if part.count == 1}

    def emit_parts(
        self, name: str, batch: Sequence[Utterance]
    ) -> Iterator[tuple[list[Stretch], Emissions, dict[str, float]]]:
        """Yield parts of utterances, their emissions, and the seconds a part of ``features`` and ``encoder``.

        Args:
            name: the test set, for the list of what could not be read (``skipped``).
            batch: utterances; long ones are cut into parts. Where a language model carries text from part to
                part, the first parts of all come first, then the second ones, and so on.
        """
        begun = time.perf_counter()
        parts = self._split(name, batch)
        split_seconds = (time.perf_counter() - begun) / max(len(parts), 1)
        size = self._parts_at_once() if any(part.number for part in parts) else max(len(parts), 1)
        if self.carries:
            parts.sort(key=lambda part: part.number)
        first, self._saved = 0, []
        while first < len(parts):
            some = parts[first : first + min(size, self._most_rows)]
            if self.carries:
                some = [part for part in some if part.number == some[0].number]
            begun = time.perf_counter()
            values = []
            try:
                for part in some:
                    values.append(part.load())
            except InputError as error:  # what was read of an utterance is worth nothing without the rest
                lost = some[len(values)].utterance
                self._skip(name, lost, error)
                parts[first:] = [part for part in parts[first:] if part.utterance is not lost]
                for path in self._saved:  # what is read part by part is a batch of its own
                    path.unlink()
                continue
            loaded = time.perf_counter()
            features_seconds = split_seconds + (loaded - begun) / len(some)
            try:
                emissions = self._emit(name, some, values)
            except torch.OutOfMemoryError:
                self._back_off(len(some))
                continue
            encoder_seconds = (time.perf_counter() - loaded) / len(some)
            yield some, emissions, {"features": features_seconds, "encoder": encoder_seconds}
            first += len(some)

    def _split(self, name: str, batch: Sequence[Utterance]) -> list[Stretch]:
        parts = []
        for utterance in batch:
            try:
                if self.source.wants == "nothing":
                    parts.append(Stretch(utterance, 0, 1, 0.0, utterance.load))
                else:
                    parts += stretches(utterance, self.options.longest)
            except InputError as error:
                self._skip(name, utterance, error)
        return parts

    def _skip(self, name: str, utterance: Utterance, error: InputError) -> None:
        logging.warning("skipped: %s", error)
        self.skipped.append({"test_set": name, "id": utterance.id, "error": str(error)})

    def _emit(self, name: str, parts: Sequence[Stretch], values: Sequence[torch.Tensor]) -> Emissions:
        emissions = self.source.emit([part.id for part in parts], values)
        if emissions.log_probs.is_cuda:
            torch.cuda.synchronize()
        if self.options.save_emissions:
            digest = hashlib.sha1("\n".join(emissions.ids).encode()).hexdigest()[:16]
            folder = Path(self.options.save_emissions) / name
            whose = [(part.utterance.id, part.number, part.count) for part in parts]
            self._saved.append(folder / f"emissions-{digest}.npz")
            save_emissions(self._saved[-1], emissions, half=True, parts=whose)
        return emissions

    def _search(self, method: Method, emissions: Emissions) -> tuple[list[NBest], dict[str, float]]:
        """Decode a batch, in as many parts as memory asks for: a result does not depend on its batch."""
        nbests: list[NBest] = []
        line: dict[str, float] = {}
        while len(nbests) < len(emissions.ids):
            rows = list(range(len(emissions.ids)))[len(nbests) : len(nbests) + self._most_rows]
            some = emissions if len(rows) == len(emissions.ids) else emissions.select(rows)
            try:
                found, work = self._search_once(method, some)
            except torch.OutOfMemoryError:
                self._back_off(len(rows))
                add_counters(line, {"oom_backoffs": 1})
                continue
            nbests += found
            add_counters(line, work)
        return nbests, line

    def _back_off(self, rows: int) -> None:
        """Decode half as many utterances at once from now on; called where memory ran out."""
        if rows == 1:
            raise
        self._most_rows = rows // 2
        self.oom_backoffs += 1
        logging.warning("out of memory with %d utterances at once: %d from now on", rows, self._most_rows)
        torch.cuda.empty_cache()

    def _search_once(self, method: Method, emissions: Emissions) -> tuple[list[NBest], dict[str, float]]:
        self.memory.between_searches()
        reset_peak_memory()
        nbests, work = method.decode(emissions, self.source.model, self._references)
        peak = peak_memory_bytes() - self.lms.unused_bytes(method.needs)
        line = {"search": work.search_seconds, "lm": work.lm_seconds, "peak_memory_bytes": peak}
        return nbests, {**line, **work.counters}

    # --- what is left ------------------------------------------------------------------------------------

    def write_run(self, status: str) -> None:
        """Write ``run.json``: options, versions, device, times per stage, counters, skipped inputs.

        Of several processes the first does it.
        """
        if self.processes.rank > 0:
            return
        record = {
            "status": status,
            "options": dataclasses.asdict(self.options),
            "weights": self.weights,
            **describe_environment(self.options.emissions.device),
            "processes": self.processes.world,
            "memory": self.memory.sets,
            "wall_seconds": time.time() - self._started,
            "test_sets": self.report,
            "oom_backoffs": self.oom_backoffs,
            "skipped": self.skipped,
        }
        write_json(self.out / "run.json", record)
