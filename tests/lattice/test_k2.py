"""k2: graphs, lattices and their paths against brute force, the prefix search, torch; what is refused.
Knows: search, lattices. Must not know: large language models.
"""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from lattice_tools import ARPA, TOKENS, WORDS, assert_same_pieces, log_probs, needs_k2
from reference.lattice_paths import all_paths, collapse, graph_sentences, ngram_on_path, words_of_paths
from search_tools import WordLengths

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.lattice.beam import LatticeBeamOptions, lattice_beam_search
from icefall_fusion.lattice.graph import load_graph, save_graph
from icefall_fusion.lattice.k2_fsas import ctc_loss_rows, load_k2, numbered
from icefall_fusion.lattice.k2_lattice import LatticeMaker, LatticeOptions
from icefall_fusion.lattice.nbest_lists import best_paths
from icefall_fusion.lattice.paths import best_paths as k2_best_paths
from icefall_fusion.lattice.paths import random_paths
from icefall_fusion.lattice.word_ngram import WordNgram
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.lexicon import make_lexicon
from icefall_fusion.text.tokens import AcousticTokens

pytestmark = [pytest.mark.k2, needs_k2]
CPU = torch.device("cpu")
WIDE = LatticeOptions(search_beam=1000, output_beam=1000, max_active_states=10**6)


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    path = tmp_path_factory.mktemp("arpa") / "toy.arpa"
    path.write_text(ARPA)
    return path


@pytest.fixture(scope="module")
def graphs(arpa):
    pytest.importorskip("kaldilm")
    from icefall_fusion.lattice.compose import make_g, make_h, make_hl, make_hlg

    lexicon = make_lexicon(WORDS, TOKENS)
    found = {"H": make_h(TOKENS), "HL": make_hl(TOKENS, lexicon), "HLG": make_hlg(TOKENS, lexicon, arpa)}
    found["modified"] = make_hlg(TOKENS, lexicon, arpa, "modified")
    found["G"] = make_g(TOKENS, lexicon, arpa)
    return found


def make(graph, log_probs, lens, options=WIDE, counters=None):
    ids = [f"u{row}" for row in range(len(lens))]
    emissions = Emissions(ids, log_probs, lens, TOKENS, 0.04)
    return LatticeMaker(graph, options, CPU).make(emissions, {} if counters is None else counters)


def sentences(most):
    """Yield all sentences of up to so many words, as word ids."""
    for length in range(most + 1):
        yield from itertools.product(range(1, len(WORDS) + 1), repeat=length)


def best_backoff(ngram, words):
    """Return the best way to score words by a bigram that may back off although it has the bigram."""
    total, before = 0.0, ngram.start_id
    for word in [*(word - 1 for word in words), ngram.end_id]:
        exact = float(ngram.score([torch.tensor([before])], torch.tensor([word])))
        unigram = float(ngram.score([], torch.tensor([word])))
        backoff = float(ngram.orders[0].backoffs[before])
        total += max(exact, unigram + backoff)
        before = word
    return total


# --- graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["HL", "HLG", "modified"])
def test_the_language_of_a_graph_is_that_of_brute_force(graphs, arpa, kind) -> None:
    frames, topology = 4, "modified" if kind == "modified" else "standard"
    ngram = PieceNgram.load(arpa, WORDS)
    lexicon = make_lexicon(WORDS, TOKENS)
    expected = {}
    for words in sentences(frames):
        pieces = [piece for word in words for piece in lexicon.spellings[word - 1]]
        score = 0.0 if kind == "HL" else best_backoff(ngram, words)
        for heard in alignments(pieces, frames, topology):
            expected[heard, words] = score
    found = graph_sentences(graphs[kind], frames)
    assert set(found) == set(expected)
    for key, score in expected.items():
        assert found[key] == pytest.approx(score, abs=1e-4), key


def alignments(pieces, frames, topology):
    """Yield every alignment of pieces to so many frames."""
    for labels in itertools.product(range(TOKENS.size), repeat=frames):
        if list(pieces) in collapse(labels, topology):
            yield labels


def test_homophones_are_told_apart_by_the_ngram_alone(tmp_path) -> None:
    """Two words of one spelling, and one that begins another: disambiguation keeps all of them."""
    pytest.importorskip("kaldilm")
    from icefall_fusion.lattice.compose import make_hlg
    from icefall_fusion.text.lexicon import Lexicon, disambiguation_marks

    words = ["two", "too", "to", "toast"]
    spellings = [[1], [1], [1], [1, 2]]
    marks = disambiguation_marks(spellings)
    assert marks == [1, 2, 3, 0]
    lines = ["\\data\\", "ngram 1=6", "", "\\1-grams:", "-99\t<s>", "-0.5\t</s>"]
    lines += [f"-{number}\t{word}" for number, word in enumerate(words, 1)]
    path = tmp_path / "unigram.arpa"
    path.write_text("\n".join([*lines, "", "\\end\\", ""]))
    graph = make_hlg(TOKENS, Lexicon(words, spellings, marks), path)
    found = graph_sentences(graph, 2)
    ends = -0.5 * math.log(10)
    for number in (1, 2, 3):
        assert found[(1, 0), (number,)] == pytest.approx(ends - number * math.log(10), abs=1e-4)
    assert found[(1, 2), (4,)] == pytest.approx(ends - 4 * math.log(10), abs=1e-4)
    assert {words for heard, words in found if heard == (1, 1)} == {(1,), (2,), (3,)}


def test_a_graph_comes_back_from_its_file_and_other_pieces_are_refused(graphs, tmp_path) -> None:
    save_graph(tmp_path / "g.npz", graphs["HLG"])
    graph = load_graph(tmp_path / "g.npz")
    for name in ("source", "target", "label", "piece", "output", "score"):
        assert torch.equal(getattr(graph, name), getattr(graphs["HLG"], name))
    assert (graph.words, graph.outputs, graph.kind) == (WORDS, graphs["HLG"].outputs, "HLG")
    graph.check_tokens(TOKENS)
    (tmp_path / "bad.npz").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="bad.npz cannot be loaded as a decoding graph"):
        load_graph(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError, match="the job make-graph makes one"):
        load_graph(tmp_path / "none.npz")
    fewer = AcousticTokens.from_pieces(TOKENS.pieces[:-1], 0)
    with pytest.raises(ValueError, match="must be over 4 acoustic pieces; make it again"):
        graph.check_tokens(fewer)
    other = AcousticTokens.from_pieces([*TOKENS.pieces[:-1], "x"], 0)
    with pytest.raises(ValueError, match="be made for the acoustic pieces with the hash .*make it again"):
        graph.check_tokens(other)


def test_what_cannot_be_a_graph_is_refused(arpa) -> None:
    pytest.importorskip("kaldilm")
    from icefall_fusion.lattice.compose import make_h, make_hlg

    lacking = r"words of .*toy.arpa must be in the lexicon, but 1 are not.*\['cdb'\]"
    with pytest.raises(ValueError, match=lacking):
        make_hlg(TOKENS, make_lexicon(WORDS[:-1], TOKENS), arpa)
    with pytest.raises(ValueError, match=r"words of the lexicon must be spelled by the acoustic pieces"):
        make_lexicon(["a", "zebra"], AcousticTokens.from_pieces(["<blk>", "<unk>", "▁a"], 0))
    with pytest.raises(ValueError, match="the blank must be piece 0"):
        make_h(AcousticTokens.from_pieces(["a", "<blk>"], 1))
    with pytest.raises(FileNotFoundError, match="there is no ARPA file"):
        make_hlg(TOKENS, make_lexicon(WORDS, TOKENS), "nowhere.arpa")


# --- lattices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["H", "HL", "HLG", "modified"])
def test_plain_lattices_are_k2s(graphs, kind) -> None:
    emissions, lens = log_probs(1, 3, 5), torch.tensor([5, 0, 4])
    fsas, plain = make(graphs[kind], emissions, lens)
    assert plain.counts.nonzero().squeeze(1).tolist() == [0, 2]
    total = plain.score({"ctc": 1.0, "hlg": 1.0})
    assert torch.allclose(total, fsas.scores.double(), atol=1e-5)
    best = fsas.get_tot_scores(use_double_scores=True, log_semiring=False)
    viterbi = best_paths(plain, total)
    for index, row in enumerate((0, 2)):
        assert float(total[viterbi[row]].sum()) == pytest.approx(float(best[index]), abs=1e-4)


@pytest.mark.parametrize("kind", ["HL", "HLG"])
def test_a_beam_that_holds_all_finds_k2s_shortest_path(graphs, kind) -> None:
    emissions, lens = log_probs(2, 2, 5), torch.tensor([5, 4])
    fsas, plain = make(graphs[kind], emissions, lens)
    shortest = load_k2().shortest_path(fsas, True)
    best = k2_best_paths(numbered(fsas, fsas.scores))
    labels = graphs[kind].labels(TOKENS)
    nbests = lattice_beam_search(plain, 1.0, labels, LatticeBeamOptions(beam=3000, merge="max"),
                                 [WordLengths(0.0)])
    scores = shortest.get_tot_scores(use_double_scores=True, log_semiring=False)
    for row, nbest in enumerate(nbests):
        outputs = [label for label in plain.output[torch.from_numpy(best.path(row))].tolist() if label]
        assert nbest[0].text == " ".join(labels.words(outputs))
        assert nbest[0].total == pytest.approx(float(scores[row]), abs=1e-4)


def test_along_an_h_lattice_it_is_the_prefix_search(graphs) -> None:
    emissions, lens = log_probs(3, 2, 4), torch.tensor([4, 3])
    plain = make(graphs["H"], emissions, lens).plain
    nbests = lattice_beam_search(plain, 0.0, graphs["H"].labels(TOKENS), LatticeBeamOptions(beam=500))
    expected = ctc_prefix_search(emissions, lens, PrefixSearchOptions(beam=500), TOKENS)
    assert_same_pieces(nbests, expected, 1e-3)


def test_a_fusion_at_the_end_rescores_all_paths(graphs) -> None:
    emissions, lens = log_probs(4, 2, 5), torch.tensor([5, 4])
    plain = make(graphs["HLG"], emissions, lens).plain
    labels, options = graphs["HLG"].labels(TOKENS), LatticeBeamOptions(beam=3000)
    nbests = lattice_beam_search(plain, 0.6, labels, options, [WordLengths(0.3, 0.2, every=0)])
    for row, nbest in enumerate(nbests):
        paths = words_of_paths(plain, row, 0.6)
        rescored = {}
        for outputs, (score, _) in paths.items():
            words = labels.words(outputs)
            rescored[" ".join(words)] = score - 0.3 * sum(len(w) ** 2 for w in words) + 0.2 * len(words)
        assert {h.text: h.total for h in nbest} == pytest.approx(rescored, abs=1e-4)


def test_the_log_total_of_the_ctc_lattice_is_torchs_ctc_score() -> None:
    emissions, lens = log_probs(5, 3, 9), torch.tensor([9, 6, 8])
    targets = [[1, 2, 2, 3], [], [4, 4]]
    flat = torch.tensor([piece for pieces in targets for piece in pieces])
    sizes = torch.tensor([len(pieces) for pieces in targets])
    emissions.requires_grad_()
    loss = torch.nn.functional.ctc_loss(emissions.transpose(0, 1), flat, lens, sizes, reduction="none")
    (wanted,) = torch.autograd.grad(loss.sum(), emissions)
    found = ctc_loss_rows(emissions, lens, targets)
    (gradient,) = torch.autograd.grad(found.sum(), emissions)
    assert torch.allclose(found, loss, atol=1e-4)
    # torch gives the gradient of the loss with respect to logits: the same after a softmax's own
    project = lambda g: g - emissions.exp() * g.sum(-1, keepdim=True)  # noqa: E731
    assert torch.allclose(project(gradient), project(wanted), atol=1e-4)


def test_a_model_has_the_same_loss_by_k2_as_by_torch() -> None:
    from icefall_fusion.acoustic.models.ctc import CtcHead

    torch.manual_seed(3)
    head, frames, lens = CtcHead(6, TOKENS.size), torch.randn(3, 8, 6), torch.tensor([8, 2, 7])
    targets = [[1, 2, 2], [1, 2, 3], [4]]  # the second has too few frames
    by_torch, impossible = head.loss(frames, lens, targets)
    head.row_losses = ctc_loss_rows
    by_k2, same = head.loss(frames, lens, targets)
    assert float(by_k2) == pytest.approx(float(by_torch), abs=1e-4)
    assert impossible == same == 1
    (wanted,) = torch.autograd.grad(by_torch, head.linear.weight)
    (gradient,) = torch.autograd.grad(by_k2, head.linear.weight)
    assert torch.allclose(gradient, wanted, atol=1e-4)


def test_what_is_too_large_is_pruned_counted_and_never_empty(graphs, caplog) -> None:
    emissions, lens = log_probs(6, 2, 5), torch.tensor([5, 4])
    whole = make(graphs["HLG"], emissions, lens).plain
    options, counters = LatticeOptions(1000, 1000, max_active_states=10**6, max_arcs=60), {}
    plain = make(graphs["HLG"], emissions, lens, options, counters).plain
    assert counters == {"lattices_pruned": 2, "lattice_arcs": len(plain.source), "lattice_frames": 9}
    assert (plain.counts > 0).all() and (plain.counts < whole.counts).all()
    assert "pruned to" in caplog.text and "max_arcs is 60" in caplog.text
    alone = make(graphs["HLG"], emissions[1:, :4], lens[1:], options, counters).plain
    assert alone.counts.tolist() == plain.counts.tolist()[1:]  # whatever else is in the batch
    assert counters["lattices_pruned"] == 3 and counters["lattice_frames"] == 13


def test_an_utterance_too_short_for_any_path_is_told(graphs, caplog) -> None:
    """One frame has no room for the words of a graph whose n-gram allows no empty sentence."""
    emissions, counters = torch.full((1, 1, TOKENS.size), -math.inf), {}
    emissions[0, 0, 4] = 0.0  # only a piece that begins no word
    fsas, plain = make(graphs["HL"], emissions, torch.tensor([1]), counters=counters)
    assert fsas is None and len(plain.source) == 0
    assert counters["lattices_empty"] == 1 and counters["lattices_widened"] == 1
    assert "no path through the graph for ['u0']" in caplog.text and "raise both" in caplog.text
    assert len(lattice_beam_search(plain, 1.0, graphs["HL"].labels(TOKENS))[0]) == 0


def test_log_probs_of_other_pieces_or_device_are_refused(graphs) -> None:
    maker = LatticeMaker(graphs["HLG"], WIDE, CPU)
    tokens = AcousticTokens.from_pieces([*TOKENS.pieces, "e", "f"], 0)
    emissions = Emissions(["u"], log_probs(7, 1, 3, pieces=7), torch.tensor([3]), tokens, 0.04)
    with pytest.raises(ValueError, match="log_probs must have the 5 pieces of the graph, but is 7"):
        maker.make(emissions, {})
    emissions.log_probs = emissions.log_probs.to("meta")
    with pytest.raises(ValueError, match="log_probs must be on the device of the graph .cpu.: move one"):
        maker.make(emissions, {})


# --- paths --------------------------------------------------------------------------------------------


def test_random_paths_are_paths(graphs) -> None:
    emissions, lens = log_probs(8, 2, 5), torch.tensor([5, 4])
    fsas, plain = make(graphs["HLG"], emissions, lens)
    paths = random_paths(fsas, 0.5 * fsas.scores, 40)
    assert (paths.owner == 0).sum() == 41 and (paths.owner == 1).sum() == 41  # and the best one
    for number, row in enumerate(paths.owner.tolist()):
        arcs = paths.path(number)
        assert len(arcs) == int(lens[row]) + 1
        assert plain.source[arcs[0]] == 0 and plain.label[arcs[-1]] == -1
        assert (plain.target[arcs[:-1]] == plain.source[arcs[1:]]).all()


def test_an_ngram_scores_sentences_as_its_arpa_file_does(graphs, arpa) -> None:
    ngram, words = PieceNgram.load(arpa, WORDS), list(sentences(3))
    scores = WordNgram(graphs["G"], graphs["HL"].outputs, CPU).score(words)
    assert scores.tolist() == pytest.approx([best_backoff(ngram, sentence) for sentence in words], abs=1e-4)


def rescored_paths(graphs, lattices, scales, options):
    """Return {(row, scale): score of the best path} and the counters."""
    ngram, counters = WordNgram(graphs["G"], graphs["HL"].outputs, CPU), {}
    paths = ngram.rescore(lattices, options, counters, scales)
    rows = range(len(lattices.plain))
    best: dict = {(row, scale): () for row in rows for scale in scales}
    for number, row in enumerate(paths.owner.tolist()):
        arcs = tuple(paths.path(number).tolist())
        open_scales = [scale for scale in scales if not best[row, scale]]
        if open_scales:  # the best ones come first, scale by scale
            best[row, open_scales[0]] = arcs
    scores = {key: score_of(graphs, lattices.plain, arcs, key[1]) for key, arcs in best.items()}
    return scores, counters


def score_of(graphs, plain, arcs, scale):
    ctc = sum(float(plain.ctc[arc]) for arc in arcs)
    return ctc + scale * ngram_on_path(graphs["G"], plain, arcs, graphs["HL"].outputs)


def test_whole_lattice_rescoring_finds_the_best_of_all_paths(graphs) -> None:
    emissions, lens = log_probs(9, 2, 6), torch.tensor([6, 5])
    lattices = make(graphs["HL"], emissions, lens)
    options = LatticeOptions(rescore_posterior=1e-20, paths=10)
    best, counters = rescored_paths(graphs, lattices, (0.3, 1.0), options)
    assert counters == {"lattices_thinned": 0} and len(best) == 4
    for (row, scale), score in best.items():
        every = [score_of(graphs, lattices.plain, arcs, scale) for arcs in all_paths(lattices.plain, row)]
        assert score == pytest.approx(max(every), abs=1e-4)


def test_large_lattices_are_rescored_alone_and_thinned_out(graphs) -> None:
    emissions, lens = log_probs(9, 3, 6), torch.tensor([6, 5, 4])
    lattices = make(graphs["HL"], emissions, lens)

    def best(most):
        options = LatticeOptions(rescore_posterior=1e-20, rescore_arcs=most, paths=1)
        return rescored_paths(graphs, lattices, (0.3, 1.0), options)

    (together, none), (alone, also_none) = best(10**6), best(int(lattices.plain.counts.max()))
    assert none == also_none == {"lattices_thinned": 0}
    assert alone == pytest.approx(together, abs=1e-4)
    few, thinned = best(30)
    assert thinned == {"lattices_thinned": 3} and len(few) == 6
    assert all(few[key] <= together[key] + 1e-4 for key in together)
