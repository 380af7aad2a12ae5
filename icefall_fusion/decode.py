"""Job ``decode``: test sets through one acoustic model and any methods; N-best lists, WER files, run.json.
Knows: emissions, methods, run logs, WER. Must not know: how a search or a fusion works.

Emissions of a batch are made once and shared by all methods. Every batch's lists are flushed: a killed run
goes on.
"""
from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Container, Iterator, Mapping, Sequence, Union

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from icefall_fusion.checks import check
from icefall_fusion.data.manifests import spread
from icefall_fusion.emission_batch import Emissions, save_emissions
from icefall_fusion.emissions import EmissionOptions, EmissionSource, open_source
from icefall_fusion.files import fingerprint, write_json
from icefall_fusion.methods import LM_SOURCES, LmOptions, Lms, Method, parse_methods, weights_of
from icefall_fusion.nbest import NBest
from icefall_fusion.report import peak_memory_bytes, reset_peak_memory, table
from icefall_fusion.rescoring import add_counters
from icefall_fusion.results import make_row
from icefall_fusion.runlog import MethodLog, describe_environment
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.utterances import InputError, Utterance, batches, join_parts, read_cuts, split_long

SKIPPED_SOME = 3  # exit code: done, but some inputs could not be read

Weights = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class DecodeOptions:
    """Decode test sets.

    Args:
        out: folder for nbest-, recogs-, errs-, wer-summary- files, results.json and run.json.
        test_sets: manifest of cuts (with features or recordings) by name of the test set.
        emissions: where log-probs come from.
        methods: names of README's table of methods, comma-separated or a list; "all" is the comparison.
        nlm: LM over the acoustic pieces.
        llm: LM with a vocabulary of its own.
        matched_llm: LLM over the acoustic pieces, for llm-shallow.
        search: the prefix search.
        weights: weight by method and source (words: the bonus a word), or a YAML file that has them.
        batch_size: utterances in a batch.
        batch_seconds: padded audio in a batch, in seconds.
        longest: seconds; longer utterances are decoded in parts cut at quiet places.
        limit: decode only so many utterances of each set, spread evenly over it; 0 decodes all.
        save_emissions: folder for the log-probs (float16 .npz); empty: not kept.
        threads: of torch; 0 leaves its default.
        restart: drop what an earlier run left in ``out`` instead of going on.
    """

    out: str
    test_sets: dict[str, str]
    emissions: EmissionOptions = field(default_factory=EmissionOptions)
    methods: Union[str, list[str]] = "all"
    nlm: LmOptions = field(default_factory=LmOptions)
    llm: LmOptions = field(default_factory=LmOptions)
    matched_llm: LmOptions = field(default_factory=LmOptions)
    search: PrefixSearchOptions = field(default_factory=PrefixSearchOptions)
    weights: Union[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    batch_size: int = 32
    batch_seconds: float = 480.0
    longest: float = 60.0
    limit: int = 0
    save_emissions: str = ""
    threads: int = 0
    restart: bool = False

    def __post_init__(self) -> None:
        check(bool(self.out), "DecodeOptions.out", "name a folder", self.out)
        check(len(self.test_sets) > 0, "DecodeOptions.test_sets", "name a manifest at least", self.test_sets)
        for name in self.test_sets:
            check(name and "/" not in name, "DecodeOptions.test_sets", "have names fit for files", name)
        check(self.batch_size >= 1, "DecodeOptions.batch_size", "be at least 1", self.batch_size)
        check(self.batch_seconds > 0, "DecodeOptions.batch_seconds", "be above 0 s", self.batch_seconds)
        check(self.longest >= 1, "DecodeOptions.longest", "be at least 1 s", self.longest)
        check(self.limit >= 0, "DecodeOptions.limit", "be at least 0", self.limit)
        shift, default = self.search.frame_shift, PrefixSearchOptions().frame_shift
        check(shift == default, "search.frame_shift", "be left alone: it is the acoustic model's", shift)
        parse_methods(self.methods)


def read_weights(weights: Union[str, Weights]) -> Weights:
    """Return weights by method, from a YAML file (maybe under ``weights:``) or as given."""
    if not isinstance(weights, str):
        return weights
    if not weights:
        return {}
    if not Path(weights).is_file():
        raise FileNotFoundError(f"there is no YAML file of weights at {weights}")
    try:
        content = yaml.safe_load(Path(weights).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"weights in {weights} must be YAML: {error}") from error
    content = content.get("weights", content) if isinstance(content, dict) else content
    good = isinstance(content, dict) and all(isinstance(value, dict) for value in content.values())
    check(good, f"weights in {weights}", "be numbers by method and source", content)
    return content


def run(options: DecodeOptions) -> int:
    """Run the job ``decode``."""
    decoder = Decoder(options)
    rows = [row for name, path in options.test_sets.items() for row in decoder.decode_set(name, path)]
    decoder.write_run("done")
    print(table(rows) if rows else "nothing was decoded")
    return SKIPPED_SOME if decoder.skipped else 0


@dataclass
class Stretch:
    """One of ``count`` stretches of an utterance (mostly all of it): its first second and what it holds."""

    utterance: Utterance
    number: int
    count: int
    start: float
    values: Tensor

    @property
    def id(self) -> str:
        return self.utterance.id if self.number == 0 else f"{self.utterance.id}#{self.number}"


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
        self.source: EmissionSource = open_source(options.emissions)
        self.lms = Lms({name: getattr(options, name) for name in LM_SOURCES}, options.emissions.device)
        given = read_weights(options.weights)
        names = parse_methods(options.methods)
        self.weights = {name: weights_of(name, given) for name in names}
        for name in names:
            if name not in given and len(self.weights[name]) > 1:
                logging.warning("no tuned weights for %s: %s are used", name, self.weights[name])
        self.methods = [Method(name, self.weights[name], options.search, self.lms) for name in names]
        self.skipped: list[dict[str, str]] = []
        self.report: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self._started = time.time()

    def decode_set(self, name: str, manifest: str) -> list[dict[str, Any]]:
        """Decode one test set by all methods, write its files and return its rows of ``results.json``."""
        options = self.options
        utterances = spread(read_cuts(manifest, self.source.wants), options.limit)
        data = {"cuts": manifest, "cuts_fingerprint": fingerprint(manifest), "limit": options.limit}
        received = {method.name: {**self._received(method), **data} for method in self.methods}
        logs = {
            method: MethodLog(self.out, name, method, values, options.restart)
            for method, values in received.items()
        }
        self.write_run("running")
        skipped_before = len(self.skipped)
        todo = [u for u in utterances if any(u.id not in log.done for log in logs.values())]
        line = {"desc": name, "unit": "utt", "smoothing": 0.05, "position": self.bar_line}
        with tqdm(total=len(utterances), **line) as bar:
            bar.update(len(utterances) - len(todo))
            for batch in batches(todo, options.batch_size, options.batch_seconds, options.longest):
                done = {method: log.done for method, log in logs.items()}
                for method, found in self._decode_batch(name, batch, done).items():
                    logs[method].append(found.join(), found.line)
                bar.update(len(batch))
        skipped = [entry["id"] for entry in self.skipped[skipped_before:]]
        if skipped:
            logging.warning("%s: %d utterances skipped: %s", name, len(skipped), sorted(skipped)[:10])
        references = {u.id: u.text for u in utterances}
        seconds = {u.id: u.seconds for u in utterances}
        rows = [
            make_row(self.out, name, log, references, seconds, received[method])
            for method, log in logs.items()
        ]
        for row, log in zip(rows, logs.values()):
            self.report.setdefault(name, {})[row["method"]] = {**row, "stages": log.totals()}
            log.close()
        self.rows += rows
        write_json(self.out / "results.json", self.rows)
        return rows

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
            "fingerprint": fingerprint(self.options.emissions.model),
        }
        for name in sorted(used):
            lm = self.lms.options[name]
            received[name] = {**dataclasses.asdict(lm), "fingerprint": fingerprint(lm.path)}
        return received

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
        for parts, emissions, seconds in self.emit_parts(name, batch):
            for method in self.methods:
                ready = done.get(method.name, ())
                rows = [row for row, part in enumerate(parts) if part.utterance.id not in ready]
                if rows:
                    chosen = emissions if len(rows) == len(parts) else emissions.select(rows)
                    nbests, line = self._search(method, chosen)
                    line.update({stage: value * len(rows) for stage, value in seconds.items()})
                    found.setdefault(method.name, Found()).add([parts[row] for row in rows], nbests, line)
        return found

    def emit_parts(
        self, name: str, batch: Sequence[Utterance]
    ) -> Iterator[tuple[list[Stretch], Emissions, dict[str, float]]]:
        """Yield parts of utterances, their emissions, and the seconds a part of ``features`` and ``encoder``.

        Args:
            name: the test set, for the list of what could not be read (``skipped``).
            batch: utterances; long ones are cut into parts.
        """
        begun = time.perf_counter()
        parts = self._load(name, batch)
        features_seconds = (time.perf_counter() - begun) / max(len(parts), 1)
        size = min(self.options.batch_size, max(1, int(self.options.batch_seconds / self.options.longest)))
        size = size if any(part.number for part in parts) else max(len(parts), 1)
        for first in range(0, len(parts), size):
            some = parts[first : first + size]
            begun = time.perf_counter()
            emissions = self._emit(name, some)
            encoder_seconds = (time.perf_counter() - begun) / len(some)
            yield some, emissions, {"features": features_seconds, "encoder": encoder_seconds}

    def _load(self, name: str, batch: Sequence[Utterance]) -> list[Stretch]:
        parts = []
        for utterance in batch:
            try:
                values = utterance.load()
            except InputError as error:
                logging.warning("skipped: %s", error)
                self.skipped.append({"test_set": name, "id": utterance.id, "error": str(error)})
                continue
            whole = self.source.wants == "nothing"
            ranges = [(0, 0)] if whole else split_long(values, self.options.longest)
            rate = 100.0 if values.dim() == 2 else 16000.0
            count = len(ranges)
            parts += [Stretch(utterance, i, count, a / rate, values[a:b]) for i, (a, b) in enumerate(ranges)]
        return parts

    def _emit(self, name: str, parts: Sequence[Stretch]) -> Emissions:
        emissions = self.source.emit([part.id for part in parts], [part.values for part in parts])
        if emissions.log_probs.is_cuda:
            torch.cuda.synchronize()
        if self.options.save_emissions:
            digest = hashlib.sha1("\n".join(emissions.ids).encode()).hexdigest()[:16]
            folder = Path(self.options.save_emissions) / name
            whose = [(part.utterance.id, part.number, part.count) for part in parts]
            save_emissions(folder / f"emissions-{digest}.npz", emissions, half=True, parts=whose)
        return emissions

    def _search(self, method: Method, emissions: Emissions) -> tuple[list[NBest], dict[str, float]]:
        reset_peak_memory()
        nbests, work = method.decode(emissions, self.source.model)
        peak = peak_memory_bytes() - self.lms.unused_bytes(part.source for part in method.parts)
        line = {"search": work.search_seconds, "lm": work.lm_seconds, "peak_memory_bytes": peak}
        return nbests, {**line, **work.counters}

    # --- what is left ------------------------------------------------------------------------------------

    def write_run(self, status: str) -> None:
        """Write ``run.json``: options, versions, device, times per stage, counters, skipped inputs."""
        record = {
            "status": status,
            "options": dataclasses.asdict(self.options),
            "weights": self.weights,
            **describe_environment(self.options.emissions.device),
            "wall_seconds": time.time() - self._started,
            "test_sets": self.report,
            "skipped": self.skipped,
        }
        write_json(self.out / "run.json", record)


class Found:
    """The N-best lists of the parts that one method has decoded of a batch, and what they cost."""

    def __init__(self) -> None:
        self.parts: list[tuple[Stretch, NBest]] = []
        self.line: dict[str, float] = {}

    def add(self, parts: Sequence[Stretch], nbests: Sequence[NBest], line: Mapping[str, float]) -> None:
        self.parts += zip(parts, nbests)
        add_counters(self.line, line)

    def join(self) -> list[NBest]:
        """Return one list an utterance."""
        lists: dict[str, list[tuple[Stretch, NBest]]] = {}
        for part, nbest in self.parts:
            lists.setdefault(part.utterance.id, []).append((part, nbest))
        return [
            found[0][1] if len(found) == 1 else join_parts(
                utterance, [nbest for _, nbest in found], [part.start for part, _ in found]
            )
            for utterance, found in lists.items()
        ]  # fmt: skip
