"""The job internal-lm, LODR and the label prior in decodes: against sums and counts made by hand.
Knows: the jobs and their files. Must not know: how a search works.
"""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from job_tools import arguments, assert_same, lists

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.acoustic.prior import PriorCounter, SourceWithPrior, read_prior, write_prior
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.search import ctc_greedy_search
from icefall_fusion.text.tokens import AcousticTokens

METHODS = ("lodr-shallow+llm-delayed-shortest", "llm-delayed-shortest", "ctc-prefix",
           "ctc-prefix+lodr-nbest-rescoring")


@pytest.fixture(scope="module")
def internal(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("internal")
    job = ["internal-lm", "--emissions.model", made["model"], "--cuts", made["cuts"], "--out", str(out)]
    assert main(job) == 0
    return out


@pytest.fixture(scope="module")
def emitted(made):
    source = open_source(EmissionOptions(model=made["model"]))
    cuts = read_cuts(made["cuts"], source.wants)
    return source, cuts, [source.emit([cut.id], [cut.load()]) for cut in cuts]


def test_the_job_counts_frames_and_pieces(internal, emitted):
    source, _, batches = emitted
    total, texts = torch.zeros(source.tokens.size, dtype=torch.float64), []
    for one in batches:
        total += one.log_probs[0, : int(one.lens[0])].double().exp().sum(0)
        texts += [nbest[0].tokens for nbest in ctc_greedy_search(one.log_probs, one.lens, one.tokens)]
    prior = read_prior(internal / "prior.json", source.tokens)
    assert prior.exp().tolist() == pytest.approx((total / total.sum()).tolist(), abs=1e-5)
    content = json.loads((internal / "prior.json").read_text())
    assert content["frames"] == sum(int(one.lens[0]) for one in batches)
    ngram = PieceNgram.load(internal / "lodr.arpa.gz", source.tokens.pieces)
    seen = {pair for ids in texts if ids for pair in zip([ngram.start_id, *ids], [*ids, ngram.end_id])}
    assert ngram.order == 2 and len(ngram.orders[1].keys) == len(seen)


def test_a_decode_subtracts_the_ngram(made, internal, tmp_path):
    out, lodr = tmp_path / "out", ["--lodr", str(internal / "lodr.arpa.gz")]
    (tmp_path / "weights.yaml").write_text(f"{METHODS[0]}: {{lodr: 0.3, llm: 0.4, words: 0.2}}\n")
    more = [*lodr, "--weights", str(tmp_path / "weights.yaml"), "--methods", ",".join(METHODS)]
    assert main(arguments(made, out, *more)) == 0
    pieces = AcousticTokens.load(made["model"]).pieces
    ngram = PieceNgram.load(internal / "lodr.arpa.gz", pieces)
    least = float(ngram.orders[0].log_probs[ngram.orders[0].log_probs > -100].min())
    for method in (METHODS[0], METHODS[3]):
        for nbest in lists(out, method).values():
            for h in nbest:
                ids = torch.tensor([ngram.start_id, *h.tokens, ngram.end_id])
                scores, _ = ngram.score_sentences(ids)
                assert min(scores.tolist()) > least - 20
                assert h.scores["lodr"] == pytest.approx(-float(scores.sum()), abs=1e-3)
    for nbest in lists(out, METHODS[0]).values():
        assert nbest.weights == pytest.approx({"ctc": 1.0, "lodr": 0.3, "llm": 0.4, "words": 0.2})
    first = (out / f"nbest-noise-{METHODS[0]}.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["options"]["lodr"]["fingerprint"]


def test_the_prior_is_divided_out(made, internal, emitted):
    source, cuts, batches = emitted
    prior = read_prior(internal / "prior.json", source.tokens)
    options = EmissionOptions(model=made["model"], prior=str(internal / "prior.json"), prior_scale=0.5)
    other = open_source(options)
    for cut, before in zip(cuts[:2], batches):
        after = other.emit([cut.id], [cut.load()])
        wanted = np.exp((before.log_probs - 0.5 * prior).double().numpy())
        wanted = np.log(wanted / wanted.sum(-1, keepdims=True))
        np.testing.assert_allclose(after.log_probs.numpy(), wanted, atol=1e-4)
        assert after.lens.tolist() == before.lens.tolist() and other.model is not None
    off = EmissionOptions(model=made["model"], prior=str(internal / "prior.json"), prior_scale=0.0)
    plain = open_source(off).emit([cuts[0].id], [cuts[0].load()])
    assert torch.equal(plain.log_probs, batches[0].log_probs)  # bit for bit


def test_a_scale_of_zero_changes_no_decode_and_another_does(made, internal, tmp_path):
    outs = {scale: tmp_path / str(scale) for scale in (None, 0.0, 0.6)}
    for scale, out in outs.items():
        path = str(internal / "prior.json")
        more = [] if scale is None else ["--emissions.prior", path, f"--emissions.prior_scale={scale}"]
        assert main(arguments(made, out, *more, "--methods", "ctc-prefix")) == 0
    found = {scale: lists(out, "ctc-prefix") for scale, out in outs.items()}
    assert_same(found[None], found[0.0])
    different = [name for name, nbest in found[0.6].items() if nbest[0].scores != found[None][name][0].scores]
    assert different


def test_a_prior_of_padding_does_not_count():
    tokens = AcousticTokens.from_pieces(["<blk>", "▁a", "b"], 0)
    log_probs = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[0.5, 0.5, 0.0], [9.0, 9.0, 9.0]]]).log()
    counter = PriorCounter(3)
    counter.add(Emissions(["a", "b"], log_probs, torch.tensor([2, 1]), tokens, 0.04))
    assert counter.frames == 3
    assert counter.log_prior().exp().tolist() == pytest.approx([1.3 / 3, 0.8 / 3, 0.9 / 3])


def test_bad_input_is_named(made, internal, tmp_path, capsys, emitted):
    tokens = emitted[0].tokens
    with pytest.raises(FileNotFoundError, match="no prior of labels at"):
        read_prior(tmp_path / "absent", tokens)
    with pytest.raises(ValueError, match="be of these 3 acoustic pieces"):
        read_prior(internal / "prior.json", AcousticTokens.from_pieces(["<blk>", "a", "b"], 0))
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="a prior of labels"):
        read_prior(tmp_path / "bad.json", tokens)
    write_prior(tmp_path / "odd.json", torch.full((tokens.size,), -1.0), tokens, 1)
    content = (tmp_path / "odd.json").read_text()
    for odd in ("NaN", "1.0"):
        (tmp_path / "odd.json").write_text(content.replace("-1.0", odd, 1))
        with pytest.raises(ValueError, match="odd.json must hold log-probs"):
            read_prior(tmp_path / "odd.json", tokens)
    with pytest.raises(ValueError, match="prior must have"):
        SourceWithPrior(emitted[0], torch.zeros(3), 0.5)
    with pytest.raises(ValueError, match="prior_scale must be at least 0"):
        EmissionOptions(prior_scale=-1.0)
    with pytest.raises(ValueError, match="frames must be at least 1"):
        PriorCounter(3).log_prior()
    prior = ["--emissions.prior", str(internal / "prior.json")]
    more = [*prior, "--save_emissions", str(tmp_path / "saved"), "--methods", "ctc-prefix"]
    assert main(arguments(made, tmp_path / "a", *more)) != 0
    assert "prior must be left out with DecodeOptions.save_emissions" in capsys.readouterr().err
    assert main(arguments(made, tmp_path / "b", "--lodr=", "--methods", "lodr-shallow")) != 0
    assert "lodr must name an n-gram over the acoustic pieces" in capsys.readouterr().err
    job = ["internal-lm", "--emissions.model", made["model"], *prior, "--cuts", made["cuts"], "--out", "x"]
    assert main(job) != 0
    assert "be left out: the prior is what is estimated" in capsys.readouterr().err
