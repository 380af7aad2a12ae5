"""Hot words: what 10 to 10,000 phrases cost, how many of the listed names are found, WER of all else.
Knows: recognizers, references with capitals, word errors. Must not know: how a search works.

    python tools/bench/hotwords.py                     # the demo's sentences, spoken
    python tools/bench/hotwords.py --cuts cuts.jsonl.gz --methods ctc-prefix --sizes 100 --boost 8

Names are words that the references (custom field ``cased``) write with a capital inside a sentence and never
without one. A short list has some of them; longer ones have all, and random pieces that nobody says besides.
Of each list all rows come from one run: without it, in the search (``search``), as the
LLM's prompt (``prompt``, for methods with an LLM), and both. ``recall``: listed names of the references that
are in the texts, in percent; ``false``: listed names in the texts beyond those of the references; ``wer``:
of all words; ``wer_else``: without the references' words that are listed and what stands for them.
``ms``: milliseconds a second of audio, search and LLM, the least of the rounds; ``list_ms``: making the list.
"""
from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from figures import write
from word_times import speech

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.common.files import write_text
from icefall_fusion.decode.demo import STORIES
from icefall_fusion.decode.hotwords import HotWords
from icefall_fusion.decode.method_names import parse_method
from icefall_fusion.decode.pretrained import with_pretrained
from icefall_fusion.decode.recognizer import Batch, Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import Utterance, read_cuts
from icefall_fusion.decode.weights import read_weights, weights_of
from icefall_fusion.scoring.phrases import score_phrases
from icefall_fusion.scoring.wer import word_errors, words_of
from icefall_fusion.text.tokens import AcousticTokens

SPLIT = "test-clean"


def names_of(utterances: Sequence[Utterance]) -> list[str]:
    """Return the names in the references, each a word of the acoustic text, in alphabetical order."""
    capital: Counter[str] = Counter()
    small: Counter[str] = Counter()
    for utterance in utterances:
        words = str(utterance.custom.get("cased", "")).split()
        for before, word in zip(["."] + words, words):
            begins = before.rstrip("\"'”’)")[-1:] in ".!?:;“\"" or word[:1] in "“\"‘'("
            spelled, upper = words_of(word), word.strip("“”\"‘’'().,;:!?—-")[:1].isupper()
            if len(spelled) == 1 and len(spelled[0]) > 3 and not (upper and begins):
                (capital if upper else small)[spelled[0]] += 1
    return sorted(word for word in capital if word not in small)


def lists(names: Sequence[str], sizes: Sequence[int], tokens: AcousticTokens) -> Iterator[list[str]]:
    """Yield a list of phrases of each size: names, then words that nobody says."""
    chance = random.Random(0)
    names = chance.sample(list(names), len(names))
    inside = [i for i, text in enumerate(tokens.has_text) if text and not tokens.starts_word[i]]
    first = [i for i, starts in enumerate(tokens.starts_word) if starts and tokens.has_text[i]] or inside
    inside = [index for index in inside if index != tokens.unk_id]
    more: dict[str, None] = {}
    while len(more) < max(sizes, default=0):
        word = tokens.decode([chance.choice(first), *chance.choices(inside, k=chance.randint(2, 5))])
        if word not in names and tokens.decode(tokens.encode(word)) == word:
            more[word] = None
    for size in sizes:
        yield [*names, *more][:size]


def scores(references: Mapping[str, str], texts: Mapping[str, str], phrases: Sequence[str]) -> dict[str, Any]:
    """Return recall, false names and WER of texts by utterance."""
    found = score_phrases(references, texts, phrases)
    wer = word_errors(references, texts).wer
    rates = {"wer": wer, "wer_else": found.wer_else, "recall": found.recall}
    rates = {name: round(rate, 2) for name, rate in rates.items()}
    return {**rates, "names_spoken": found.spoken, "false": found.false}


class Bench:
    """A recognizer, and log-probs of all utterances."""

    def __init__(self, args: argparse.Namespace, manifest: str) -> None:
        options = RecognizerOptions(emissions=EmissionOptions(model=args.model, device=args.device))
        options = options if args.model else with_pretrained(options)
        self.args, self.recognizer = args, Recognizer(options, args.methods)
        self.tuned = read_weights(options.weights)
        self.utterances = read_cuts(manifest, self.recognizer.source.wants)
        self.batches: list[Batch] = [
            batch for some in self.recognizer.batches(self.utterances) for batch in self.recognizer.emit(some)
        ]
        self.seconds = sum(utterance.seconds for utterance in self.utterances)
        self.references = {one.id: one.text or "" for one in self.utterances}

    def decode(self, name: str, weights: Mapping[str, float], hot: HotWords, prompt: bool) -> dict[str, Any]:
        """Return texts by utterance and the least milliseconds a second of audio."""
        models = self.recognizer.models
        models.hotwords, llm = hot, models.options["llm"]
        if prompt:
            models.options["llm"] = replace(llm, prompt=hot.prompt(llm.text, llm.context_words))
        method, spent, texts = self.recognizer.make_method(name, weights), [], {}
        for _ in range(self.args.rounds + 1):
            total = 0.0
            for batch in self.batches:
                customs = {segment.id: segment.utterance.custom for segment in batch.segments}
                prompts = models.prompts(customs)
                made = method.decode(batch.emissions, self.recognizer.source.model, None, prompts)
                total += made.cost["search"] + made.cost["lm"]
                texts |= {nbest.utterance: nbest[0].text for nbest in made.nbests}
            spent.append(total)
        models.options["llm"] = llm
        return {"texts": texts, "ms": round(1000 * min(spent[1:]) / self.seconds, 4)}

    def rows(self, phrases: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield a row for each method and use of a list."""
        path = Path(self.args.speech) / f"hotwords-{len(phrases)}.txt"
        write_text(path, "".join(f"{phrase}\t{self.args.boost}\n" for phrase in phrases))
        hot, begun = HotWords(path, self.recognizer.source.tokens), time.perf_counter()
        made = {"phrases": len(phrases), "nodes": len(hot.automaton)}
        made["list_ms"] = round(1000 * (time.perf_counter() - begun), 1)
        for method in self.recognizer.methods:
            weights = weights_of(method.name, self.tuned)
            both = f"hotwords-shallow+{method.name.removeprefix('ctc-prefix')}".rstrip("+")
            uses = {"none": (method.name, False), "search": (both, False)}
            if "llm" in parse_method(method.name).sources:
                uses |= {"prompt": (method.name, True), "search, prompt": (both, True)}
            for use, (name, prompt) in uses.items():
                hot_weights = weights_of(both, {both: weights}) if name == both else weights
                result = self.decode(name, hot_weights, hot, prompt)
                row = {"method": method.name, "use": use, **made, "ms": result["ms"]}
                yield {**row, **scores(self.references, result["texts"], phrases)}


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="", help="acoustic model; none: the shipped one, with its LLM")
    parser.add_argument("--methods", default="ctc-prefix,llm-delayed-shortest")
    parser.add_argument("--sizes", default="10,100,1000,10000", help="phrases of each list")
    parser.add_argument("--boost", type=float, default=5.0, help="nats a phrase")
    parser.add_argument("--cuts", default="", help="a manifest; none: the demo's sentences are spoken")
    parser.add_argument("--stories", default=str(STORIES))
    parser.add_argument("--sentences", type=int, default=120)
    parser.add_argument("--speech", default="bench/hotwords", help="folder for audio and lists")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default="bench/hotwords.json", help="figures")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = arguments(given)
    bench = Bench(args, args.cuts or speech(args, SPLIT))
    names = names_of(bench.utterances)
    print(f"{len(names)} names, for example {', '.join(names[:10])}")
    sizes, rows = [int(size) for size in args.sizes.split(",")], []
    for phrases in lists(names, sizes, bench.recognizer.source.tokens):
        for row in bench.rows(phrases):
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    write(args, rows, names=len(names))


if __name__ == "__main__":
    main()
