"""Options of the job ``decode``, and the file of fusion weights.
Knows: options of emissions, methods and the search. Must not know: how they are used.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Mapping, Union

import yaml

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.common.checks import check
from icefall_fusion.decode.language_models import LmOptions, NgramOptions
from icefall_fusion.decode.methods import parse_methods
from icefall_fusion.lattice.source import K2Options
from icefall_fusion.search import PrefixSearchOptions

Weights = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class DecodeOptions:
    """Decode test sets.

    Args:
        out: folder for nbest-, recogs-, errs-, wer-summary- files, results.json and run.json.
        test_sets: manifest of cuts (with features or recordings) by name of the test set.
        emissions: where log-probs come from.
        methods: names of README's table of methods, comma-separated or a list; "all" is the comparison,
            "k2-all" that of lattices.
        nlm: LM over the acoustic pieces.
        llm: LM with a vocabulary of its own.
        matched_llm: LLM over the acoustic pieces, for llm-shallow.
        ngram: n-gram over the acoustic pieces.
        search: the prefix search.
        k2: lattices, for the methods k2-*.
        weights: weight by method and source (words: the bonus a word), or a YAML file that has them.
        batch_size: utterances in a batch.
        batch_seconds: padded audio in a batch, in seconds.
        longest: seconds; longer utterances are decoded in parts cut at quiet places.
        limit: decode only so many utterances of each set, spread evenly over it; 0 decodes all.
        printed_wer: count words with their case and punctuation too, beside normalized words: for acoustic
            models of cased text.
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
    ngram: NgramOptions = field(default_factory=NgramOptions)
    search: PrefixSearchOptions = field(default_factory=PrefixSearchOptions)
    k2: K2Options = field(default_factory=K2Options)
    weights: Union[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    batch_size: int = 32
    batch_seconds: float = 480.0
    longest: float = 60.0
    limit: int = 0
    printed_wer: bool = False
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
