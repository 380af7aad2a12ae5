"""The compiled prefix search: the same as by tensors, whatever is asked of it; how it is built.
Knows: search. Must not know: large language models.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_tools import TOKENS, Bigram, WordLengths, assert_same, emissions, listing, search

from icefall_fusion.common import native_build
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.fusion import NgramFusion
from icefall_fusion.ngram.piece_ngram import NgramOrder, PieceNgram
from icefall_fusion.search.engines import native as native_engine


@pytest.fixture(autouse=True)
def forget_the_library():
    native_build.load_native.cache_clear()
    yield
    native_build.load_native.cache_clear()


def both(log_probs, lens=None, tokens=None, fusions=lambda: (), **options):
    return [
        search(log_probs, lens, tokens, fusions(), engine=name, **options) for name in ("native", "torch")
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pieces=st.sampled_from([2, 3, 17, 33, 64, 501]),
    frames=st.integers(0, 60),
    beam=st.sampled_from([1, 2, 7, 16, 60]),
    recover=st.booleans(),
    sharpness=st.floats(0.1, 6.0),
    top=st.sampled_from([None, 1, 5, 40]),
    skip=st.sampled_from([None, 0.6, 0.95]),
    blank=st.booleans(),
    score_beam=st.sampled_from([None, 3.0, 12.0]),
    share=st.sampled_from([0.0, 0.3]),
)
def test_equals_the_search_by_tensors(
    seed, pieces, frames, beam, recover, sharpness, top, skip, blank, score_beam, share
):
    blank_id = pieces - 1 if blank else 0
    log_probs = emissions(seed, 3, frames, pieces, sharpness, 4.0, blank_id)
    generator = torch.Generator().manual_seed(seed)
    never = torch.rand(log_probs.shape, generator=generator) < share
    never[..., blank_id] = False
    log_probs = log_probs.masked_fill(never, -math.inf)
    lens = torch.tensor([frames, frames // 2, max(0, frames - 1)])
    native, tensors = both(
        log_probs,
        lens,
        blank_id=blank_id,
        beam=beam,
        recover_mass=recover,
        top_pieces=top,
        blank_skip=skip,
        score_beam=score_beam,
    )
    for found, expected in zip(native, tensors):
        (best, top_score), *_ = found = listing(found)
        expected = listing(expected)
        assert best == expected[0][0]
        # recovered masses below 1e-30 of the best are forgotten; the last of a beam may tie with the next
        kept = [[score for _, score in scores if score > top_score - 40] for scores in (found, expected)]
        assert abs(len(kept[0]) - len(kept[1])) <= 1
        most = max(1, min(map(len, kept)) - 1)
        assert kept[0][:most] == pytest.approx(kept[1][:most], abs=2e-3)


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize(
    "fusions",
    [lambda: [WordLengths(0.3, 0.2, 3)], lambda: [WordLengths(0.0)], lambda: [WordLengths(60.0, 0.0, 2)]],
)
def test_delayed_fusion_equals_that_of_tensors(fusions, recover):
    log_probs = emissions(5, 4, 120, 6, blank_bias=3.0)
    lens = torch.tensor([120, 77, 0, 31])
    native, tensors = both(log_probs, lens, TOKENS, fusions, beam=9, recover_mass=recover)
    for found, expected in zip(native, tensors):
        assert_same(
            [(tuple(h.tokens), h.total) for h in found], [(tuple(h.tokens), h.total) for h in expected], 1e-2
        )
        assert [h.times for h in found] == [h.times for h in expected]
        assert [h.scores["lengths"] for h in found] == [h.scores["lengths"] for h in expected]


def test_threads_change_nothing():
    log_probs = emissions(6, 7, 90, 40)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = search(log_probs, engine="native", recover_mass=True)
        torch.set_num_threads(3)
        together = search(log_probs, engine="native", recover_mass=True)
    finally:
        torch.set_num_threads(before)
    assert [listing(found) for found in alone] == [listing(found) for found in together]


def test_long_audio_does_not_run_out_of_numbers():
    log_probs = emissions(7, 1, 300, 30, 1.0).repeat(1, 20, 1)
    native, tensors = both(log_probs, beam=4, recover_mass=True, word_times=False)
    assert math.isfinite(native[0][0].total)
    assert native[0][0].total == pytest.approx(tensors[0][0].total, rel=1e-4)


def test_pieces_that_are_next_to_impossible_count():
    log_probs = torch.full((1, 6, 5), -600.0)
    log_probs[..., 0] = -1e-7
    native, tensors = both(log_probs, beam=3)
    assert len(native[0]) == 3
    assert [h.total for h in native[0]] == pytest.approx([h.total for h in tensors[0]], abs=1e-3)


# -- building it


def test_shallow_fusion_and_other_devices_are_for_tensors():
    log_probs = emissions(8, 1, 5, 6)
    with pytest.raises(ValueError, match="must be auto or torch: it has no shallow fusion .* .bigram."):
        search(log_probs, tokens=TOKENS, fusions=[Bigram(0.5)], engine="native")
    with pytest.raises(ValueError, match="PrefixSearchOptions.engine"):
        search(log_probs, engine="fast")


def test_without_a_compiler_tensors_search_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    log_probs = emissions(9, 2, 20, 6)
    with pytest.raises(ValueError, match="there is no C.. compiler"):
        search(log_probs, engine="native")
    assert listing(search(log_probs, engine="auto")[0]) == listing(search(log_probs, engine="torch")[0])
    assert "there is no C++ compiler" in caplog.text


def test_a_compiler_that_fails_is_told_with_what_it_said(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ncase $1 in --version) echo 1;; *) echo out of luck >&2; exit 1;; esac\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("ICEFALL_FUSION_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Unavailable, match="out of luck"):
        native_build.load_native()
    assert not list((tmp_path / "cache").glob("*"))


def test_it_is_built_once_in_a_folder_that_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("ICEFALL_FUSION_CACHE", str(tmp_path))
    native_build.load_native()
    [built] = tmp_path.glob("icefall_fusion-*.so")
    before = built.stat().st_mtime_ns
    assert built.stat().st_mode & 0o777 == 0o644
    native_build.load_native.cache_clear()
    native_build.load_native()
    assert built.stat().st_mtime_ns == before
    monkeypatch.setenv("ICEFALL_FUSION_CACHE", "/proc/no-such-folder")  # not even root can write there
    native_build.load_native.cache_clear()
    native_build.load_native()


@pytest.mark.parametrize("kept", [0, 1000])
def test_a_library_that_was_cut_short_is_built_again(monkeypatch, tmp_path, kept):
    monkeypatch.setenv("ICEFALL_FUSION_CACHE", str(tmp_path))
    whole = native_build._build(native_build.compiler())
    content = whole.read_bytes()
    whole.write_bytes(content[:kept])
    native_build.load_native()
    assert whole.read_bytes() == content


def test_code_that_others_can_write_is_not_loaded(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("ICEFALL_FUSION_CACHE", str(tmp_path))
    built = native_build._build(native_build.compiler())
    built.chmod(0o666)
    again = native_build._build(native_build.compiler())
    assert again == built and again.stat().st_mode & 0o777 == 0o644  # another file under the same name
    tmp_path.chmod(0o777)
    elsewhere = native_build._build(native_build.compiler())
    assert elsewhere.parent != tmp_path and "other users can write there" in caplog.text


def test_a_compiler_may_have_options(monkeypatch, tmp_path):
    monkeypatch.setenv("ICEFALL_FUSION_CACHE", str(tmp_path))
    name = native_build.compiler()[0]
    monkeypatch.setenv("CXX", f"{name} -O1")
    assert native_build.compiler() == [name, "-O1"]
    native_build.load_native()


def test_no_exception_leaves_compiled_code():
    library = native_build.load_native()
    settings = native_engine._Settings(batch=2**60, beam=10, pieces=6, columns=5)
    with pytest.raises(MemoryError, match="compiled code"):
        library.prefix_search_open(ctypes.byref(settings))
    tree = library.token_tree_open(5)
    with pytest.raises(MemoryError, match="compiled code"):
        library.token_tree_bind(tree, 2**60, *[None] * 6)
    library.token_tree_close(tree)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype):
    log_probs = emissions(3, 2, 40, 6, blank_bias=2.0)
    fusions = lambda: [WordLengths(0.3, 0.2, 3)]  # noqa: E731
    options = [{}, {"recover_mass": True}, {"score_beam": 6.0}]
    usual = [both(log_probs, None, TOKENS, fusions, beam=5, **more) for more in options]
    torch.set_default_dtype(dtype)
    try:
        other = [both(log_probs, None, TOKENS, fusions, beam=5, **more) for more in options]
    finally:
        torch.set_default_dtype(torch.float32)
    for one, another in zip(usual, other):
        for nbests, changed in zip(one, another):
            assert [listing(nbest) for nbest in nbests] == [listing(nbest) for nbest in changed]


def test_masses_below_the_least_number_are_kept():
    """A word bonus may keep a prefix whose mass is 2^-1082 of what the best piece had."""
    ngram = PieceNgram(3, [NgramOrder(1, torch.arange(5), torch.full((5,), -1.0), torch.zeros(5))], "flat")
    tokens = type(TOKENS).from_pieces(["<blk>", "▁a", "b"], 0)
    log_probs = torch.tensor([[[0.0, -720.0, -780.0], [0.0, -5.0, -5.0]]])
    native, tensors = both(log_probs, None, tokens, lambda: [NgramFusion(ngram, 0.1, 2000.0)], beam=1)
    assert native[0][0].scores["ctc"] == pytest.approx(tensors[0][0].scores["ctc"], abs=1e-2)
    assert native[0][0].tokens == tensors[0][0].tokens == [1]


def test_processes_may_build_it_at_the_same_time(tmp_path):
    code = (
        "from icefall_fusion.common.native_build import load_native as f; print(f() is not None)"
    )
    environment = {"ICEFALL_FUSION_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": "."}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["True", "True"]
    assert len(list(tmp_path.iterdir())) == 1
