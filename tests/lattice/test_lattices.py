"""Lattices as methods read them: k2 in this process, files that it left, what is refused.
Knows: lattices, methods k2-*. Must not know: large language models.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lattice_tools import ARPA, TOKENS, WHY_NO_K2, WORDS, ctc_lattices, log_probs, needs_k2
from search_tools import WordLengths

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lattice.beam import LatticeBeamOptions
from icefall_fusion.lattice.graph import WordTokens, load_graph, save_graph
from icefall_fusion.lattice.k2_lattice import LatticeOptions
from icefall_fusion.lattice.methods import K2_SEARCHES, decode_lattices, split_name
from icefall_fusion.lattice.npz import text_array
from icefall_fusion.lattice.saved import SavedLattices, save_lattices
from icefall_fusion.lattice.source import K2Options, K2Source, open_lattices
from icefall_fusion.nbest import NBest
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens

pytestmark = pytest.mark.k2
SEARCHES = sorted({search for search, _, _ in K2_SEARCHES.values()} | {"beam"})
WEIGHTS = {"ctc": 1.0, "hlg": 0.7, "ngram": 0.4, "words": 0.3}
CPU = torch.device("cpu")


def batch(seed=1, lens=(6, 0, 4)):
    lens = torch.tensor(lens)
    values = log_probs(seed, len(lens), int(lens.max()))
    return Emissions([f"u{row}" for row in range(len(lens))], values, lens, TOKENS, 0.04)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    pytest.importorskip("kaldilm")
    from icefall_fusion.lattice.compose import make_g, make_hlg
    from icefall_fusion.text.lexicon import make_lexicon

    folder = tmp_path_factory.mktemp("graphs")
    (folder / "toy.arpa").write_text(ARPA)
    lexicon = make_lexicon(WORDS, TOKENS)
    for name, make in (("HLG", make_hlg), ("G", make_g)):
        save_graph(folder / f"{name}.npz", make(TOKENS, lexicon, folder / "toy.arpa"))
    wide = LatticeOptions(search_beam=100, output_beam=100, paths=60)
    return K2Options(str(folder / "HLG.npz"), str(folder / "G.npz"), lattice=wide,
                     beam=LatticeBeamOptions(beam=2000))


def decode(search, source, options, emissions, fusions=(), counters=None):
    weights = {**WEIGHTS, "ngram": WEIGHTS["ngram"] if search in ("nbest-ngram", "whole") else 0.0}
    references = dict.fromkeys(emissions.ids, "a cd")
    counters = {} if counters is None else counters
    return decode_lattices(search, source, options.beam, emissions, weights, fusions, references, counters)


@needs_k2
@pytest.mark.parametrize("search", SEARCHES)
def test_saved_lattices_give_what_k2_gives(options, tmp_path, search) -> None:
    emissions = batch()
    source = open_lattices(options, TOKENS, "cpu")
    assert isinstance(source, K2Source) and source.list_kinds == ["nbest", "whole"]
    lattices = source.make(emissions, {})
    lists = {kind: source.lists_of(lattices, emissions, kind, {}) for kind in source.list_kinds}
    seconds = {"lattices": 3.0, "nbest": 1.5, "whole": 3.0}
    save_lattices(tmp_path / "lattices-0.npz", lattices.plain, lists, source.labels, TOKENS, seconds)
    saved = open_lattices(K2Options(saved=str(tmp_path)), TOKENS, "cpu")
    made, read, counters = {}, {}, {}
    now = decode(search, source, options, emissions, counters=made)
    then = decode(search, saved, options, emissions, counters=read)
    for one, other in zip(now, then):
        assert [h.text for h in one] == [h.text for h in other]
        assert [h.total for h in one] == pytest.approx([h.total for h in other], abs=1e-4)
        assert one[0].times == other[0].times
    assert read.pop("lattice_seconds") == {"1best": 3.0, "beam": 3.0, "whole": 6.0}.get(search, 4.5)
    assert made == ({**read, "lattices_thinned": 0} if search == "whole" else read)
    some = Emissions(["u2"], emissions.log_probs[2:, :4], emissions.lens[2:], TOKENS, 0.04)
    assert torch.equal(saved.lattices(some, counters).label, lattices.plain.select([2]).label)
    assert counters["lattice_seconds"] == pytest.approx(1.0)  # a third of the batch's
    assert K2Options(saved=str(tmp_path)).sources() == {"graph", "word_ngram"}


@needs_k2
@pytest.mark.parametrize("search", SEARCHES)
def test_every_list_has_scores_by_source_that_make_its_total(options, search) -> None:
    emissions, source = batch(2), open_lattices(options, TOKENS, "cpu")
    nbests = decode(search, source, options, emissions)
    wanted = {"ctc", "hlg", "words"} | ({"ngram"} if search not in ("1best", "beam") else set())
    for nbest in nbests:
        assert len(nbest) >= 1 and isinstance(nbest, NBest)
        assert wanted <= set(nbest.sources())
        assert len({h.text for h in nbest}) == len(nbest)
        if search != "oracle":
            assert [h.total for h in nbest] == sorted((h.total for h in nbest), reverse=True)
        for h in nbest:
            total = sum(weight * h.scores[name] for name, weight in nbest.weights.items() if weight)
            assert h.total == pytest.approx(total, abs=1e-4)
            assert h.scores["words"] == len(h.words())
            assert TOKENS.words(h.tokens) == h.words()
    assert nbests[1][0].text == "" and len(nbests[1]) == 1  # it has no frame


@needs_k2
def test_ctc_scores_of_lists_are_those_of_the_prefix_search(options) -> None:
    emissions, source = batch(3), open_lattices(options, TOKENS, "cpu")
    nbests = source.lists(emissions, "nbest", {})
    prefixes = ctc_prefix_search(emissions.log_probs, emissions.lens, PrefixSearchOptions(beam=600), TOKENS)
    for nbest, prefix in zip(nbests, prefixes):
        known = {tuple(h.tokens): h.scores["ctc"] for h in prefix}
        for h in nbest:
            if tuple(h.tokens) in known:
                assert h.scores["ctc"] == pytest.approx(known[tuple(h.tokens)], abs=0.05)


@needs_k2
def test_a_fusion_along_lattices_scores_their_words(options) -> None:
    emissions, source = batch(4), open_lattices(options, TOKENS, "cpu")
    for nbest in decode("beam", source, options, emissions, [WordLengths(0.3, 0.1)]):
        for h in nbest:
            assert h.scores["lengths"] == -sum(len(word) ** 2 for word in h.words())


@needs_k2
def test_an_oracle_without_reference_is_refused(options) -> None:
    source = open_lattices(options, TOKENS, "cpu")
    with pytest.raises(ValueError, match="k2-nbest-oracle must have a reference of u0"):
        weights = {"ctc": 1.0, "hlg": 0.5}
        decode_lattices("oracle", source, options.beam, batch(), weights, (), {"u0": None}, {})


@needs_k2
def test_graphs_that_do_not_belong_together_are_refused(options, tmp_path) -> None:
    other = AcousticTokens.from_pieces([*TOKENS.pieces[:-1], "x"], 0)
    with pytest.raises(ValueError, match="HLG.npz must be made for the acoustic pieces with the hash"):
        open_lattices(options, other, "cpu")
    with pytest.raises(ValueError, match="k2.graph must be H, HL or HLG"):
        open_lattices(K2Options(graph=options.ngram), TOKENS, "cpu")
    with pytest.raises(ValueError, match="k2.ngram must be a G over the words of"):
        open_lattices(K2Options(graph=options.graph, ngram=options.graph), TOKENS, "cpu")


@needs_k2
def test_the_jobs_make_graphs_and_lattices(tmp_path, capsys) -> None:
    pytest.importorskip("kaldilm")
    import sentencepiece

    from icefall_fusion.__main__ import main
    from icefall_fusion.acoustic.saved import save_emissions

    with open(tmp_path / "bpe.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a ab c cd cdb", "cd a", "ab c"] * 8), model_writer=file, vocab_size=14,
            model_type="bpe", unk_id=2, bos_id=-1, eos_id=-1, user_defined_symbols=["<blk>", "<sos/eos>"],
            minloglevel=2, hard_vocab_limit=False,
        )
    tokens = AcousticTokens.load(tmp_path)
    (tmp_path / "toy.arpa").write_text(ARPA)
    given = ["--tokens", str(tmp_path), "--arpa", str(tmp_path / "toy.arpa")]
    for kind in ("HLG", "G"):
        assert main(["make-graph", *given, "--kind", kind, "--out", str(tmp_path / f"{kind}.npz")]) == 0
    assert "HLG of " in capsys.readouterr().out
    values, lens = log_probs(5, 3, 8, tokens.size), torch.tensor([8, 5, 7])
    save_emissions(tmp_path / "saved.npz", Emissions(["x", "y", "z"], values, lens, tokens, 0.04))
    job = ["make-lattices", "--emissions", str(tmp_path / "saved.npz"), "--tokens", str(tmp_path)]
    job += ["--k2.graph", str(tmp_path / "HLG.npz"), "--k2.ngram", str(tmp_path / "G.npz")]
    job += ["--batch_size", "2"]
    assert main([*job, "--out", str(tmp_path / "out")]) == 0
    saved, counters = SavedLattices(tmp_path / "out", tokens, CPU), {}
    lists = saved.lists(Emissions(["z", "x"], values[[2, 0]], lens[[2, 0]], tokens, 0.04), "whole", counters)
    assert [nbest.utterance for nbest in lists] == ["z", "x"] and counters["lattice_seconds"] > 0
    assert main([*job, "--out", str(tmp_path / "out")]) == 0  # nothing is left to do
    capsys.readouterr()
    assert main([*job, "--out", str(tmp_path / "out"), "--k2.lattice.paths", "3"]) == 2
    assert "must be a new folder" in capsys.readouterr().err


# --- what needs no k2 ---------------------------------------------------------------------------------


@pytest.fixture()
def saved(tmp_path):
    """Return a folder of lattices over pieces, made without k2, and their emissions."""
    emissions = batch(6, (5, 4))
    lattices = ctc_lattices(emissions.log_probs, emissions.lens, emissions.ids)
    values, options = (emissions.log_probs, emissions.lens), PrefixSearchOptions()
    lists = ctc_prefix_search(*values, options, TOKENS, (), emissions.ids)
    lists = [nbest.with_scores("hlg", [0.0] * len(nbest)) for nbest in lists]
    seconds = {"lattices": 1.0, "nbest": 1.0}
    save_lattices(tmp_path / "lattices-0.npz", lattices, {"nbest": lists}, TOKENS, TOKENS, seconds)
    return tmp_path, emissions


def test_saved_lattices_need_no_k2(saved) -> None:
    folder, emissions = saved
    options = K2Options(saved=str(folder), beam=LatticeBeamOptions(beam=600))
    assert options.sources() == {"graph"}
    source = open_lattices(options, TOKENS, "cpu")
    for search in ("beam", "nbest"):
        for nbest, other in zip(
            decode(search, source, options, emissions),
            ctc_prefix_search(emissions.log_probs, emissions.lens, PrefixSearchOptions(beam=600), TOKENS),
        ):
            assert nbest[0].scores["ctc"] == pytest.approx(
                {tuple(h.tokens): h.scores["ctc"] for h in other}[tuple(nbest[0].tokens)], abs=1e-3
            )


def test_saved_lattices_of_something_else_are_refused(saved) -> None:
    folder, emissions = saved
    source = open_lattices(K2Options(saved=str(folder)), TOKENS, "cpu")
    stranger = Emissions(["who", "u1"], emissions.log_probs, emissions.lens, TOKENS, 0.04)
    with pytest.raises(ValueError, match="must hold every utterance, but lack 'who'"):
        source.lattices(stranger, {})
    shorter = Emissions(emissions.ids, emissions.log_probs[:, :4], emissions.lens.clamp(max=4), TOKENS, 0.04)
    with pytest.raises(ValueError, match=r"lattice of u0 must be of the same log-probs \(4 frames\)"):
        source.lattices(shorter, {})
    with pytest.raises(ValueError, match="must have 'whole' lists: make them with an n-gram"):
        source.lists(emissions, "whole", {})
    other = AcousticTokens.from_pieces([*TOKENS.pieces[:-1], "x"], 0)
    with pytest.raises(ValueError, match="must be made for the acoustic pieces with the hash"):
        open_lattices(K2Options(saved=str(folder)), other, "cpu")
    more = batch(7, (3,))
    lattices = ctc_lattices(more.log_probs, more.lens, ["other"])
    labels = WordTokens(WORDS, [(), (1,), (2,), (3,), (4, 5)])
    save_lattices(folder / "lattices-1.npz", lattices, {}, labels, TOKENS, {"lattices": 1.0})
    with pytest.raises(ValueError, match="lattices-1.npz must be of the graph of .*lattices-0.npz"):
        open_lattices(K2Options(saved=str(folder)), TOKENS, "cpu")
    save_lattices(folder / "lattices-1.npz", source.lattices(emissions, {}), {}, TOKENS, TOKENS, {})
    with pytest.raises(ValueError, match="lattices-1.npz must hold other utterances than the others, but is"):
        open_lattices(K2Options(saved=str(folder)), TOKENS, "cpu")
    (folder / "lattices-1.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="lattices-1.npz cannot be loaded as saved lattices"):
        open_lattices(K2Options(saved=str(folder)), TOKENS, "cpu")
    with pytest.raises(FileNotFoundError, match="the job make-lattices makes them"):
        K2Options(saved=str(folder / "nowhere")).sources()
    with pytest.raises(ValueError, match="K2Options.saved must be left out"):
        K2Options(graph="HLG.npz", saved=str(folder))


def test_opening_a_folder_reads_the_heads_alone(saved) -> None:
    """The arrays of a file are read when one of its utterances is wanted. Only then a broken one shows."""
    folder, emissions = saved
    path = folder / "lattices-0.npz"
    content = bytearray(path.read_bytes())
    begin = content.index(b"ctc.npy") + 200  # in the compressed array
    content[begin : begin + 50] = bytes(50)
    path.write_bytes(content)
    source = open_lattices(K2Options(saved=str(folder)), TOKENS, "cpu")
    with pytest.raises(ValueError, match="lattices-0.npz cannot be loaded as saved lattices"):
        source.lattices(emissions, {})


@pytest.mark.parametrize("version", [1, 3])
def test_files_of_another_format_are_refused(saved, version) -> None:
    """Files had no ``head`` before format 2."""
    folder, _ = saved
    head = json.dumps({"format": version})
    arrays = {"meta": np.array(head)} if version == 1 else {"head": text_array(head)}
    message = f"npz must have the format 2; make it again, for it has the format {version}"
    np.savez(folder / "graph.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_graph(folder / "graph.npz")
    np.savez(folder / "lattices-1.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_lattices(K2Options(saved=str(folder)), TOKENS, "cpu")


@pytest.mark.skipif(not WHY_NO_K2, reason="k2 is there")
def test_without_k2_the_remedy_is_told() -> None:
    with pytest.raises(Unavailable, match=r"k2 is not installed: bash tools/install_k2.sh.*k2.saved"):
        open_lattices(K2Options(graph="HLG.npz"), TOKENS, "cpu")


def test_a_k2_of_another_torch_is_told_with_the_remedy(tmp_path) -> None:
    """A binary built for another torch has undefined symbols; Python says so when it loads the library."""
    (tmp_path / "k2").mkdir()
    (tmp_path / "k2" / "__init__.py").write_text("import _k2\n")
    symbol = "undefined symbol: _ZN3c1019UndefinedTensorImpl"
    (tmp_path / "_k2.py").write_text(f"raise ImportError('_k2.so: {symbol}')\n")
    code = "from icefall_fusion.lattice.k2_fsas import load_k2; load_k2()"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path[1:]])
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": path})
    told = failed.stderr.splitlines()[-1]
    assert "Unavailable: k2 does not fit torch" in told
    assert "undefined symbol" in told and "tools/install_k2.sh" in told


def test_names_of_methods_are_taken_apart() -> None:
    assert split_name("k2-llm-delayed-interval-16") == ("beam", "hlg", ["llm-delayed-interval-16"])
    assert split_name("k2-nbest-ngram-rescoring+llm-nbest-rescoring") == (
        "nbest-ngram", "hlg", ["llm-nbest-rescoring"])
    assert split_name("nlm-shallow") is None
