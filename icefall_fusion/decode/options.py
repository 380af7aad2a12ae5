"""Options of the job ``decode``.
Knows: options of a recognizer, names of methods. Must not know: how they are used.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from icefall_fusion.common.checks import check
from icefall_fusion.decode.method_names import parse_methods
from icefall_fusion.decode.recognizer import RecognizerOptions


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(RecognizerOptions):
    """Decode test sets.

    Args:
        out: folder for nbest-, recogs-, errs-, wer-summary- files, results.json and run.json.
        test_sets: manifest of cuts (with features or recordings) by name of the test set.
        methods: names of the table of methods, comma-separated or a list; "all" is the comparison,
            "k2-all" that of lattices.
        limit: decode only so many utterances of each set, spread evenly over it; 0 decodes all.
        printed_wer: count words of cased text too, beside normalized words: with case and punctuation
            (wer_printed), and without both as icefall's LibriHeavy recipe does (wer_libriheavy).
        save_emissions: folder for the log-probs (float16 .npz); empty: not kept.
        threads: of torch; 0 leaves its default.
        restart: drop what an earlier run left in ``out`` instead of going on.
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
        check(self.limit >= 0, "DecodeOptions.limit", "be at least 0", self.limit)
        parse_methods(self.methods)
