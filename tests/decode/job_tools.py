"""Command lines of the job decode, and its lists of the test set ``noise``.
Knows: options and files of the job. Must not know: how it decodes.
"""
from __future__ import annotations

from pathlib import Path

import pytest

from icefall_fusion.nbest import NBest, read_nbests


def arguments(made: dict[str, str], out: Path, *more: str) -> list[str]:
    models = ["--emissions.model", made["model"]]
    for name in ("nlm", "llm", "matched_llm"):
        models += [f"--{name}.path", made[name]]
    models += ["--ngram.path", made["ngram"], "--lodr", made["lodr"]]
    return ["decode", *models, "--test_sets.noise", made["cuts"], "--search.beam=4", "--out", str(out), *more]



def lists(out: Path, method: str) -> dict[str, NBest]:
    return {nbest.utterance: nbest for nbest in read_nbests(out / f"nbest-noise-{method}.jsonl")}



def assert_same(one: dict[str, NBest], other: dict[str, NBest]) -> None:
    assert one.keys() == other.keys()
    for name, nbest in one.items():
        assert [h.text for h in nbest] == [h.text for h in other[name]]
        for mine, theirs in zip(nbest, other[name]):
            assert mine.scores.keys() == theirs.scores.keys()
            for source, score in mine.scores.items():
                assert score == pytest.approx(theirs.scores[source], abs=2e-3)

