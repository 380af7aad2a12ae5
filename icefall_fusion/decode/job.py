"""Job ``decode``: test sets through a recognizer; N-best lists, WER files, results.json, run.json.
Knows: recognizers, files of a run, WER. Must not know: how a search or a fusion works.

Every batch's lists are flushed: a killed run goes on.
"""
from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence, Union

import torch
from tqdm import tqdm

from icefall_fusion.acoustic.saved import save_emissions, save_vocabulary
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.common.environment import describe_environment
from icefall_fusion.common.files import fingerprint, write_json
from icefall_fusion.common.processes import Processes
from icefall_fusion.data.manifests import spread
from icefall_fusion.decode.language_models import LM_SOURCES
from icefall_fusion.decode.method_names import parse_methods
from icefall_fusion.decode.methods import Method
from icefall_fusion.decode.recognizer import Batch, Recognizer, RecognizerOptions
from icefall_fusion.decode.rows import join_rows, make_row, read_earlier_rows
from icefall_fusion.decode.run_files import SharedRunFile
from icefall_fusion.decode.utterances import Utterance, read_cuts
from icefall_fusion.scoring.table import table
from icefall_fusion.text.language import ENGLISH, check_texts

_SLOWEST = datetime.timedelta(days=7)  # until the last process of a decode has to be there


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(RecognizerOptions):
    """Decode test sets.

    Args:
        out: folder for nbest-, recogs-, errs-, wer-summary- files, results.json and run.json.
        test_sets: manifest of cuts (with features or recordings) by name of the test set.
        methods: names of the table of methods, comma-separated or a list; "all" is the comparison,
            "k2-all" that of lattices.
        limit: number of utterances of each set, spread evenly over it; 0 decodes all.
        printed_wer: count words of cased text too, beside normalized words: with case and punctuation
            (wer_printed), and without both as icefall's LibriHeavy recipe does (wer_libriheavy).
        save_emissions: folder for the log-probs (float16 .npz) and their vocabulary, a folder in it for each
            test set, which ``emissions.model`` can name later; empty: not kept.
        threads: of torch; 0 leaves its default.
        restart: drop the files of an earlier run in ``out`` instead of going on.
    """

    out: str
    test_sets: dict[str, str]
    methods: Union[str, list[str]] = "all"
    limit: int = 0
    printed_wer: bool = False
    save_emissions: str = ""
    threads: int = 0
    restart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.out), "DecodeOptions.out", "name a folder", self.out)
        check(len(self.test_sets) > 0, "DecodeOptions.test_sets", "name a manifest at least", self.test_sets)
        for name in self.test_sets:
            check(name and "/" not in name, "DecodeOptions.test_sets", "have names fit for files", name)
        check_at_least(0, self, "limit")
        rule = "be left out with DecodeOptions.save_emissions, which are saved as the model gives them"
        good = not (self.save_emissions and self.emissions.prior)
        check(good, "EmissionOptions.prior", rule, self.emissions.prior)
        parse_methods(self.methods)


def run(options: DecodeOptions) -> int:
    """Run the job ``decode``."""
    decode = DecodeRun(options)
    rows = decode.decode_all()
    if decode.processes.rank == 0:
        print(table(rows) if rows else "nothing was decoded")
    # torchrun takes every code but 0 for a crash; run.json lists the skipped inputs
    return SKIPPED_SOME if decode.skipped and decode.processes.world == 1 else 0


class DecodeRun:
    """Test sets through one recognizer: a run that can be killed and goes on, by one process or several.

    Args:
        options: of the job.
        bar_line: line of the progress bar, where several processes show theirs.

    Attributes:
        skipped: inputs that could not be read, as run.json lists them.
        rows: of results.json, so far.
    """

    def __init__(self, options: DecodeOptions, bar_line: int = 0) -> None:
        if options.threads:
            torch.set_num_threads(options.threads)
        self.options, self._bar_line, self._out = options, bar_line, Path(options.out)
        self.processes = Processes.join("gloo", timeout=_SLOWEST)
        self.recognizer = Recognizer(options, options.methods, self.processes)
        kept, rule = options.save_emissions, "be left out for a model without a CTC head"
        check(not kept or self.recognizer.source.has_ctc, "DecodeOptions.save_emissions", rule, kept)
        self.skipped: list[dict[str, str]] = []
        self.rows: list[dict[str, Any]] = []
        self._report: dict[str, Any] = {}
        self._earlier_rows = read_earlier_rows(self._out / "results.json")
        self._fingerprint = functools.lru_cache(maxsize=None)(fingerprint)  # all methods and sets ask for it
        self._started = time.time()

    def decode_all(self) -> list[dict[str, Any]]:
        """Decode all test sets and return their rows of ``results.json``."""
        for name, manifest in self.options.test_sets.items():
            self.decode_set(name, manifest)
        self.write_run("done")
        return self.rows

    def decode_set(self, name: str, manifest: str) -> list[dict[str, Any]]:
        """Decode one test set by all methods, write its files and return its rows of ``results.json``."""
        options = self.options
        utterances = spread(read_cuts(manifest, self.recognizer.source.wants), options.limit)
        data = {"cuts": manifest, "cuts_fingerprint": fingerprint(manifest), "limit": options.limit}
        received = {method.name: {**self._received(method), **data} for method in self.recognizer.methods}
        files = {
            method: SharedRunFile(self.processes, self._out, name, method, values, options.restart)
            for method, values in received.items()
        }
        if self.processes.rank == 0:  # before hours of decoding
            check_texts({u.id: u.text for u in utterances}, self.recognizer.language, f"references of {name}")
        todo = [u for u in utterances if any(u.id not in file.done for file in files.values())]
        todo = self.processes.share(sorted(todo, key=lambda u: -u.seconds))  # like lengths for each process
        self.write_run("running")
        if name.startswith("dev") and self.processes.rank == 0:
            self.recognizer.models.warn_of_starts([u.text for u in utterances if u.text])
        if options.save_emissions and self.processes.rank == 0:
            save_vocabulary(Path(options.save_emissions) / name, self.recognizer.source.tokens)
        skipped = self._decode_share(name, todo, files)
        if skipped:
            logging.warning("%s: %d utterances skipped: %s", name, len(skipped), sorted(skipped)[:10])
        for file in files.values():
            file.finish(u.id for u in utterances if u.id not in skipped)
        return self._score(name, utterances, files, received) if self.processes.rank == 0 else []

    def _decode_share(
        self, name: str, utterances: Sequence[Utterance], files: Mapping[str, SharedRunFile]
    ) -> set[str]:
        """Decode the share of this process; return the ids of utterances that no process could read."""
        recognizer, begin = self.recognizer, len(self.recognizer.unreadable)
        done = {method: file.done for method, file in files.items()}
        line = {"desc": name, "unit": "utt", "smoothing": 0.05}
        with tqdm(total=len(utterances), position=self._bar_line + self.processes.local_rank, **line) as bar:
            for utterances_of_batch in recognizer.batches(utterances):
                kept = _KeptEmissions(self.options.save_emissions, name)
                for method, result in recognizer.recognize(utterances_of_batch, done, kept.keep).items():
                    files[method].append(result.join(), result.cost)
                kept.drop({utterance.id for utterance, _ in recognizer.unreadable[begin:]})
                bar.update(len(utterances_of_batch))
        unreadable = recognizer.unreadable[begin:]
        mine = [{"test_set": name, "id": u.id, "error": str(error)} for u, error in unreadable]
        skipped = [entry for share in self.processes.gather(mine) for entry in share]
        self.skipped += skipped
        return {entry["id"] for entry in skipped}

    def _score(
        self, name: str, utterances: Sequence[Utterance], files: Mapping[str, SharedRunFile],
        received: Mapping[str, Mapping[str, Any]],
    ) -> list[dict[str, Any]]:
        """Write the WER files and the rows of a test set that is decoded."""
        references = {u.id: u.text for u in utterances}
        seconds = {u.id: u.seconds for u in utterances}
        rows = []
        for method, file in files.items():
            row = make_row(
                self._out, name, file.whole, references, seconds, received[method], self.options.printed_wer,
                self.recognizer.language,
            )
            rows.append(row)
            self._report.setdefault(name, {})[method] = {**row, "stages": file.whole.totals()}
            file.whole.close()
        self.rows += rows
        earlier = [] if self.options.restart else self._earlier_rows
        write_json(self._out / "results.json", join_rows(earlier, self.rows))
        return rows

    def _received(self, method: Method) -> dict[str, Any]:
        """Return all options that a method's result depends on, from the objects that the search receives."""
        options = self.options
        search = dataclasses.asdict(method.search)
        del search["frame_shift"]  # the acoustic model's
        received = {
            "method": method.name,
            "weights": method.weights,
            "parts": method.describe(),
            "search": search,
            "emissions": dataclasses.asdict(options.emissions),
            "longest": options.longest,
            "fingerprint": self._fingerprint(options.emissions.model),
        }
        if self.recognizer.language != ENGLISH:
            received["language"] = self.recognizer.language.plain()
        for name in sorted(set(method.spec.sources) & set(LM_SOURCES)):
            lm = getattr(options, name)
            files = {"fingerprint": lm.path, **({"adapter_fingerprint": lm.adapter} if lm.adapter else {})}
            files = {key: self._fingerprint(path) for key, path in files.items()}
            received[name] = {**dataclasses.asdict(lm), **files}
            if lm.boundaries == "words":  # as runs before the option had it
                del received[name]["boundaries"]
        if any(fusion.look_ahead for fusion in method.spec.fusions):
            received["look_ahead"] = {"scale": options.ngram.scale, "every": options.ngram.every}
        if method.spec.of_lattices:
            paths = {name: getattr(options.k2, name) for name in ("graph", "ngram", "saved")}
            received["k2"] = dataclasses.asdict(options.k2)
            received["k2"]["fingerprints"] = {
                name: self._fingerprint(path) for name, path in paths.items() if path
            }
        if "ngram" in method.spec.needs:
            path = options.ngram.path
            received["ngram"] = {"path": path, "fingerprint": self._fingerprint(path)}
        if "wordngram" in method.spec.needs:
            received["wordngram"] = dataclasses.asdict(options.wordngram)
            received["wordngram"]["fingerprint"] = self._fingerprint(options.wordngram.path)
        lms = [getattr(options, name) for name in method.spec.sources if name in LM_SOURCES]
        if "hotwords" in method.spec.needs or any(lm.prompt_from_hotwords for lm in lms):
            path = options.hotwords
            received["hotwords"] = {"path": path, "fingerprint": self._fingerprint(path)}
        if "lodr" in method.spec.needs:
            received["lodr"] = {"path": options.lodr, "fingerprint": self._fingerprint(options.lodr)}
        if options.emissions.prior:
            received["prior_fingerprint"] = self._fingerprint(options.emissions.prior)
        return received

    def write_run(self, status: str) -> None:
        """Write ``run.json``: options, versions, device, times per stage, counters, skipped inputs.

        Of several processes the first does it.
        """
        if self.processes.rank > 0:
            return
        record = {
            "status": status,
            "options": dataclasses.asdict(self.options),
            "weights": self.recognizer.weights,
            **describe_environment(self.options.emissions.device),
            "processes": self.processes.world,
            "wall_seconds": time.time() - self._started,
            "test_sets": self._report,
            "oom_backoffs": self.recognizer.oom_backoffs,
            "skipped": self.skipped,
        }
        write_json(self._out / "run.json", record)


class _KeptEmissions:
    """Log-probs of one batch of utterances, saved if there is a folder for them."""

    def __init__(self, folder: str, test_set: str) -> None:
        self._folder, self._files = Path(folder) / test_set if folder else None, {}

    def keep(self, batch: Batch) -> None:
        """Save the log-probs of segments."""
        if self._folder is None:
            return
        digest = hashlib.sha1("\n".join(batch.emissions.ids).encode()).hexdigest()[:16]
        path = self._folder / f"emissions-{digest}.npz"
        whose = [(segment.utterance.id, segment.number, segment.count) for segment in batch.segments]
        save_emissions(path, batch.emissions, half=True, segments=whose)
        self._files[path] = {id for id, _, _ in whose}

    def drop(self, lost: set[str]) -> None:
        """Remove the files with segments of utterances of which another segment could not be read."""
        for path, ids in self._files.items():
            if ids & lost:
                path.unlink()
