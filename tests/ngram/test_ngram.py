"""Piece n-grams: estimation against a slow twin, ARPA files, shallow fusion and look-ahead in the search.
Knows: n-grams, small searches. Must not know: trained models.
"""
from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.__main__ import main
from icefall_fusion.fusion import DelayedFusion, LodrFusion, LookAhead, NgramFusion, ShallowFusion
from icefall_fusion.fusion.rescoring import rescore_with_ngram
from icefall_fusion.ngram.arpa import NgramTable, _read_lines, _read_uniform_lines, piece_ids, write_arpa
from icefall_fusion.ngram.kneser_ney import count_ngrams, kneser_ney, log_prob
from icefall_fusion.ngram.piece_ngram import NOTHING, NgramOrder, PieceNgram
from icefall_fusion.ngram.pruning import prune
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.search.engines import native as native_search
from tests.fusion.test_fusion import (
    PIECES,
    SLOW_TRIGGERS,
    TRIGGERS,
    assert_same,
    compare_with_twin,
    emissions,
    llm,  # noqa: F401 (a fixture)
    names,
    nlm,  # noqa: F401 (a fixture)
    slow_delayed,
    slow_shallow,
    text_log_prob,
    tokens,  # noqa: F401 (a fixture)
)
from tests.reference.fused_search import SlowFusion
from tests.reference.kneser_ney import SlowKneserNey

SIZE = 5
LETTERS = ["<blk>", "a", "b", "c", "d"]
sentences = st.lists(st.lists(st.integers(1, SIZE - 1), max_size=6), min_size=1, max_size=12)


def train(texts: list[list[int]], size: int, order: int, cutoffs: tuple[int, ...] = ()):
    stream = np.array([i for text in texts for i in (0, *text, 0)], np.uint16)
    ends = np.cumsum([len(text) + 2 for text in texts])
    bounds = np.stack([ends - [len(text) + 2 for text in texts], ends], axis=1)
    return kneser_ney(count_ngrams(stream, bounds, size, order), size, cutoffs)


def as_model(texts, size: int, order: int, folder: Path, names_: list[str], cutoffs=()) -> PieceNgram:
    path = folder / "pieces.arpa.gz"
    write_arpa(path, train(texts, size, order, cutoffs), names_)
    return PieceNgram.load(path, names_)


def score(model: PieceNgram, context: tuple[int, ...], piece: int) -> float:
    """Score one piece after a context (oldest first)."""
    before = [*reversed(context), *[NOTHING] * model.order][: model.order - 1]
    return float(model.score([torch.tensor([c]) for c in before], torch.tensor([piece]))[0])


# --- estimation and files ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(texts=sentences, order=st.integers(1, 4), cutoffs=st.lists(st.integers(1, 3), max_size=3))
def test_estimates_are_those_of_the_slow_twin_and_sum_to_one(tmp_path_factory, texts, order, cutoffs):
    folder = tmp_path_factory.mktemp("arpa")
    model = as_model(texts, SIZE, order, folder, LETTERS, tuple(cutoffs))
    slow = SlowKneserNey(texts, SIZE, SIZE + 1, order, [1, *cutoffs, 1, 1, 1])
    pieces = [*range(SIZE), SIZE + 1]
    contexts = {(SIZE, *text[:cut]) for text in texts for cut in range(len(text) + 1)}
    for context in [*sorted(contexts)[:12], (1,), (2, 1), (4, 4, 4)]:
        values = [math.exp(score(model, context, piece)) for piece in pieces]
        assert sum(values) == pytest.approx(1, abs=2e-4)
        assert values == pytest.approx([slow.prob(context, piece) for piece in pieces], rel=3e-4, abs=1e-9)


def counted(texts: list[list[int]], order: int):
    """Return the tables of all n-grams, and their counts."""
    stream = np.array([i for text in texts for i in (0, *text, 0)], np.uint16)
    ends = np.cumsum([len(text) + 2 for text in texts])
    counts = count_ngrams(stream, np.stack([ends - [len(t) + 2 for t in texts], ends], axis=1), SIZE, order)
    return kneser_ney(counts, SIZE), [count for count in counts if len(count.keys)]


def probs(tables, context: int, n: int) -> np.ndarray:
    """Return P of every piece and of the end after a context of ``n - 1`` pieces, with back-off."""
    base, followers = SIZE + 2, np.array([*range(SIZE), SIZE + 1])
    return np.exp(log_prob([None, *tables], context * base + followers, n, base))


@settings(max_examples=30, deadline=None)
@given(texts=sentences.filter(any), order=st.integers(2, 3), threshold=st.sampled_from((0.003, 0.03, 0.3)))
def test_pruning_leaves_out_what_changes_the_distributions_little(texts, order, threshold):
    tables, counts = counted(texts, order)
    base, n = SIZE + 2, len(tables)
    pruned = prune(tables, counts, base, threshold)
    top, context_counts = tables[n - 1], dict(zip(counts[n - 2].keys.tolist(), counts[n - 2].counts.tolist()))
    left = set(pruned[n - 1].keys.tolist()) if len(pruned) == n else set()
    for index, key in enumerate(top.keys.tolist()):  # one by one, over all that may follow
        rest = [NgramTable(*(values.copy() for values in table)) for table in tables]
        rest[n - 1] = NgramTable(*(np.delete(values, index) for values in top))
        context, others = key // base, [k % base for k in top.keys.tolist() if k // base == key // base]
        others.remove(key % base)
        followers = [*range(SIZE), SIZE + 1]
        lower = probs(tables, context % base ** (n - 2), n - 1)
        own = probs(tables, context, n)
        free = [place for place, follower in enumerate(followers) if follower not in others]
        explicit = sum(own[place] for place in range(len(followers)) if place not in free)
        at = np.flatnonzero(rest[n - 2].keys == context)
        rest[n - 2].backoffs[at] = np.log((1 - explicit) / lower[free].sum())
        new = probs(rest, context, n) if len(top.keys) > 1 else lower
        assert new.sum() == pytest.approx(1, abs=1e-6)
        share = context_counts[context] / sum(context_counts.values())
        change = math.expm1(share * float((own * np.log(own / new)).sum()))
        if abs(change - threshold) > 1e-9:
            assert (key in left) == (change > threshold)
    for length, table in enumerate(pruned[1:], 2):
        for context in np.unique(table.keys // base).tolist():
            assert probs(pruned, context, length).sum() == pytest.approx(1, abs=1e-6)
    assert [len(t.keys) for t in prune(tables, counts, base, 1e9)] == [SIZE + 2]


def test_an_arpa_file_of_any_toolkit_is_read(tmp_path):
    text = """made by hand
\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<unk>
-0.5\ta\t-0.25
-0.75\tb
-99\t<s>\t-0.1
-0.6\t</s>

\\2-grams:
-0.2\t<s> a
-0.3\ta b
-0.4\tb </s>

\\end\\
"""
    (tmp_path / "hand.arpa").write_text(text)
    with gzip.open(tmp_path / "hand.arpa.gz", "wt") as file:
        file.write(text)
    for name in ("hand.arpa", "hand.arpa.gz"):
        model = PieceNgram.load(tmp_path / name, ["<blk>", "a", "b", "<unk>"])
        start, end, ten = model.start_id, model.end_id, math.log(10)
        assert model.order == 2 and model.size == 4
        assert score(model, (start,), 1) == pytest.approx(-0.2 * ten)
        assert score(model, (start,), 2) == pytest.approx((-0.1 - 0.75) * ten)  # backs off
        assert score(model, (1,), 1) == pytest.approx((-0.25 - 0.5) * ten)
        assert score(model, (2,), 1) == pytest.approx(-0.5 * ten)  # b has no back-off weight
        assert score(model, (2,), end) == pytest.approx(-0.4 * ten)
        assert score(model, (1,), 0) < -200  # the file has no such piece
        values, owner = model.score_sentences(torch.tensor([start, 1, 2, end, start, end]))
        assert values.tolist() == pytest.approx([-0.2 * ten, -0.3 * ten, -0.4 * ten, (-0.1 - 0.6) * ten])
        assert owner.tolist() == [0, 0, 0, 1]
    endless = text.replace("-0.3\ta b", "-inf\ta b").replace("ngram 2=3", "ngram 2=3\nngram 3=0")
    (tmp_path / "endless").write_text(endless.replace("\\end\\", "\\3-grams:\n\n\\end\\"))
    model = PieceNgram.load(tmp_path / "endless", ["<blk>", "a", "b", "<unk>"])
    assert model.order == 2 and score(model, (1,), 2) == pytest.approx(-99 * ten)
    broken = {
        "no-unigrams": ("hello\n", "must have 1 orders of n-grams, but is 0"),
        "short": (text.partition("\\2-grams")[0], "must have 2 orders of n-grams, but is 1"),
        "few": (text.replace("ngram 2=3", "ngram 2=4"), "2-grams must be 4 as announced, but is 3"),
        "many": (text.replace("ngram 2=3", "ngram 2=2"), "2-grams must be 2 as announced, but is 3"),
        "twice": (text.replace("-0.3\ta b", "-0.3\t<s> a"), "2-grams must differ .*, but is 1"),
        "words": (text.replace("a b\n", "a house\n"), "n-gram of the acoustic pieces, but holds 'house'"),
        "nan": (text.replace("-0.3\ta b", "nan\ta b"), "2-grams, 'nan.*have numbers, but is 'nan'"),
        "letters": (text.replace("-0.3\ta b", "x\ta b"), "have numbers, but is 'x'"),
        "count": (text.replace("ngram 2=3", "ngram 2=x"), "'ngram 2=x' must have a count .*, but is 'x'"),
        "infinite": (text.replace("ngram 2=3", "ngram 2=inf"), "must have a count .*, but is 'inf'"),
        "below": (text.replace("ngram 2=3", "ngram 2=-3"), "must have a count of n-grams, but is '-3'"),
        "long": (text.replace("ngram 2=3", "ngram 2=3\n" * 25), "longest n-gram must be at most"),
        "ragged": (text.replace("a b\n", "a\n"), "lines of a number, 2 pieces"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            PieceNgram.load(tmp_path / name, ["<blk>", "a", "b", "<unk>"])
    whole = (tmp_path / "hand.arpa.gz").read_bytes()
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.gz must be an ARPA file, but cannot be read"):
        PieceNgram.load(tmp_path / "cut.gz", ["<blk>", "a", "b", "<unk>"])
    with pytest.raises(FileNotFoundError, match="no ARPA file at"):
        PieceNgram.load(tmp_path / "absent", LETTERS)
    for pieces, message in ((["a", "a"], "pieces must differ"), (["a", "b c"], "have white space")):
        with pytest.raises(ValueError, match=message):
            PieceNgram.load(tmp_path / "hand.arpa", pieces)
    (tmp_path / "damaged.gz").write_bytes(whole[:20] + b"damage" + whole[26:])
    with pytest.raises(ValueError, match="damaged.gz must be an ARPA file"):
        PieceNgram.load(tmp_path / "damaged.gz", ["<blk>", "a", "b", "<unk>"])


def test_silent_pieces_may_be_named_as_the_marks_of_sentences(tmp_path):
    """As in the vocabularies of wav2vec 2.0; an <unk> of the file that is no piece is passed over."""
    pieces = ["<pad>", "<s>", "</s>", "|", "A", "B"]
    texts = [[4, 3, 5], [4, 5, 5], [5, 3, 4]]
    model = as_model(texts, len(pieces), 3, tmp_path, pieces)
    assert score(model, (model.start_id,), 1) < -200 and score(model, (4,), 2) < -200
    probabilities = [math.exp(score(model, (model.start_id,), piece)) for piece in (0, 3, 4, 5, model.end_id)]
    assert 0.5 < sum(probabilities) < 1  # the silent pieces have the rest in training
    with gzip.open(tmp_path / "pieces.arpa.gz", "rt") as file:
        lines = file.read().splitlines()
    at = lines.index("\\1-grams:") + 1
    lines[at:at] = ["-1.5\t<unk>\t0"]
    lines[2] = f"ngram 1={int(lines[2].partition('=')[2]) + 1}"
    (tmp_path / "unk.arpa").write_text("\n".join(lines))
    again = PieceNgram.load(tmp_path / "unk.arpa", pieces)
    assert all(torch.equal(a.log_probs, b.log_probs) for a, b in zip(model.orders, again.orders))


def test_an_ngram_of_other_pieces_is_refused_with_both_sizes(tmp_path):
    """Also where these pieces have all of its own: it would only ever see words spelled another way."""
    as_model([[1, 2], [2, 3]], len(LETTERS), 2, tmp_path, LETTERS)
    path = tmp_path / "pieces.arpa.gz"
    more = [*LETTERS, "ab", "cd"]
    with pytest.raises(ValueError, match="of these 7 acoustic pieces, but was made of 5 others: .*train"):
        PieceNgram.load(path, more)
    with pytest.raises(ValueError, match="of these 5 acoustic pieces, but was made of 5 others"):
        PieceNgram.load(path, ["<blk>", "a", "b", "c", "e"])
    PieceNgram.load(path, LETTERS[::-1])  # their order is no matter: the file has their text
    bare = gzip.decompress(path.read_bytes()).split(b"\n", 1)[1]  # as other toolkits write it
    (tmp_path / "bare.arpa").write_bytes(bare)
    assert score(PieceNgram.load(tmp_path / "bare.arpa", more), (), 5) < -200


def test_the_job_trains_and_says_the_perplexity(tmp_path, capsys):
    import tiny

    bpe = tiny.write_bpe(tmp_path)
    from icefall_fusion.text.tokens import AcousticTokens

    pieces = AcousticTokens.load(bpe)
    mark = pieces.sos_eos_id
    for name, lines in (("train", tiny.LINES), ("dev", tiny.LINES[:2])):
        stream = [i for text in lines for i in (mark, *pieces.encode(text), mark)]
        np.save(tmp_path / f"{name}.npy", np.array(stream))
    out = tmp_path / "n.arpa.gz"
    job = ["train-ngram", "--data", str(tmp_path), "--tokens", str(bpe), "--out", str(out), "--order", "3"]
    assert main(job) == 0
    printed = capsys.readouterr().out
    model = PieceNgram.load(out, pieces.pieces)
    ids = [i for t in tiny.LINES[:2] for i in (model.start_id, *pieces.encode(t), model.end_id)]
    nats = -float(model.score_sentences(torch.tensor(ids))[0].sum())
    words = sum(len(t.split()) + 1 for t in tiny.LINES[:2])
    assert f"{math.exp(nats / words):.1f} perplexity" in printed and "3-grams" in printed
    first = out.read_bytes()
    assert main(job) == 0 and out.read_bytes() == first  # equal models are equal files
    assert main([*job[:2], str(tmp_path / "absent"), *job[3:]]) == 2
    assert main([*job[:-1], "30"]) == 2
    assert "TrainNgramOptions.order must be at most 11 for" in capsys.readouterr().err


def test_fewer_digits_make_a_smaller_file_of_nearly_the_same_numbers(tmp_path):
    rng = np.random.default_rng(5)
    texts = [rng.integers(1, SIZE, rng.integers(1, 9)).tolist() for _ in range(80)]
    models, sizes = [], []
    for digits in (2, 5, 9):
        write_arpa(tmp_path / f"{digits}.arpa.gz", train(texts, SIZE, 3), LETTERS, digits)
        models.append(PieceNgram.load(tmp_path / f"{digits}.arpa.gz", LETTERS))
        sizes.append((tmp_path / f"{digits}.arpa.gz").stat().st_size)
    assert sizes == sorted(sizes)
    for few, more in zip(models, models[1:]):
        for one, other in zip(few.orders, more.orders):
            assert torch.equal(one.keys, other.keys)
            torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0.051, atol=0)
            torch.testing.assert_close(one.backoffs, other.backoffs, rtol=0.051, atol=1e-6)


@given(
    rows=st.lists(
        st.tuples(st.floats(-9, 0), st.lists(st.sampled_from(LETTERS[1:]), min_size=2, max_size=2),
                  st.floats(-2, 2)), min_size=1, max_size=9,
    ),
    longest=st.booleans(),
    odd=st.sampled_from([None, "a  b", "\ta b"]),
)
def test_lines_of_one_form_are_read_as_all_others(rows, longest, odd):
    lines = [f"{one!r}\t{' '.join(pieces)}" + ("" if longest else f"\t{two!r}") + "\n"
             for one, pieces, two in rows]
    if odd is not None:
        lines.append(f"-1\t{odd}\t0\n")
    ids = piece_ids(LETTERS)
    quick = _read_uniform_lines(lines, 2, ids, 8)
    keys, values = _read_lines(lines, 2, ids, 8, "here", "file")
    assert (quick is None) == (odd is not None)
    if quick is not None:
        assert quick[0].tolist() == keys.tolist() and quick[1].tolist() == values.tolist()


# --- in the search -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ngram(tmp_path_factory) -> PieceNgram:
    rng = np.random.default_rng(3)
    texts = [rng.integers(3, len(PIECES), rng.integers(1, 9)).tolist() for _ in range(60)]
    return as_model(texts, len(PIECES), 3, tmp_path_factory.mktemp("ngram"), PIECES)


def slow_score(ngram: PieceNgram, prefix, piece) -> float:
    return score(ngram, (ngram.start_id, *prefix), piece)


def whole_score(ngram: PieceNgram, prefix) -> float:
    return sum(slow_score(ngram, prefix[:i], p) for i, p in enumerate((*prefix, ngram.end_id)))


def slow_ngram(ngram: PieceNgram, weight: float, bonus: float) -> SlowFusion:
    return SlowFusion("ngram", weight, bonus, lambda prefix, words: whole_score(ngram, tuple(prefix)),
                      piece_score=lambda prefix, piece: slow_score(ngram, prefix, piece))


@pytest.mark.parametrize("seed", range(3))
def test_shallow_fusion_of_an_ngram_is_its_slow_twin(ngram, tokens, seed):  # noqa: F811
    log_probs, lens = emissions(seed=seed)
    lens[2] = 0
    fusion = NgramFusion(ngram, 0.5, 0.6)
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [slow_ngram(ngram, 0.5, 0.6)])
    for nbest, again in zip(nbests, rescore_with_ngram(nbests, ngram, "again")):
        for one, other in zip(nbest, again):
            assert other.scores["again"] == pytest.approx(one.scores["ngram"], abs=1e-4)


@pytest.mark.parametrize(("every", "late"), [(1, 0), (3, 0), (1, 4), (3, 2)])
@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
@pytest.mark.parametrize("seed", range(2))
def test_look_ahead_is_its_slow_twin(llm, ngram, tokens, trigger, seed, every, late):  # noqa: F811
    log_probs, lens = emissions(seed=seed)
    fusion = DelayedFusion(llm, 0.5, 0.7, trigger, look_ahead=LookAhead(ngram, 0.8, every), late=late)
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    slow = slow_delayed(llm, 0.5, 0.7, SLOW_TRIGGERS[type(trigger).__name__](trigger))
    slow.ahead_every, slow.late = every, late

    def estimate(prefix, piece):
        return 0.5 * 0.8 * slow_score(ngram, prefix, piece) + 0.7 * (tokens.starts_word[piece] or not prefix)

    slow.ahead = estimate
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [slow])


def test_look_ahead_beside_shallow_fusion_is_its_slow_twin(llm, nlm, ngram, tokens):  # noqa: F811
    log_probs, lens = emissions(seed=5)
    trigger = TRIGGERS[4]
    ahead = LookAhead(ngram, 0.5)
    fusions = [ShallowFusion(nlm, 0.3), DelayedFusion(llm, 0.4, 0.5, trigger, look_ahead=ahead)]
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, fusions)
    slow = slow_delayed(llm, 0.4, 0.5, SLOW_TRIGGERS["ShortestHypothesis"](trigger))
    slow.ahead = lambda prefix, piece: (
        0.4 * 0.5 * slow_score(ngram, prefix, piece) + 0.5 * (tokens.starts_word[piece] or not prefix)
    )
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [slow_shallow(nlm, 0.3, 0.0), slow])


def test_look_ahead_changes_nothing_where_nothing_is_pruned(llm, ngram, tokens):  # noqa: F811
    log_probs, _ = emissions(batch=2, frames=3, seed=6)
    lens = torch.tensor([3, 2])
    options = PrefixSearchOptions(beam=2000)
    results = []
    for ahead in (None, LookAhead(ngram)):
        fusion = DelayedFusion(llm, 0.5, 0.7, TRIGGERS[1], look_ahead=ahead)
        results.append(ctc_prefix_search(log_probs, lens, options, tokens, [fusion]))
    assert len(results[0][0]) > 500
    assert_same(*results)


OPTIONS = [{}, {"score_beam": 1.5}, {"recover_mass": True}, {"blank_skip": 0.6}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
def test_look_ahead_does_not_depend_on_the_batch(llm, ngram, tokens, trigger, every, options):  # noqa: F811
    log_probs, lens = emissions(batch=6, seed=5)
    lens[3] = 0
    options = PrefixSearchOptions(beam=4, **options)

    def decode(rows):
        ahead, late = LookAhead(ngram, 0.7, every), 3 * (every > 1)
        delayed = DelayedFusion(llm, 0.4, 0.5, trigger, look_ahead=ahead, late=late)
        fusions = [delayed, NgramFusion(ngram, 0.2)]
        return ctc_prefix_search(log_probs[rows], lens[rows], options, tokens, fusions)

    assert_same(decode(list(range(6))), [decode([row])[0] for row in range(6)])


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_scores_are_exact_whatever_the_search_leaves_out(llm, ngram, tokens, options):  # noqa: F811
    log_probs, lens = emissions(seed=8)
    fusions = [NgramFusion(ngram, 0.3, 0.2), DelayedFusion(llm, 0.4, 0.5, look_ahead=LookAhead(ngram))]
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=5, **options), tokens, fusions)
    for hypothesis in (h for nbest in nbests for h in nbest):
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(llm, hypothesis.text), abs=1e-4)
        expected = whole_score(ngram, tuple(hypothesis.tokens))
        assert hypothesis.scores["ngram"] == pytest.approx(expected, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.integers(1, 5), cutoffs=st.lists(st.integers(1, 3), max_size=3),
       weight=st.sampled_from([0.0, 0.4, 3.0, 400.0]), bonus=st.sampled_from([0.0, 0.7, -2.0]),
       beam=st.sampled_from([1, 4, 9]), options=st.sampled_from(OPTIONS + [{"top_pieces": 3}]))
def test_compiled_search_finds_what_tensors_find(
    tmp_path_factory, tokens, seed, order, cutoffs, weight, bonus, beam, options  # noqa: F811
):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, len(PIECES), rng.integers(1, 9)).tolist() for _ in range(30)]
    model = as_model(texts, len(PIECES), order, tmp_path_factory.mktemp("n"), PIECES, tuple(cutoffs))
    log_probs, lens = emissions(batch=3, seed=seed)
    results = []
    for engine in ("native", "torch"):
        chosen = PrefixSearchOptions(beam=beam, engine=engine, **options)
        fusion = NgramFusion(model, weight, bonus)
        results.append(ctc_prefix_search(log_probs, lens, chosen, tokens, [fusion]))
    for native, tensors in zip(*results):
        most = max(1, min(len(native), len(tensors)) - 1)  # the last may tie with one that is not there
        totals = [[hypothesis.total for hypothesis in nbest][:most] for nbest in (native, tensors)]
        assert totals[0] == pytest.approx(totals[1], abs=2e-3, rel=1e-5)
        assert native[0].scores == pytest.approx(tensors[0].scores, abs=1e-3, rel=1e-5)


def slow_lodr(ngram: PieceNgram, weight: float) -> SlowFusion:
    """Back off by dictionaries; nothing is rarer than the rarest piece that the n-gram knows."""
    tables = []
    for order in ngram.orders:
        keys = [tuple(key // ngram.base**n % ngram.base for n in reversed(range(order.length)))
                for key in order.keys.tolist()]
        tables.append(dict(zip(keys, zip(order.log_probs.tolist(), order.backoffs.tolist()))))
    least = min(log_prob for log_prob, _ in tables[0].values() if log_prob > -100)

    def taken(prefix, piece):
        context, backoffs = (ngram.start_id, *prefix)[-(ngram.order - 1) :], 0.0
        while (*context, piece) not in tables[len(context)]:
            backoffs += tables[len(context) - 1].get(context, (0.0, 0.0))[1]
            context = context[1:]
        return -backoffs - max(tables[len(context)][(*context, piece)][0], least)

    def whole(prefix, words):
        return sum(taken(tuple(prefix[:i]), p) for i, p in enumerate((*prefix, ngram.end_id)))

    return SlowFusion("lodr", weight, 0.0, whole, piece_score=taken)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("seed", range(3))
def test_lodr_beside_an_ngram_and_an_llm_is_its_slow_twin(llm, ngram, tokens, seed, engine):  # noqa: F811
    log_probs, lens = emissions(seed=seed)
    fusions = [LodrFusion(ngram, 0.4), NgramFusion(ngram, 0.2), DelayedFusion(llm, 0.5, 0.7, TRIGGERS[4])]
    options = PrefixSearchOptions(beam=4, engine=engine)
    nbests = ctc_prefix_search(log_probs, lens, options, tokens, fusions)
    slow = [slow_lodr(ngram, 0.4), slow_ngram(ngram, 0.2, 0.0)]
    slow.append(slow_delayed(llm, 0.5, 0.7, SLOW_TRIGGERS["ShortestHypothesis"](TRIGGERS[4])))
    compare_with_twin(nbests, log_probs, lens, 4, tokens, slow)


def test_lodr_does_not_depend_on_the_engine_and_is_nothing_at_weight_zero(ngram, tokens):  # noqa: F811
    for seed, options in enumerate(OPTIONS * 3):
        log_probs, lens = emissions(batch=3, seed=seed)
        found = [
            ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=6, engine=engine, **options), tokens,
                              [LodrFusion(ngram, 1.5)]) for engine in ("native", "torch")]
        for one, other in zip(*found):
            assert one[0].tokens == other[0].tokens
            assert one[0].scores == pytest.approx(other[0].scores, abs=2e-3)
        bare = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=6), tokens)
        nothing = LodrFusion(ngram, 0.0)
        zero = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=6), tokens, [nothing])
        assert [[(h.tokens, h.total) for h in nbest] for nbest in bare] == [
            [(h.tokens, h.total) for h in nbest] for nbest in zero]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same(llm, ngram, tokens):  # noqa: F811
    log_probs, lens = emissions(batch=4, seed=2)

    def decode(device):
        fusions = [NgramFusion(ngram, 0.3), DelayedFusion(llm, 0.4, 0.5, look_ahead=LookAhead(ngram))]
        options = PrefixSearchOptions(beam=4)
        return ctc_prefix_search(log_probs.to(device), lens.to(device), options, tokens, fusions)

    for here, there in zip(decode("cpu"), decode("cuda")):  # of all but the last: it may tie with one pruned
        assert here[0].tokens == there[0].tokens
        assert here[0].scores == pytest.approx(there[0].scores, abs=1e-3, rel=1e-5)
        totals = [[hypothesis.total for hypothesis in nbest][:-1] for nbest in (here, there)]
        assert totals[0] == pytest.approx(totals[1], abs=2e-3, rel=1e-5)
    assert_same(*(rescore_with_ngram(decode("cpu"), ngram.to(device)) for device in ("cpu", "cuda")))


def test_tables_of_compiled_search_are_made_before_the_first_batch(ngram):
    fresh = PieceNgram(ngram.size, ngram.orders, "fresh")
    native_search.prepare_ngram(fresh)
    assert fresh in native_search._TABLES


def test_weight_zero_is_no_lm_bit_for_bit(llm, ngram, tokens):  # noqa: F811
    log_probs, lens = emissions(batch=5)
    options = PrefixSearchOptions(beam=6)
    bare = ctc_prefix_search(log_probs, lens, options, tokens)
    for fusions in ([DelayedFusion(llm, 0.0, look_ahead=LookAhead(ngram))], [NgramFusion(ngram, 0.0)]):
        fused = ctc_prefix_search(log_probs, lens, options, tokens, fusions)
        for one, other in zip(bare, fused):
            assert [(h.tokens, h.scores["ctc"], h.total) for h in one] == [
                (h.tokens, h.scores["ctc"], h.total) for h in other
            ]


def test_bad_input_is_named(llm, ngram, tokens):  # noqa: F811
    with pytest.raises(ValueError, match="LookAhead.scale must be finite and above 0, but is 0"):
        LookAhead(ngram, 0)
    with pytest.raises(ValueError, match="LookAhead.every must be an integer, at least 1"):
        LookAhead(ngram, every=0)
    with pytest.raises(ValueError, match="LookAhead.ngram must be a PieceNgram"):
        LookAhead("pieces.arpa")
    with pytest.raises(ValueError, match="DelayedFusion.look_ahead must be None or a LookAhead"):
        DelayedFusion(llm, 0.5, look_ahead=ngram)
    other = PieceNgram(3, [NgramOrder(1, torch.arange(5), torch.zeros(5), torch.zeros(5))], "small")
    log_probs, lens = emissions(batch=1)
    with pytest.raises(ValueError, match="tokens must be passed to the search for an n-gram"):
        ctc_prefix_search(log_probs, lens, None, None, [NgramFusion(ngram, 0.5)])
    for fusion in (NgramFusion(other, 0.5), DelayedFusion(llm, 0.5, look_ahead=LookAhead(other))):
        with pytest.raises(ValueError, match="n-gram small must be over 13 acoustic pieces, but is 3"):
            ctc_prefix_search(log_probs, lens, None, tokens, [fusion])
