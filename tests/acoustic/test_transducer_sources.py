"""Transducers of icefall in the published form: TorchScript, streaming too, ONNX triples; ours as those.
Knows: sources, tiny real models in the files that icefall writes. Must not know: search, fusion.
"""
from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import List, Tuple  # TorchScript reads these

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.models import CtcAed, ModelOptions, TransducerOptions, load, save
from icefall_fusion.acoustic.sherpa_export import export_sherpa
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.data.fbank import extract_frames
from icefall_fusion.text.tokens import AcousticTokens

LENS = (203, 150, 37, 9, 64)


def ours(folder: Path, heads: tuple[str, ...] = ("ctc", "aed", "transducer"), seed: int = 1) -> Path:
    """Write a tiny model with some heads."""
    base = load(tiny.acoustic_model(folder / "base"))
    options = dataclasses.replace(
        base.options, heads=heads, transducer=TransducerOptions(predictor_size=16, joiner_size=20)
    )
    torch.manual_seed(seed)
    model = CtcAed(options, base.bpe).eval()
    with torch.no_grad():
        if model.transducer is not None:
            model.transducer.joiner.output_linear.weight.mul_(6)  # decided enough to say pieces
    save(model, folder / "model")
    return folder / "model"


def features(lens=LENS) -> list[Tensor]:
    torch.manual_seed(7)
    return [torch.randn(length, 80) * 3 - 8 for length in lens]


def same_one_by_one(source, inputs: list[Tensor]):
    ids = [f"u{row}" for row in range(len(inputs))]
    made = source.emit(ids, inputs)
    for row, one in enumerate(inputs):
        alone, frames = source.emit([ids[row]], [one]), int(made.lens[row])
        assert int(alone.lens[0]) == frames
        torch.testing.assert_close(alone.joiner_frames[0, :frames], made.joiner_frames[row, :frames],
                                   atol=1e-4, rtol=1e-4)
    return made


# --- our checkpoint -----------------------------------------------------------------------------------


@torch.no_grad()
def test_our_model_gives_both_heads(tmp_path) -> None:
    folder = ours(tmp_path)
    source, model = open_source(EmissionOptions(str(folder))), load(folder)
    assert source.has_ctc and source.model is source.network
    made = same_one_by_one(source, features())
    encoder_out, lens = model.encoder(features()[0][None], torch.tensor([LENS[0]]))
    wanted = model.transducer.project(encoder_out)[0]
    torch.testing.assert_close(made.joiner_frames[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.log_probs[0], model.ctc_log_probs(encoder_out)[0], atol=1e-4, rtol=1e-4)
    assert made.lens[0] == lens[0]
    part = made.select([2, 1])
    assert torch.equal(part.joiner_frames[1], made.joiner_frames[1, : int(made.lens[1])])
    none = source.emit(["a", "b"], [torch.zeros(0, 80)] * 2)
    assert none.joiner_frames.shape == (2, 0, 20)


def test_heads_that_a_model_lacks_are_none(tmp_path) -> None:
    source = open_source(EmissionOptions(str(ours(tmp_path / "a", ("transducer",)))))
    assert not source.has_ctc and source.model is None
    made = source.emit(["u"], features((40,)))
    assert made.log_probs.shape == (1, 10, tiny.piece_count()) and bool((made.log_probs == -math.inf).all())
    assert made.joiner_frames.shape == (1, 10, 20)
    plain = open_source(EmissionOptions(str(ours(tmp_path / "b", ("ctc",)))))
    assert plain.transducer is None and plain.emit(["u"], features((40,))).joiner_frames is None


# --- TorchScript, as icefall's export.py writes it ----------------------------------------------------


class Decoder(nn.Module):
    """icefall's stateless predictor, with its attributes and its way with ids below zero."""

    def __init__(self, size: int, dim: int = 16, older: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim, padding_idx=0 if older else None)
        self.blank_id, self.context_size, self.vocab_size, self.older = 0, 2, size, older
        self.conv = nn.Conv1d(dim, dim, kernel_size=2, groups=dim // 4, bias=False)

    def forward(self, y: Tensor, need_pad: bool = True) -> Tensor:
        if self.older:
            out = self.embedding(y)
        else:
            out = self.embedding(y.clamp(min=0)) * (y >= 0).unsqueeze(-1)
        out = out.permute(0, 2, 1)
        if need_pad:
            out = F.pad(out, (1, 0))
        return F.relu(self.conv(out).permute(0, 2, 1))


class Joiner(nn.Module):
    def __init__(self, size: int, encoder_dim: int) -> None:
        super().__init__()
        self.encoder_proj, self.decoder_proj = nn.Linear(encoder_dim, 20), nn.Linear(16, 20)
        self.output_linear = nn.Linear(20, size)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        assert encoder_out.ndim == decoder_out.ndim
        if project_input:
            logit = self.encoder_proj(encoder_out) + self.decoder_proj(decoder_out)
        else:
            logit = encoder_out + decoder_out
        return self.output_linear(torch.tanh(logit))


class Encoder(nn.Module):
    """Two convolutions that lose frames at the edges, as icefall's subsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(80, 24, 5, stride=2)
        self.second = nn.Conv1d(24, 24, 3, stride=2)

    def forward(self, features: Tensor, feature_lengths: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        x = self.second(self.conv(features.transpose(1, 2)).relu()).transpose(1, 2)
        half = torch.div(feature_lengths - 3, 2, rounding_mode="floor")
        return x, torch.div(half - 1, 2, rounding_mode="floor")


class StreamingEncoder(nn.Module):
    """A chunk of frames of 20 ms with what is before it as state, in the shape of icefall's."""

    def __init__(self, chunk_size: int = 16) -> None:
        super().__init__()
        self.chunk_size, self.pad_length = chunk_size, 13
        self.conv = nn.Conv1d(80, 24, 14, stride=4)
        self.mix = nn.Linear(24, 24)

    def forward(
        self, features: Tensor, feature_lengths: Tensor, states: List[Tensor]  # noqa: UP006
    ) -> Tuple[Tensor, Tensor, List[Tensor]]:  # noqa: UP006
        x = self.conv(features.transpose(1, 2)).transpose(1, 2)
        frames = self.chunk_size // 2
        assert x.size(1) == frames
        sums = states[0].unsqueeze(1) + self.mix(x).cumsum(1)  # of all frames so far
        lens = torch.full_like(feature_lengths, frames)
        return torch.tanh(x + 0.01 * sums), lens, [sums[:, -1], states[1] + frames]

    @torch.jit.export
    def get_init_states(
        self, batch_size: int = 1, device: torch.device = torch.device("cpu")  # noqa: B008
    ) -> List[Tensor]:  # noqa: UP006
        return [torch.zeros(batch_size, 24, device=device),
                torch.zeros(batch_size, dtype=torch.int32, device=device)]


class Export(nn.Module):
    def __init__(self, size: int, encoder: nn.Module, older: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder, self.joiner = encoder, Decoder(size, older=older), Joiner(size, 24)


@pytest.fixture
def bpe(tmp_path) -> Path:
    return tiny.write_bpe(tmp_path / "lang").parent


def write(export: nn.Module, folder: Path, name: str = "jit_script.pt") -> str:
    torch.jit.script(export).save(str(folder / name))
    return str(folder / name)


@torch.no_grad()
def test_a_torchscript_transducer(bpe) -> None:
    torch.manual_seed(3)
    export = Export(tiny.piece_count(), Encoder()).eval()
    source = open_source(EmissionOptions(write(export, bpe)))
    transducer = source.transducer
    assert not source.has_ctc and source.frame_shift == 0.04
    assert (transducer.context_size, transducer.vocab_size, transducer.blank_id) == (2, tiny.piece_count(), 0)
    assert transducer.start == (-1, 0)
    made = same_one_by_one(source, features())
    out, lens = export.encoder(features()[0][None], torch.tensor([203]))
    assert int(made.lens[0]) == int(lens)
    contexts = torch.tensor([[-1, 0], [4, 9]])
    joined = transducer.join(made.joiner_frames[0, :2], transducer.predict(contexts))
    wanted = export.joiner(out[0, :2], export.decoder(contexts, False)[:, 0]).log_softmax(-1)
    torch.testing.assert_close(joined, wanted, atol=1e-5, rtol=1e-5)
    wide = transducer.join(made.joiner_frames[0, :3, None], transducer.predict(contexts)[None])
    torch.testing.assert_close(wide[:2].diagonal(dim1=0, dim2=1).T, wanted, atol=1e-5, rtol=1e-5)


def test_a_torchscript_model_may_have_both_heads_and_older_ones_start_with_blanks(bpe) -> None:
    export = Export(tiny.piece_count(), Encoder(), older=True).eval()
    export.ctc_output = nn.Sequential(nn.Linear(24, tiny.piece_count()), nn.LogSoftmax(dim=-1))
    source = open_source(EmissionOptions(write(export, bpe)))
    assert source.has_ctc and source.transducer.start == (0, 0)
    made = source.emit(["u"], features((100,)))
    torch.testing.assert_close(made.log_probs.exp().sum(-1), torch.ones(made.log_probs.shape[:2]))


@torch.no_grad()
def test_a_streaming_torchscript_transducer_hears_whole_utterances(bpe) -> None:
    torch.manual_seed(3)
    export = Export(tiny.piece_count(), StreamingEncoder()).eval()
    source = open_source(EmissionOptions(write(export, bpe, "jit_script_chunk_16_left_128.pt")))
    made = same_one_by_one(source, features())
    assert source.frame_shift == 0.04
    x = F.pad(features()[0], (0, 0, 0, 200), value=math.log(1e-10))[None]
    states, outs = export.encoder.get_init_states(), []
    for chunk in range(7):  # 203 frames and 30 of silence: the seventh chunk sees 192..236
        window = x[:, 32 * chunk : 32 * chunk + 45]
        out, _, states = export.encoder(window, torch.tensor([45]), states)
        outs.append(out)
    assert int(made.lens[0]) == 56
    torch.testing.assert_close(made.joiner_frames[0, :56], export.joiner.encoder_proj(torch.cat(outs, 1)[0]))


@pytest.mark.parametrize("chunk", [8, 64, 72, 96, 120, 200])
def test_the_frame_shift_of_a_streaming_encoder_does_not_depend_on_its_chunks(bpe, chunk) -> None:
    """Its last chunk is filled up, so ten seconds have more frames than 250."""
    export = Export(tiny.piece_count(), StreamingEncoder(chunk)).eval()
    assert open_source(EmissionOptions(write(export, bpe))).frame_shift == 0.04


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_older_model_is_known_on_a_gpu_too(bpe) -> None:
    """It has never run on a GPU. An index below zero there would end all work on the device."""
    path = write(Export(tiny.piece_count(), Encoder(), older=True).eval(), bpe)
    assert open_source(EmissionOptions(path, device="cuda")).transducer.start == (0, 0)
    assert float(torch.ones(3, device="cuda").sum()) == 3.0


def test_broken_torchscript_transducers_are_refused(bpe) -> None:
    size = tiny.piece_count()
    export = Export(size, Encoder())
    del export.joiner
    with pytest.raises(ValueError, match=r"decoder and joiner, but .* lacks \['ctc_output', 'joiner'\]"):
        open_source(EmissionOptions(write(export, bpe)))
    with pytest.raises(ValueError, match=f"vocabulary has {size} pieces, but .*jit_script.pt has {size + 1}"):
        open_source(EmissionOptions(write(Export(size + 1, Encoder()), bpe)))
    export = Export(size, Encoder())
    export.decoder.blank_id = 3
    with pytest.raises(ValueError, match="blank of .*must be 0, but is 3"):
        open_source(EmissionOptions(write(export, bpe)))


# --- ONNX ---------------------------------------------------------------------------------------------


def export_onnx(export: Export, folder: Path, suffix: str = "-epoch-30-avg-9", **changes) -> Path:
    """Write the files that icefall's ``export-onnx.py`` writes, by its calls and names."""
    onnx = pytest.importorskip("onnx")

    class OnnxEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.encoder_proj = export.encoder, export.joiner.encoder_proj

        def forward(self, x, x_lens):
            out, lens = self.encoder(x, x_lens)
            return self.encoder_proj(out), lens

    class OnnxStreamingEncoder(OnnxEncoder):
        def forward(self, x, *states):
            out, _, states = self.encoder(x, torch.full((len(x),), 45), list(states))
            return self.encoder_proj(out), *states

    class OnnxDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.decoder_proj = export.decoder, export.joiner.decoder_proj

        def forward(self, y):
            return self.decoder_proj(self.decoder(y, need_pad=False).squeeze(1))

    class OnnxJoiner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output_linear = export.joiner.output_linear

        def forward(self, encoder_out, decoder_out):
            return self.output_linear(torch.tanh(encoder_out + decoder_out))

    encoder = (
        "encoder", OnnxEncoder(), (torch.zeros(1, 100, 80), torch.tensor([100])), ["x", "x_lens"],
        ["encoder_out", "encoder_out_lens"],
        {"x": {0: "N", 1: "T"}, "x_lens": {0: "N"},
         "encoder_out": {0: "N", 1: "T"}, "encoder_out_lens": {0: "N"}},
        {"model_type": "zipformer2", "version": "1"},
    )
    if isinstance(export.encoder, StreamingEncoder):
        states = {"cached_sum_0": {0: "N"}, "processed_lens": {0: "N"}}
        encoder = (
            "encoder", OnnxStreamingEncoder(),
            (torch.zeros(1, 45, 80), torch.zeros(1, 24), torch.zeros(1, dtype=torch.int64)), ["x", *states],
            ["encoder_out", *(f"new_{name}" for name in states)],
            {"x": {0: "N"}, "encoder_out": {0: "N"}, **states, **{f"new_{n}": v for n, v in states.items()}},
            {"model_type": "zipformer2", "decode_chunk_len": "32", "T": "45"},
        )
    made = (
        encoder,
        ("decoder", OnnxDecoder(), torch.zeros(10, 2, dtype=torch.int64), ["y"], ["decoder_out"],
         {"y": {0: "N"}, "decoder_out": {0: "N"}},
         {"context_size": "2", "vocab_size": str(export.decoder.vocab_size)}),
        ("joiner", OnnxJoiner(), (torch.rand(11, 20), torch.rand(11, 20)), ["encoder_out", "decoder_out"],
         ["logit"], {"encoder_out": {0: "N"}, "decoder_out": {0: "N"}, "logit": {0: "N"}},
         {"joiner_dim": "20"}),
    )
    for name, module, example, inputs, outputs, axes, metadata in made:
        path = folder / f"{name}{suffix}.onnx"
        torch.onnx.export(module.eval(), example, str(path), opset_version=13, dynamo=False, verbose=False,
                          input_names=inputs, output_names=outputs, dynamic_axes=axes)
        model = onnx.load(str(path))
        for key, value in {**metadata, **changes.get(name, {})}.items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
        onnx.save(model, str(path))
    pieces = AcousticTokens.load(tiny.write_bpe(folder / "lang")).pieces
    lines = [f"{piece} {index}" for index, piece in enumerate([*pieces, "#0", "#1"])]
    (folder / "tokens.txt").write_text("\n".join(lines) + "\n")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("older", [False, True])
def test_an_onnx_transducer_of_icefall(tmp_path, older) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(4)
    export = Export(tiny.piece_count(), Encoder(), older=older).eval()
    folder = export_onnx(export, tmp_path)
    source = open_source(EmissionOptions(str(folder)))
    transducer = source.transducer
    assert not source.has_ctc and source.frame_shift == 0.04 and source.tokens.size == tiny.piece_count()
    assert (transducer.context_size, transducer.vocab_size, transducer.blank_id) == (2, tiny.piece_count(), 0)
    assert transducer.start == ((0, 0) if older else (-1, 0))
    made = same_one_by_one(source, features())
    out, lens = export.encoder(features()[0][None], torch.tensor([203]))
    torch.testing.assert_close(made.joiner_frames[0, : int(lens)], export.joiner.encoder_proj(out)[0],
                               atol=1e-4, rtol=1e-4)
    contexts = torch.tensor([[0, 0], [4, 9]])
    joined = transducer.join(made.joiner_frames[0, :2], transducer.predict(contexts))
    wanted = export.joiner(out[0, :2], export.decoder(contexts, False)[:, 0]).log_softmax(-1)
    torch.testing.assert_close(joined, wanted, atol=1e-4, rtol=1e-4)
    wide = transducer.join(made.joiner_frames[0, :2, None], transducer.predict(contexts)[None])
    torch.testing.assert_close(wide.diagonal(dim1=0, dim2=1).T, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_streaming_onnx_transducer_equals_the_torchscript_one(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(3)
    export = Export(tiny.piece_count(), StreamingEncoder()).eval()
    folder = export_onnx(export, tmp_path)
    scripted = write(export, tiny.write_bpe(tmp_path / "jit").parent)
    mine, theirs = (open_source(EmissionOptions(path)) for path in (scripted, str(folder)))
    made, wanted = same_one_by_one(theirs, features()), mine.emit(list("abcde"), features())
    assert made.lens.tolist() == wanted.lens.tolist() and theirs.frame_shift == 0.04
    torch.testing.assert_close(made.joiner_frames, wanted.joiner_frames, atol=1e-4, rtol=1e-4)


def test_one_of_several_models_in_a_folder_is_named_by_its_encoder(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    export = Export(tiny.piece_count(), Encoder()).eval()
    folder = export_onnx(export, tmp_path)
    for part in ("encoder", "decoder", "joiner"):
        shutil.copy(folder / f"{part}-epoch-30-avg-9.onnx", folder / f"{part}-epoch-30-avg-9.int8.onnx")
    open_source(EmissionOptions(str(folder)))  # the one that is not int8
    open_source(EmissionOptions(str(folder / "encoder-epoch-30-avg-9.int8.onnx")))
    shutil.copy(folder / "encoder-epoch-30-avg-9.onnx", folder / "encoder-epoch-20-avg-9.onnx")
    with pytest.raises(ValueError, match=r"hold one encoder\*.onnx .*epoch-20-avg-9.onnx"):
        open_source(EmissionOptions(str(folder)))
    with pytest.raises(FileNotFoundError, match="decoder-epoch-20-avg-9.onnx is missing"):
        open_source(EmissionOptions(str(folder / "encoder-epoch-20-avg-9.onnx")))


def test_onnx_files_that_do_not_belong_together_are_refused(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    size = tiny.piece_count()
    (tmp_path / "good").mkdir()
    folder = export_onnx(Export(size, Encoder()).eval(), tmp_path / "good")
    options = EmissionOptions(str(folder))
    decoder, joiner = folder / "decoder-epoch-30-avg-9.onnx", folder / "joiner-epoch-30-avg-9.onnx"
    content = decoder.read_bytes()
    decoder.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="decoder-epoch-30-avg-9.onnx cannot be loaded as an ONNX model"):
        open_source(options)
    decoder.unlink()
    with pytest.raises(FileNotFoundError, match="decoder.onnx is missing"):
        open_source(options)
    shutil.copy(joiner, decoder)
    with pytest.raises(ValueError, match=r"decoder-.*must have the inputs \['y'\]"):
        open_source(options)
    (tmp_path / "other").mkdir()
    other = export_onnx(Export(size + 1, Encoder()).eval(), tmp_path / "other")
    shutil.copy(other / decoder.name, decoder)
    with pytest.raises(ValueError, match=f"has {size} pieces, but .*{decoder.name} has {size + 1}"):
        open_source(options)
    decoder.write_bytes(content)
    lang = dataclasses.replace(options, tokens=str(folder / "lang"))
    assert open_source(lang).tokens.processor is not None
    table = folder / "tokens.txt"
    piece = open_source(lang).tokens.pieces[9]
    table.write_text(table.read_text().replace(f"{piece} 9\n", f"{piece}x 9\n"))
    with pytest.raises(ValueError, match=f"tokens.txt must hold the pieces of .*lang.*'{piece}x', '{piece}'"):
        open_source(lang)
    table.unlink()
    with pytest.raises(FileNotFoundError, match="must name a bpe.model, tokens.txt"):
        open_source(options)
    open_source(lang)


# --- ours as ONNX -------------------------------------------------------------------------------------


@torch.no_grad()
def test_our_export_for_sherpa_equals_the_model(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    folder = ours(tmp_path)
    out = str(tmp_path / "onnx")
    assert main(["export", "--model", str(folder), "--format", "sherpa", "--out", out]) == 0
    mine, theirs = (open_source(EmissionOptions(str(path))) for path in (folder, tmp_path / "onnx"))
    assert theirs.tokens.pieces == mine.tokens.pieces and theirs.transducer.start == (-1, 0)
    ids = [str(length) for length in LENS]
    wanted, found = mine.emit(ids, features()), theirs.emit(ids, features())
    assert found.lens.tolist() == wanted.lens.tolist()
    contexts = torch.tensor([[-1, 0], [0, 3], [5, 5]])
    states = [source.transducer.predict(contexts) for source in (mine, theirs)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)
    for row, frames in enumerate(wanted.lens.tolist()):
        both = [source.transducer.join(made.joiner_frames[row, :frames, None], state)
                for source, made, state in zip((mine, theirs), (wanted, found), states)]
        torch.testing.assert_close(*both, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_a_folder_to_ship_has_no_weights_of_the_loss_and_says_the_same(tmp_path) -> None:
    folder, out = ours(tmp_path), tmp_path / "ship"
    assert main(["export", "--model", str(folder), "--format", "folder", "--out", str(out)]) == 0
    made, source = load(out), load(folder)
    lacking = set(source.state_dict()) - set(made.state_dict())
    assert {name.rpartition(".")[0] for name in lacking} == {
        "transducer.simple_am_proj", "transducer.simple_lm_proj"}
    assert made.tokens.pieces == source.tokens.pieces and made.transducer.options.prune_range == 0
    one, other = (open_source(EmissionOptions(str(path))).emit(["u"], features((90,)))
                  for path in (folder, out))
    torch.testing.assert_close(one.log_probs, other.log_probs, atol=0.1, rtol=0)
    torch.testing.assert_close(one.joiner_frames, other.joiner_frames, atol=0.02, rtol=0)
    assert main(["export", "--model", str(tiny.acoustic_model(tmp_path / "other")), "--format", "folder",
                 "--out", str(out)]) == 2


def test_only_transducers_are_exported(tmp_path, capsys) -> None:
    folder = tiny.acoustic_model(tmp_path)
    assert main(["export", "--model", str(folder), "--out", str(tmp_path / "onnx")]) == 2
    assert "ExportOptions.model must have a transducer head, but is ['ctc', 'aed']" in capsys.readouterr().err
    model = load(ours(tmp_path / "other"))
    model.transducer.blank_id = 3
    with pytest.raises(ValueError, match="ExportOptions.model must have blank 0, .*but is 3"):
        export_sherpa(model, str(tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


def test_old_configurations_keep_their_heads() -> None:
    assert ModelOptions.from_dict({"vocab_size": 40}).heads == ("ctc", "aed")


@torch.no_grad()
def test_sherpa_onnx_says_what_our_model_says(tmp_path) -> None:
    """By greedy search; its features and ours differ in the last digits, so the model is a decided one."""
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    pytest.importorskip("onnx")
    model = load(ours(tmp_path))
    export_sherpa(model, str(tmp_path / "onnx"))
    names = {part: str(tmp_path / "onnx" / f"{part}.onnx") for part in ("encoder", "decoder", "joiner")}
    recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
        **names, tokens=str(tmp_path / "onnx" / "tokens.txt"), num_threads=1, decoding_method="greedy_search"
    )
    said = []
    for seed in range(3):
        samples = 0.1 * torch.randn(24_000, generator=torch.Generator().manual_seed(seed))
        stream = recognizer.create_stream()
        stream.accept_waveform(16_000, samples.numpy())
        recognizer.decode_stream(stream)
        heard = extract_frames(samples.numpy())[None]
        frames, lens = model.encoder(heard, torch.tensor([heard.shape[1]]))
        pieces = model.transducer.greedy(model.transducer.project(frames), lens)[0]
        theirs = [token.replace(" ", "▁") for token in stream.result.tokens]
        assert theirs == [model.tokens.pieces[piece] for piece in pieces]
        said += pieces
    assert len(set(said)) > 2
