"""Job decode by methods k2-* with an LLM, from lattices in files: needs no k2, it runs where the LLM is.
Knows: decode, tune, tiny models. Must not know: k2.
"""
from __future__ import annotations

import ast
import json

import pytest
import tiny
import yaml
from lattice_tools import ctc_lattices

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.saved import SavedSource
from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.decode.job import DecodeOptions, run
from icefall_fusion.decode.language_models import LmOptions
from icefall_fusion.decode.method_names import K2_METHODS, parse_method, parse_methods
from icefall_fusion.decode.weights import weights_of
from icefall_fusion.fusion.rescoring import rescore_with_ngram
from icefall_fusion.lattice.beam import LatticeBeamOptions
from icefall_fusion.lattice.saved import save_lattices
from icefall_fusion.lattice.source import K2Options
from icefall_fusion.lm import CausalLm
from icefall_fusion.nbest import read_nbests
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens

COUNT = 3
WEIGHTS = {name: {} for name in K2_METHODS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models, and lattices of pieces made from their log-probs."""
    folder = tmp_path_factory.mktemp("models")
    made = tiny.everything(folder)
    made["cuts"] = str(tiny.manifest(folder / "some", COUNT))
    options = DecodeOptions(
        out=str(folder / "first"), test_sets={"test": made["cuts"]}, methods="ctc-greedy",
        emissions=EmissionOptions(made["model"]), save_emissions=str(folder / "emissions"),
    )
    assert run(options) == 0
    tokens = AcousticTokens.load(made["model"])
    source = SavedSource(folder / "emissions" / "test", tokens)
    emissions = source.emit(source.ids)
    lattices = ctc_lattices(emissions.log_probs, emissions.lens, emissions.ids)
    search = PrefixSearchOptions(beam=6)
    lists = ctc_prefix_search(emissions.log_probs, emissions.lens, search, tokens, (), emissions.ids)
    lists = [nbest.with_scores("hlg", [0.0] * len(nbest)) for nbest in lists]
    lists = rescore_with_ngram(lists, PieceNgram.load(made["ngram"], tokens.pieces))
    seconds = {"lattices": 30.0, "nbest": 3.0, "whole": 6.0}
    made["lattices"] = str(folder / "lattices")
    kinds = {"nbest": lists, "whole": lists}
    save_lattices(folder / "lattices" / "lattices-0.npz", lattices, kinds, tokens, tokens, seconds)
    return made


def options(models, out, methods="k2-all", **more):
    return DecodeOptions(
        out=str(out), test_sets={"test": models["cuts"]}, methods=methods,
        emissions=EmissionOptions(models["model"]), llm=LmOptions(models["llm"]), weights=WEIGHTS,
        k2=K2Options(saved=models["lattices"], beam=LatticeBeamOptions(beam=8)), **more,
    )


@pytest.fixture(scope="module")
def decoded(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run(options(models, out)) == 0
    return out


def test_every_method_leaves_lists_and_a_row(decoded) -> None:
    rows = {row["method"]: row for row in json.loads((decoded / "results.json").read_text())}
    assert list(rows) == list(K2_METHODS)
    wanted = {"k2-attention-rescoring": "attention", "k2-llm-nbest-rescoring": "llm",
              "k2-nbest-ngram-rescoring": "ngram", "k2-whole-lattice-ngram-rescoring": "ngram"}
    for name, row in rows.items():
        source = "llm" if "delayed" in name else wanted.get(name, "hlg")
        for nbest in read_nbests(decoded / f"nbest-test-{name}.jsonl"):
            assert source in nbest.sources() and len(nbest) >= 1
            for h in nbest:
                total = sum(weight * h.scores[s] for s, weight in nbest.weights.items() if weight)
                assert h.total == pytest.approx(total, abs=1e-3)
        assert row["lattice_density"] > 100  # nothing was pruned
        assert row["search_seconds"] > 25  # making lattices counts, wherever it was done
        assert row["options"]["k2"]["fingerprints"]["saved"]
    best = rows["k2-nbest-oracle"]["wer"]
    assert best == rows["k2-nbest"]["oracle_wer"] <= rows["k2-nbest"]["wer"]


@pytest.mark.parametrize("method", [name for name in K2_METHODS if "llm" in name])
def test_llm_scores_are_those_of_whole_texts(models, decoded, method) -> None:
    lm = CausalLm.from_pretrained(models["llm"])
    for nbest in read_nbests(decoded / f"nbest-test-{method}.jsonl"):
        for h in nbest:
            assert h.scores["llm"] == pytest.approx(lm.log_prob(h.text, eos=True), abs=1e-3)


def test_a_fusion_at_the_end_is_the_beam_rescored(models, tmp_path) -> None:
    """What survives is then chosen without the LLM: the same words as with weight 0, in another order."""
    names = ["k2-llm-delayed-at-end", "k2-llm-delayed-every-frame"]
    zero = {name: {"llm": 0.0, "words": 0.0} for name in names}
    assert run(options(models, tmp_path / "some", names[0])) == 0
    silent = options(models, tmp_path / "none", names)
    object.__setattr__(silent, "weights", zero)
    assert run(silent) == 0
    lists = [
        {nbest.utterance: {h.text: h.scores["ctc"] for h in nbest} for nbest in read_nbests(path)}
        for path in (tmp_path / "some" / f"nbest-test-{names[0]}.jsonl",
                     tmp_path / "none" / f"nbest-test-{names[0]}.jsonl",
                     tmp_path / "none" / f"nbest-test-{names[1]}.jsonl")
    ]
    assert lists[0] == lists[1] == lists[2]


def test_tune_takes_lists_of_lattices_as_any_others(models, decoded, tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    name = "k2-nbest-ngram-rescoring+attention-rescoring+llm-nbest-rescoring"
    assert run(options(models, tmp_path / "all", name)) == 0
    code = main([
        "tune", "--nbest", str(tmp_path / "all" / f"nbest-test-{name}.jsonl"), "--ref", models["cuts"],
        "--methods", "k2-all", "--out", str(tmp_path / "weights.yaml"), "--rounds", "1",
    ])
    assert code == 0
    weights = yaml.safe_load((tmp_path / "weights.yaml").read_text())["weights"]
    assert list(weights) == list(K2_METHODS)
    assert set(weights["k2-llm-delayed-shortest"]) == {"hlg", "llm", "words"}
    assert set(weights["k2-whole-lattice-ngram-rescoring"]) == {"ngram", "words"}
    # and confirms by decoding
    code = main([
        "tune", "--nbest", str(tmp_path / "all" / f"nbest-test-{name}.jsonl"), "--ref", models["cuts"],
        "--methods", "k2-1best,k2-llm-delayed-shortest", "--out", str(tmp_path / "confirmed.yaml"),
        "--rounds", "1", "--confirm_rounds", "1", "--confirm.out", str(tmp_path),
        "--confirm.test_sets", json.dumps({"test": models["cuts"]}),
        "--confirm.emissions.model", models["model"], "--confirm.llm.path", models["llm"],
        "--confirm.k2.saved", models["lattices"], "--confirm.k2.beam.beam", "4",
    ])
    assert code == 0
    confirmed = yaml.safe_load((tmp_path / "confirmed.yaml").read_text())
    assert set(confirmed["weights"]["k2-llm-delayed-shortest"]) == {"hlg", "llm", "words"}
    assert "k2-llm-delayed-shortest" in confirmed["dev_wer"]
    # from the weights of methods with fewer sources, too
    found = confirmed["weights"]["k2-1best"]
    tried = [message for message in caplog.messages if "by decoding with" in message]
    starts = [ast.literal_eval(message.split("decoding with ")[1]) for message in tried]
    assert any(start["hlg"] == pytest.approx(found["hlg"], abs=1e-3) and
               start["words"] == pytest.approx(found["words"], abs=1e-3) for start in starts)


def test_names_say_what_methods_need() -> None:
    assert parse_methods("k2-all") == list(K2_METHODS)
    assert parse_method("k2-1best").needs == {"graph"}
    assert parse_method("k2-whole-lattice-ngram-rescoring").needs == {"graph", "word_ngram"}
    assert parse_method("k2-attention-rescoring").needs == {"graph", "attention"}
    assert parse_method("k2-llm-delayed-interval-16").needs == {"graph", "llm"}
    assert set(weights_of("k2-llm-delayed-shortest", {})) == {"ctc", "hlg", "llm", "words"}
    with pytest.raises(ValueError, match="must have no shallow fusion"):
        parse_method("k2-nbest+nlm-shallow")
    with pytest.raises(ValueError, match="did you mean 'k2-1best'"):
        parse_method("k2-1bset")


def test_methods_without_lattices_are_refused_or_left_out(models, tmp_path, caplog) -> None:
    plain = DecodeOptions(out=str(tmp_path / "out"), test_sets={"test": models["cuts"]}, methods="k2-1best",
                          emissions=EmissionOptions(models["model"]))
    with pytest.raises(ValueError, match="k2.graph must name a decoding graph .* for the method 'k2-1best'"):
        run(plain)
    object.__setattr__(plain, "methods", "ctc-greedy,k2-all")
    assert run(plain) == 0
    assert "k2-1best is skipped: there is no graph" in caplog.text
