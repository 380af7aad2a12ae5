"""Job ``demo``: the built-in stories, spoken by unseen voices in noise, decoded by several methods.
Knows: the stories, synthesis, the decoder, the report. Must not know: how any of them works.
"""
from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.common.files import write_text
from icefall_fusion.common.precision import FAST
from icefall_fusion.common.workers import in_workers
from icefall_fusion.data import synthesis
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.decode.job import DecodeOptions, DecodeRun
from icefall_fusion.decode.language_models import LmOptions
from icefall_fusion.decode.method_names import parse_method, parse_methods
from icefall_fusion.decode.pretrained import FOLDER, with_pretrained
from icefall_fusion.scoring.table import table, write_report
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.text.normalizer import normalize

STORIES = Path(__file__).resolve().parents[2] / "tools" / "demo" / "stories.txt"
SETS = {"clean": "test-clean", "other": "test-other"}  # name here -> population of voices and conditions
#: What a look at the project needs, in minutes on two cores; "all" has the methods that take longer too.
METHODS = (
    "ctc-greedy", "ctc-prefix", "attention-rescoring", "nlm-shallow", "ngram-shallow",
    "ngram-shallow+lodr-shallow", "llm-nbest-rescoring", "llm-delayed-shortest", "llm-delayed-shortest-ahead",
    "ngram-shallow+lodr-shallow+llm-delayed-shortest",
)


@dataclass(frozen=True)
class DemoOptions:
    """Speak stories by eSpeak NG, half clean and half noisy, and compare methods on them.

    Methods without an LLM come first, and their table is shown at once.

    Args:
        out: folder; audio is made once and kept there, results are made anew.
        stories: text, a sentence a line; lines that start with "#" are titles.
        pretrained: folder with ctc_aed, nlm, llm, matched_llm, ngram.arpa.gz, lodr.arpa.gz and weights.yaml.
        methods: comma-separated or a list; "all" is the whole comparison. Default: `METHODS`.
        quick: only 16 sentences; everything then lies in the folder ``quick`` of ``out``.
        search: the prefix search.
        batch_size: utterances decoded together.
        workers: processes that speak, and then decode a set each.
        seed: of voices and noise.
        threads: of torch in each process; 0 leaves its default.
        lm_dtype: of the language models' weights; fast: bfloat16 where the processor has it, which is up to
            twice as fast, else float32.
    """

    out: str = "demo"
    stories: str = str(STORIES)
    pretrained: str = str(FOLDER)
    methods: Union[str, list[str]] = ",".join(METHODS)
    quick: bool = False
    search: PrefixSearchOptions = field(default_factory=PrefixSearchOptions)
    batch_size: int = 32
    workers: int = 2
    seed: int = 7
    threads: int = 1
    lm_dtype: str = FAST

    def __post_init__(self) -> None:
        check(bool(self.out), "DemoOptions.out", "name a folder", self.out)
        check_at_least(1, self, "workers")
        parse_methods(self.methods)


def run(options: DemoOptions) -> int:
    """Run the job ``demo``."""
    begun = time.monotonic()
    out = Path(options.out) / ("quick" if options.quick else "")
    sentences = read_sentences(options.stories)
    _decode_options(options, out, "any", "not made yet")  # refuses missing models before anything is spoken
    if options.quick:
        sentences = sentences[:: max(1, len(sentences) // 16)][:16]
    manifests = {name: speak(options, out / "data", name, sentences) for name in SETS}
    methods = parse_methods(options.methods)
    slow = [name for name in methods if set(parse_method(name).sources) & {"llm", "matched_llm"}]
    fast = [name for name in methods if name not in slow]
    rows: list[dict[str, Any]] = []
    skipped = 0
    for folder, group in (("decode", fast), ("decode-llm", slow)):
        if not group:
            continue
        now = replace(options, methods=group)
        jobs = [_decode_options(now, out / folder, name, path) for name, path in manifests.items()]
        done = _decode(jobs, options.workers)
        rows += [row for made, _ in done for row in made]
        skipped = max(skipped, sum(count for _, count in done))  # every group meets the same audio
        if group is fast and slow:
            now_table = table(_in_order(rows, methods))
            print(f"\n{now_table}\n\n{len(slow)} methods with an LLM follow.\n", flush=True)
    rows = _in_order(rows, methods)
    write_report(rows, out)
    print(f"\n{table(rows)}\n")
    seconds = sum(rows[i]["audio_seconds"] for i in (0, len(rows) // 2))
    wall = time.monotonic() - begun
    print(f"{len(sentences)} sentences, {seconds / 60:.1f} minutes of audio, {wall:.0f} s in all; "
          f"{out / 'results.json'}, {out / 'wer-vs-speed.png'}")
    return SKIPPED_SOME if skipped else 0


def _in_order(rows: list[dict[str, Any]], methods: list[str]) -> list[dict[str, Any]]:
    """Return rows by test set, and by method as they were asked for."""
    sets = list(SETS)
    return sorted(rows, key=lambda row: (sets.index(row["test_set"]), methods.index(row["method"])))


def _decode(jobs: list[DecodeOptions], workers: int) -> list[tuple[list[dict[str, Any]], int]]:
    """Decode all sets, a process for each and a thread for each process; in turn with one worker."""
    lines = range(len(jobs)) if workers > 1 else [0] * len(jobs)
    return list(in_workers(decode_one, list(zip(lines, jobs)), workers))


def _decode_options(options: DemoOptions, folder: Path, name: str, manifest: str) -> DecodeOptions:
    lm = LmOptions(dtype=options.lm_dtype)
    decode = DecodeOptions(
        out=str(folder / name), test_sets={name: manifest}, methods=options.methods,
        search=options.search, nlm=lm, llm=lm, matched_llm=lm, batch_size=options.batch_size,
        threads=options.threads, restart=True,
    )
    return with_pretrained(decode, options.pretrained, "name a folder that has one (--pretrained)")


def decode_one(job: tuple[int, DecodeOptions]) -> tuple[list[dict[str, Any]], int]:
    """Decode one set in a process of its own; return its rows and the number of skipped utterances.

    Args:
        job: the line of its progress bar, and the options.
    """
    line, options = job
    decode = DecodeRun(options, bar_line=line)
    return decode.decode_all(), len(decode.skipped)


def read_sentences(path: str) -> list[tuple[str, str]]:
    """Return (story, sentence) of every line that is no title.

    Raises:
        FileNotFoundError: no such file.
        ValueError: there is no sentence.
    """
    story, sentences = "", []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            story = line.lstrip("# ").strip()
        elif line.strip():
            sentences.append((story, line.strip()))
    check(len(sentences) > 0, "DemoOptions.stories", "hold sentences", path)
    return sentences


def speak(options: DemoOptions, data: Path, name: str, sentences: list[tuple[str, str]]) -> str:
    """Make the audio of every second sentence (or find it made) and return its manifest.

    Args:
        options: of the demo.
        data: folder.
        name: clean (the sentences of even index) or other (those of odd index).
        sentences: story and text of all.
    """
    split = SETS[name]
    lines = []
    for index, (story, cased) in enumerate(sentences):
        if index % 2 == list(SETS).index(name):
            entry = {"id": f"{name}-{index:04d}", "book": story, "index": index, "cased": cased}
            lines.append(json.dumps({**entry, "text": normalize(cased)}, ensure_ascii=False))
    source = data / "text" / f"{name}.jsonl"
    write_text(source, "\n".join(lines) + "\n")
    made = synthesis.SynthesizeOptions(
        split=split, data_dir=data, input=source, seed=options.seed, workers=options.workers,
        shard_size=32, min_seconds=0.3, max_seconds=60.0,
    )
    synthesis.run(made)
    logging.info("spoke %d sentences for %s", len(lines), name)
    return str(cuts_path(data / "manifests", split))
