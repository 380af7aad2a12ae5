"""Transducers in the files that icefall and sherpa-onnx publish, by the methods rnnt-*; sherpa-onnx's text.
Knows: jobs, stand-ins of those files. Must not know: how a search works.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from job_tools import arguments, assert_same, lists

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.data.audio import load_audio
from icefall_fusion.decode.recognizer import Recognizer, RecognizerOptions
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.search import PrefixSearchOptions
from tests.acoustic.test_transducer_sources import (
    Encoder,
    Export,
    StreamingEncoder,
    export_onnx,
    ours,
    write,
)

METHODS = "rnnt-greedy,rnnt-beam,rnnt-llm-delayed-shortest,rnnt-llm-nbest-rescoring"


def stand_in(folder: Path, kind: str) -> str:
    """Write a small model as icefall publishes it and return what `--emissions.model` is."""
    folder.mkdir()
    torch.manual_seed(6)
    encoder = StreamingEncoder() if "streaming" in kind else Encoder()
    export = Export(tiny.piece_count(), encoder).eval()
    with torch.no_grad():
        export.joiner.output_linear.weight.mul_(6)  # hypotheses shall have words
    if "onnx" in kind:
        pytest.importorskip("onnxruntime")
        return str(export_onnx(export, folder))
    return write(export, tiny.write_bpe(folder).parent)


@pytest.mark.parametrize("kind", ["jit", "streaming jit", "onnx", "streaming onnx"])
def test_published_files_are_decoded_with_an_llm(made, tmp_path, kind) -> None:
    models = {**made, "model": stand_in(tmp_path / "model", kind)}
    assert main(arguments(models, tmp_path / "out", "--methods", METHODS)) == 0
    beam, fused = (lists(tmp_path / "out", m) for m in ("rnnt-beam", "rnnt-llm-delayed-shortest"))
    assert any(nbest[0].text for nbest in beam.values())
    assert all({"rnnt", "llm"} <= set(nbest[0].scores) for nbest in fused.values())


def test_both_kinds_of_files_give_the_same_lists(made, tmp_path) -> None:
    for kind in ("jit", "onnx"):
        models = {**made, "model": stand_in(tmp_path / kind, kind)}
        methods = ("--methods", "rnnt-beam,rnnt-llm-delayed-shortest")
        assert main(arguments(models, tmp_path / f"{kind}-out", *methods)) == 0
    for method in ("rnnt-beam", "rnnt-llm-delayed-shortest"):
        assert_same(*(lists(tmp_path / f"{kind}-out", method) for kind in ("jit", "onnx")))


def test_log_probs_of_a_transducer_are_not_saved(made, tmp_path, capsys) -> None:
    models = {**made, "model": stand_in(tmp_path / "model", "jit")}
    more = ("--methods", "rnnt-greedy", "--save_emissions", str(tmp_path / "kept"))
    assert main(arguments(models, tmp_path / "out", *more)) == 2
    assert "save_emissions must be left out for a model without a CTC head" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_sherpa_onnx_finds_what_our_beam_finds(made, tmp_path) -> None:
    """Its ``modified_beam_search`` ranks hypotheses by the score a piece, those of the context included."""
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    pytest.importorskip("onnx")
    folder, out = ours(tmp_path), tmp_path / "onnx"
    assert main(["export", "--model", str(folder), "--out", str(out)]) == 0
    search = PrefixSearchOptions(beam=4, nbest=4)
    recognizer = Recognizer(RecognizerOptions(EmissionOptions(str(folder)), search=search), "rnnt-beam")
    names = {part: str(out / f"{part}.onnx") for part in ("encoder", "decoder", "joiner")}
    theirs = sherpa_onnx.OfflineRecognizer.from_transducer(
        **names, tokens=str(out / "tokens.txt"), decoding_method="modified_beam_search", max_active_paths=4
    )
    said, pieces = set(), recognizer.source.tokens.pieces
    for nbest in recognizer.transcribe(read_cuts(made["cuts"], recognizer.source.wants)):
        stream = theirs.create_stream()
        stream.accept_waveform(16_000, load_audio(Path(made["cuts"]).parent / f"{nbest.utterance}.flac"))
        theirs.decode_stream(stream)
        best = max(nbest, key=lambda h: h.scores["rnnt"] / (len(h.tokens) + 2))
        assert [token.replace(" ", "▁") for token in stream.result.tokens] == [pieces[t] for t in best.tokens]
        said.update(best.tokens)
    assert len(said) > 2
