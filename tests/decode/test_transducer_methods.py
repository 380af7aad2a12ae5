"""The methods rnnt-* in the jobs: names, weights, lists, tuning, and models that lack a head.
Knows: jobs and their files, a tiny transducer. Must not know: how a search works.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from job_tools import arguments, assert_same, lists
from tiny import acoustic_model

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.models import ChunkOptions, CtcAed, TransducerOptions, load, save
from icefall_fusion.acoustic.prior import write_prior
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.data.features import pad_features
from icefall_fusion.decode.method_names import (
    RNNT_METHODS,
    choose_methods,
    parse_method,
    parse_methods,
)
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.decode.weights import weights_of
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.search.transducer import transducer_search


def write_model(folder: Path, heads=("ctc", "aed", "transducer")) -> str:
    base = load(acoustic_model(folder / "base"))
    shape = TransducerOptions(predictor_size=16, joiner_size=20)
    torch.manual_seed(3)
    model = CtcAed(dataclasses.replace(base.options, heads=heads, transducer=shape), base.bpe).eval()
    with torch.no_grad():
        if model.transducer is not None:
            model.transducer.joiner.output_linear.weight.mul_(6)  # hypotheses shall have words
    save(model, folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def both(made, tmp_path_factory) -> dict[str, str]:
    """Tiny models; the acoustic one has a transducer head too."""
    return {**made, "model": write_model(tmp_path_factory.mktemp("transducer"))}


def test_names_and_weights() -> None:
    assert parse_methods("rnnt-all") == list(RNNT_METHODS)
    assert choose_methods("rnnt-all", {"transducer", "nlm", "llm", "ngram"}) == list(RNNT_METHODS)
    beam = parse_method("rnnt-beam")
    assert beam.acoustic == "rnnt" and beam.needs == {"transducer"} and not beam.of_lattices
    assert parse_method("llm-delayed-shortest").acoustic == "ctc"
    one, other = (parse_method(f"rnnt-{first}nlm-shallow+llm-delayed-interval-8-ahead")
                  for first in ("", "beam+"))
    assert one.fusions == other.fusions and one.sources == ["nlm", "llm"]
    assert one.needs == {"transducer", "nlm", "llm", "ngram"}
    ilm = parse_method("rnnt-ilm-shallow+llm-nbest-rescoring")
    assert ilm.sources == ["ilm", "llm"] and ilm.needs == {"transducer", "llm"}
    assert weights_of("rnnt-beam", {}) == {"rnnt": 1.0}
    tuned = {"rnnt-llm-delayed-shortest": {"rnnt": 1.0, "llm": 0.7, "words": 1}}
    assert weights_of("rnnt-llm-delayed-shortest", tuned) == {"rnnt": 1.0, "llm": 0.7, "words": 1.0}
    joint = parse_method("rnnt-ctc-shallow+llm-delayed-shortest")
    assert joint.sources == ["ctc_head", "llm"] and joint.needs == {"ctc_head", "llm", "transducer"}
    assert joint.reads_ctc and not ilm.reads_ctc
    for text in ("ilm-shallow", "ctc-shallow"):
        with pytest.raises(ValueError, match=f"have {text} with a transducer alone"):
            parse_method(f"{text}+llm-delayed-shortest")
    with pytest.raises(ValueError, match="an acoustic model with a CTC head beside its transducer"):
        choose_methods("rnnt-ctc-shallow", {"transducer"})
    with pytest.raises(ValueError, match="'beem' of 'rnnt-beem' is none"):
        parse_method("rnnt-beem")
    with pytest.raises(ValueError, match="emissions.model must be an acoustic model with a transducer head"):
        choose_methods("rnnt-beam", {"llm"})


def test_the_comparison_of_transducers_decodes_and_tunes(both, tmp_path) -> None:
    methods = [*RNNT_METHODS, "llm-delayed-shortest", "rnnt-beam+attention-rescoring",
               "rnnt-ctc-shallow+llm-delayed-shortest"]
    out = tmp_path / "out"
    assert main(arguments(both, out, "--methods", ",".join(methods))) == 0
    for method in methods:
        spec = parse_method(method)
        for nbest in lists(out, method).values():
            assert set(nbest[0].scores) == {spec.acoustic, "words", "total", *spec.sources}
            assert nbest.weights[spec.acoustic] == 1.0
    greedy, beam = lists(out, "rnnt-greedy"), lists(out, "rnnt-beam")
    assert any(nbest[0].text for nbest in beam.values())
    for name, nbest in greedy.items():
        assert len(nbest) == 1 and len(beam[name]) == 4
    rescored = lists(out, "rnnt-llm-nbest-rescoring")
    for name, nbest in rescored.items():
        assert {h.text for h in nbest} == {h.text for h in beam[name]}
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())}
    assert rows["rnnt-llm-delayed-shortest"]["lm_forwards"] > 0

    tuned, files = tmp_path / "weights.yaml", [str(out / f"nbest-noise-{m}.jsonl") for m in methods]
    wanted = "llm-delayed-shortest,rnnt-llm-delayed-shortest"
    assert main(["tune", "--nbest", json.dumps(files), "--ref", both["cuts"], "--methods", wanted,
                 "--out", str(tuned)]) == 0
    weights = yaml.safe_load(tuned.read_text())["weights"]
    assert all(set(weights[method]) == {"llm", "words"} for method in wanted.split(","))
    again = tmp_path / "again"
    assert main(arguments(both, again, "--weights", str(tuned), "--methods", wanted)) == 0


def test_tuning_the_comparison_finds_the_internal_models_weight_by_decoding(both, tmp_path, caplog) -> None:
    """No list has its scores: the searches that are tuned on have no fusion."""
    scores = "rnnt-nlm-nbest-rescoring+ngram-nbest-rescoring+llm-nbest-rescoring"
    assert main(arguments(both, tmp_path / "dev", "--methods", scores)) == 0
    listed = json.dumps([str(tmp_path / "dev" / f"nbest-noise-{scores}.jsonl")])
    job = ["tune", "--nbest", listed, "--ref", both["cuts"], "--methods", "rnnt-all", "--out"]
    joint = "rnnt-ctc-shallow"
    without, tuned = tmp_path / "without.yaml", tmp_path / "weights.yaml"
    assert main([*job, str(without)]) == 0
    alone = [joint if word == "rnnt-all" else word for word in job]
    assert main([*alone, str(tmp_path / "alone.yaml")]) == 0
    assert f"{joint} is skipped: no list has scores of ctc_head" in caplog.text
    method = "rnnt-ilm-shallow+llm-delayed-shortest"
    assert f"{method} is skipped: no list has scores of ilm" in caplog.text
    found = yaml.safe_load(without.read_text())["weights"]
    assert "rnnt-llm-delayed-shortest" in found and method not in found
    options = arguments(both, tmp_path / "confirm")[1:]
    confirm = [word.replace("--", "--confirm.", 1) for word in options]
    job[job.index("rnnt-all")] += f",{joint}"
    assert main([*job, str(tuned), *confirm, "--confirm_rounds", "1"]) == 0
    weights = yaml.safe_load(tuned.read_text())["weights"]
    assert set(weights[method]) == {"ilm", "llm", "words"} and weights[method]["ilm"] > 0
    assert set(weights[joint]) == {"ctc_head", "words"} and weights[joint]["ctc_head"] > 0
    assert set(weights) == {joint, *(name for name in RNNT_METHODS if parse_method(name).sources)}


def test_a_method_is_the_search_of_the_encoders_frames(both) -> None:
    options = RecognizerOptions(EmissionOptions(both["model"]), search=PrefixSearchOptions(beam=3, symbols=2))
    recognizer = Recognizer(options, "rnnt-beam")
    utterances = read_cuts(both["cuts"], recognizer.source.wants)
    found = {nbest.utterance: nbest for nbest in recognizer.transcribe(utterances)}
    source = open_source(EmissionOptions(both["model"]))
    for utterance in utterances[:3]:
        features, lens = pad_features([utterance.load()])
        frames, lens = source.encode(features, lens)
        [alone] = transducer_search(source.joiner_frames(frames), lens, source.transducer, options.search,
                                    source.tokens, ids=[utterance.id])
        assert_same({utterance.id: alone}, {utterance.id: found[utterance.id]})


@pytest.mark.parametrize("chunk", [ChunkOptions(4, 2), ChunkOptions(6, None)])
@torch.no_grad()
def test_chunk_by_chunk_is_the_whole_with_a_chunk_mask(both, chunk) -> None:
    """What a stream's encoder hears, joined, is searched as the masked whole is."""
    network = load(both["model"])
    head, lens = network.transducer, torch.tensor([203, 150])
    features = 3 * torch.randn(2, 203, 80, generator=torch.Generator().manual_seed(5)) - 8
    features[1, 150:] = -23.0
    whole, out_lens = network.encoder(features, lens, chunk)
    state, outs, hop = network.encoder.start(2, chunk), [], 4 * chunk.size
    for begin in range(0, 203, hop):
        heard = (lens - begin).clamp(min=0, max=hop)
        heard = features[:, begin : begin + hop], heard
        outs.append(network.encoder.forward_chunk(*heard, state)[0])

    def searched(frames, symbols):
        options = PrefixSearchOptions(beam=4, symbols=symbols)
        found = transducer_search(head.project(frames), out_lens, head, options, network.tokens)
        return {nbest.utterance: nbest for nbest in found}

    for symbols in (1, 2):
        masked = searched(whole, symbols)
        assert_same(searched(torch.cat(outs, 1), symbols), masked)
        unmasked = searched(network.encoder(features, lens)[0], symbols)
        assert masked["0"][0].text and abs(masked["0"][0].total - unmasked["0"][0].total) > 1e-2


def test_a_model_without_the_head_is_named(made, both, tmp_path, capsys) -> None:
    assert main(arguments(made, tmp_path / "a", "--methods", "rnnt-beam")) != 0
    assert "emissions.model must be an acoustic model with a transducer head" in capsys.readouterr().err
    alone = {**made, "model": write_model(tmp_path, ("transducer",))}
    assert main(arguments(alone, tmp_path / "b", "--methods", "ctc-prefix")) != 0
    assert "method 'ctc-prefix' must have an acoustic model with a CTC head" in capsys.readouterr().err
    assert main(arguments(alone, tmp_path / "c", "--methods", "rnnt-greedy,rnnt-llm-delayed-shortest")) == 0
    prior = tmp_path / "prior.json"
    tokens = load(both["model"]).tokens
    write_prior(prior, torch.full((tokens.size,), -5.0), tokens, 1)
    named = ["--methods", "rnnt-beam", "--emissions.prior", str(prior)]
    assert main(arguments(both, tmp_path / "e", *named)) != 0
    rule = "emissions.prior must be empty (or its scale 0) for method 'rnnt-beam'"
    assert rule in capsys.readouterr().err
    joint = ["--methods", "rnnt-ctc-shallow", "--emissions.prior", str(prior)]
    assert main(arguments(both, tmp_path / "f", *joint)) == 0
    assert main(arguments(alone, tmp_path / "g", "--methods", "rnnt-ctc-shallow")) != 0
    assert "acoustic model with a CTC head beside its transducer" in capsys.readouterr().err
    recover = ["--methods", "rnnt-beam", "--search.recover_mass", "true"]
    assert main(arguments(both, tmp_path / "d", *recover)) != 0
    assert "recover_mass must be False for transducers" in capsys.readouterr().err
