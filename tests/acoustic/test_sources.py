"""Log-probs of every kind of source: shapes, batch invariance, empty input, errors that name the utterance.
Knows: emissions and tiny real models. Must not know: search, fusion.
"""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Tuple  # TorchScript reads this one

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.acoustic.saved import SavedSource, read_vocabulary, save_emissions, save_vocabulary
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.data.features import PADDING
from icefall_fusion.text.tokens import AcousticTokens

PIECES = ["<blk>", "<sos/eos>", "<unk>", "▁", "▁a", "b", "▁c", "d"]
TOKENS = AcousticTokens.from_pieces(PIECES, blank_id=0)


def emissions(lens=(3, 5, 0), ids=("u1", "u2", "u3")) -> Emissions:
    torch.manual_seed(1)
    log_probs = torch.randn(len(lens), max(lens), len(PIECES)).log_softmax(2)
    return Emissions(list(ids), log_probs, torch.tensor(lens), TOKENS, 0.04)


def same_one_by_one(source, inputs: list[Tensor], atol: float) -> Emissions:
    ids = [f"u{i}" for i in range(len(inputs))]
    together = source.emit(ids, inputs)
    for row, (name, one) in enumerate(zip(ids, inputs)):
        alone = source.emit([name], [one])
        frames = int(alone.lens[0])
        assert frames == int(together.lens[row])
        mine = together.log_probs[row, :frames]
        torch.testing.assert_close(alone.log_probs[0, :frames], mine, atol=atol, rtol=0)
    mass = together.log_probs.exp().sum(2)
    assert all(torch.allclose(m[:n], torch.ones(n), atol=1e-4) for m, n in zip(mass, together.lens))
    return together


def test_nan_and_inf_name_the_utterance_but_minus_inf_is_legal() -> None:
    good = emissions()
    for value in (math.nan, math.inf):
        bad = good.log_probs.clone()
        bad[1, 4, 2] = value
        with pytest.raises(ValueError, match="utterance u2"):
            Emissions(good.ids, bad, good.lens, TOKENS, 0.04)
        outside = good.log_probs.clone()
        outside[0, 4, 2] = value  # beyond u1's three frames
        Emissions(good.ids, outside, good.lens, TOKENS, 0.04)
    legal = good.log_probs.clone()
    legal[1, 4, 2] = -math.inf
    Emissions(good.ids, legal, good.lens, TOKENS, 0.04)


def test_vocabulary_of_another_size_gives_both_sizes() -> None:
    with pytest.raises(ValueError, match="has 8 pieces, but the log-probs have 9"):
        Emissions(["u"], torch.zeros(1, 2, 9), torch.tensor([2]), TOKENS, 0.04)


def test_select_keeps_rows_and_drops_padding() -> None:
    made = emissions()
    part = made.select([2, 0])
    assert part.ids == ["u3", "u1"] and part.lens.tolist() == [0, 3] and part.log_probs.shape == (2, 3, 8)
    assert torch.equal(part.log_probs[1], made.log_probs[0, :3])
    assert made.select([2]).log_probs.shape == (1, 0, 8)


@pytest.mark.parametrize("half", [False, True])
def test_saved_log_probs_come_back(tmp_path, half) -> None:
    made = emissions()
    save_emissions(tmp_path / "a.npz", made.select([0, 1]), half)
    save_emissions(tmp_path / "b.npz", made.select([2]), half)
    source = SavedSource(tmp_path, TOKENS)
    assert source.ids == ["u1", "u2", "u3"] and source.frame_shift == 0.04
    back = source.emit(["u3", "u2"])
    assert back.lens.tolist() == [0, 5]
    torch.testing.assert_close(back.log_probs[1], made.log_probs[1], atol=2e-3 if half else 0.0, rtol=0)
    with pytest.raises(ValueError, match=r"lack \['u9'\]"):
        source.emit(["u9"])
    with pytest.raises(ValueError, match="another vocabulary"):
        SavedSource(tmp_path, AcousticTokens.from_pieces([*PIECES[:-1], "x"], blank_id=0))
    with pytest.raises(FileNotFoundError):
        SavedSource(tmp_path / "none.npz", TOKENS)


def test_segments_are_joined_whatever_utterances_are_called(tmp_path) -> None:
    made = emissions((3, 5, 2), ids=("x", "x#1", "x#2"))  # x#1 is a segment of x, x#2 another utterance
    save_emissions(tmp_path / "a.npz", made.select([1, 2]), segments=[("x", 1, 2), ("x#2", 0, 1)])
    message = r"'x' must be all segments of one run, but segments \[1\] of 2 are there"
    with pytest.raises(ValueError, match=message):
        SavedSource(tmp_path, TOKENS).emit(["x"])
    save_emissions(tmp_path / "b.npz", made.select([0]), segments=[("x", 0, 2)])
    source = SavedSource(tmp_path, TOKENS)
    assert sorted(source.ids) == ["x", "x#2"]
    back = source.emit(["x", "x#2"])
    assert back.lens.tolist() == [8, 2]
    assert torch.equal(back.log_probs[0], torch.cat([made.log_probs[0, :3], made.log_probs[1]]))
    save_emissions(tmp_path / "b.npz", made.select([0]))  # x again, now whole
    with pytest.raises(ValueError, match=r"of 'x' .* but segments \[0, 1\] of 1 or 2 are there"):
        SavedSource(tmp_path, TOKENS).emit(["x"])
    with pytest.raises(ValueError, match="ids must differ"):
        save_emissions(tmp_path / "c.npz", emissions(ids=("x", "x#1", "x#1")))


def test_files_of_several_runs_are_refused(tmp_path) -> None:
    made = emissions()
    save_emissions(tmp_path / "a.npz", made.select([0, 1]))
    save_emissions(tmp_path / "b.npz", made.select([1, 2]))
    with pytest.raises(ValueError, match="of one run, but 'u2' is in .*a.npz' and in .*b.npz'"):
        SavedSource(tmp_path, TOKENS)
    made.tokens = AcousticTokens.from_pieces([*PIECES[:-1], "x"], blank_id=0)
    save_emissions(tmp_path / "b.npz", made.select([2]))
    with pytest.raises(ValueError, match="b.npz' were made with another vocabulary"):
        SavedSource(tmp_path, TOKENS)
    old = {"fingerprint": TOKENS.fingerprint(), "frame_shift": 0.04}
    arrays = {"__emissions__": np.array(json.dumps(old)), "u": np.zeros((4, 8)), "u#1": np.zeros((4, 8))}
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(ValueError, match=r"b.npz must say which are segments .* \['u#1'\]"):
        SavedSource(tmp_path, TOKENS)


def test_plain_npz_of_others(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", u1=np.zeros((4, 8), np.float32), u2=np.zeros((4, 7), np.float32))
    source = SavedSource(tmp_path / "x.npz", TOKENS)
    assert source.emit(["u1"]).log_probs.shape == (1, 4, 8)
    with pytest.raises(ValueError, match="has 8 pieces, but the log-probs of u2 have 7"):
        source.emit(["u2"])


def test_what_is_no_model_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="EmissionOptions.model must name"):
        open_source(EmissionOptions())
    with pytest.raises(FileNotFoundError, match="nowhere.*--emissions.kind huggingface"):
        open_source(EmissionOptions(model=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must be a model folder"):
        open_source(EmissionOptions(model=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="did you mean 'torchscript'"):
        EmissionOptions(kind="torchscrip")


# --- TorchScript --------------------------------------------------------------------------------------


class ToyEncoder(nn.Module):
    def forward(self, features: Tensor, lens: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        frames = features[:, : features.shape[1] // 4 * 4]
        return frames.reshape(frames.shape[0], -1, 320), torch.div(lens, 4, rounding_mode="floor")


class ToyExport(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = ToyEncoder()
        self.ctc_output = nn.Sequential(nn.Linear(320, size), nn.LogSoftmax(dim=-1))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tiny.write_bpe(folder, ["the cat sat on the mat", "a dog and a cat", "we saw the sea at dawn"] * 20, 30)
    return folder


def test_torchscript_export(tmp_path, bpe) -> None:
    torch.manual_seed(2)
    tokens = AcousticTokens.load(bpe)
    path = tmp_path / "jit_script.pt"
    torch.jit.script(ToyExport(tokens.size)).save(str(path))
    with pytest.raises(FileNotFoundError, match="bpe.model"):
        open_source(EmissionOptions(model=str(path)))
    source = open_source(EmissionOptions(model=str(path), tokens=str(bpe)))
    assert source.wants == "features"
    inputs = [torch.randn(n, 80) for n in (41, 100, 3, 0)]
    made = same_one_by_one(source, inputs, 1e-6)
    assert made.lens.tolist() == [10, 25, 0, 0] and made.frame_shift == 0.04
    for frames in (9, 11, 0):  # two frames of eleven would be 60 ms each
        assert source.emit(["u"], [torch.randn(frames, 80)]).frame_shift == 0.04
    named = open_source(EmissionOptions(model=str(path), tokens=str(bpe), frame_shift=0.02))
    assert named.frame_shift == named.emit(["u"], [torch.randn(40, 80)]).frame_shift == 0.02
    torch.jit.script(ToyEncoder()).save(str(path))
    with pytest.raises(ValueError, match=r"lacks \['encoder', 'ctc_output'\]"):
        open_source(EmissionOptions(model=str(path), tokens=str(bpe)))


class Windows(nn.Module):
    """Unmasked windows over time, as icefall's convolutions: frame t sees features 4t..4t+7."""

    def forward(self, features: Tensor, lens: Tensor) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        return features.unfold(1, 8, 4).flatten(2), torch.div(lens - 1, 4, rounding_mode="floor")


def test_models_that_do_not_mask_hear_silence_after_a_short_utterance(tmp_path, bpe) -> None:
    torch.manual_seed(4)
    tokens = AcousticTokens.load(bpe)
    export = ToyExport(tokens.size)
    export.encoder = Windows()
    export.ctc_output[0] = nn.Linear(640, tokens.size)
    torch.jit.script(export).save(str(tmp_path / "jit_script.pt"))
    source = open_source(EmissionOptions(model=str(tmp_path / "jit_script.pt"), tokens=str(bpe)))
    short, long = torch.randn(21, 80), torch.randn(40, 80)
    made = source.emit(["short", "long"], [short, long])
    silence = torch.full((1, 19, 80), math.log(1e-10))
    with torch.no_grad():
        alone = export.ctc_output(export.encoder(torch.cat((short[None], silence), 1), torch.tensor([40]))[0])
    assert made.lens.tolist() == [5, 9]  # the fifth frame sees the features 16..23 of 21
    torch.testing.assert_close(made.log_probs[0, :5], alone[0, :5], atol=1e-5, rtol=0)


# --- our checkpoint -----------------------------------------------------------------------------------


def test_our_checkpoint(tmp_path, bpe) -> None:
    from icefall_fusion.acoustic import models

    tokens = AcousticTokens.load(bpe)
    options = models.ModelOptions(
        vocab_size=tokens.size,
        encoder=models.EncoderOptions(size=32, heads=2, feedforward=64, layers=(1, 1, 1)),
        decoder=models.DecoderOptions(heads=2, feedforward=64, layers=1),
    )
    torch.manual_seed(3)
    models.save(models.CtcAed(options, bpe / "bpe.model").eval(), tmp_path)
    source = open_source(EmissionOptions(model=str(tmp_path)))
    inputs = [torch.randn(n, 80) for n in (60, 33, 1, 0)]
    made = same_one_by_one(source, inputs, 1e-4)
    assert made.lens.tolist()[:2] == source.model.encoder.out_lens(torch.tensor([60, 33])).tolist()
    assert made.encoder_out.shape[2] == 32 and made.lens[3] == 0
    assert source.emit(["u"], [torch.zeros(0, 80)]).lens.tolist() == [0]


SHIPPED = Path(__file__).parents[2] / "egs/minibooks/ASR/pretrained/ctc_aed"


def test_the_shipped_checkpoint_masks_padding_of_any_value() -> None:
    source = open_source(EmissionOptions(model=str(SHIPPED)))
    torch.manual_seed(5)
    lens = torch.tensor([203, 150, 37])
    features = torch.randn(3, 203, 80) * 3 - 8
    beyond = torch.arange(203)[None, :, None] >= lens[:, None, None]
    made = source.emit(["a", "b", "c"], [row[:n] for row, n in zip(features, lens.tolist())])
    for padding in (0.0, PADDING, 1e4):
        with torch.no_grad():
            encoder_out, _ = source.encode(features.masked_fill(beyond, padding), lens)
            log_probs = source.log_probs(encoder_out)
        assert torch.equal(log_probs, made.log_probs)


def test_our_checkpoint_keeps_to_its_own_pieces(tmp_path, bpe) -> None:
    model = tiny.acoustic_model(tmp_path / "model")
    size = tiny.piece_count()
    assert open_source(EmissionOptions(str(model), tokens=str(model / "bpe.model"))).tokens.size == size
    other = tmp_path / "other"
    tiny.write_bpe(other, [line.replace("e", "i") for line in tiny.LINES], size)
    assert AcousticTokens.load(other).size == size
    for tokens, message in (
        (other, "EmissionOptions.tokens must have the pieces of the model .*but is '.*other'"),
        (bpe, f"have {AcousticTokens.load(bpe).size} pieces, but the acoustic model has {size} outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(EmissionOptions(str(model), tokens=str(tokens)))
    config = json.loads((model / "config.json").read_text())
    del config["bpe_fingerprint"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "bpe.model").unlink()
    assert open_source(EmissionOptions(str(model), tokens=str(other))).tokens.size == size
    with pytest.raises(ValueError, match=f"but the acoustic model has {size} outputs"):
        open_source(EmissionOptions(str(model), tokens=str(bpe)))


# --- Hugging Face -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_any_hugging_face_ctc_model(tmp_path, masked) -> None:
    letters = tiny.hugging_face_ctc(tmp_path, masked)
    source = open_source(EmissionOptions(model=str(tmp_path)))
    assert (source.wants, source.tokens.size) == ("audio", len(letters))
    assert source.tokens.blank_id == 0
    assert source.tokens.decode([letters.index(c) for c in "AB|C"]) == "AB C"
    made = same_one_by_one(source, [torch.randn(n) for n in (4000, 1600, 5, 0)], 1e-4)
    assert made.lens[2] == made.lens[3] == 0 and made.lens[0] > made.lens[1] > 0
    assert made.frame_shift == pytest.approx(0.005)


def test_a_hugging_face_model_without_a_ctc_head_is_refused(tmp_path) -> None:
    from transformers import Wav2Vec2ForCTC

    tiny.hugging_face_ctc(tmp_path)
    model = Wav2Vec2ForCTC.from_pretrained(tmp_path)
    weights = model.state_dict()
    del weights["wav2vec2.masked_spec_embed"]  # as in published models
    model.save_pretrained(tmp_path, state_dict=weights)
    open_source(EmissionOptions(str(tmp_path)))
    model.wav2vec2.save_pretrained(tmp_path)
    message = "weights of .* must be complete, CTC head included, .* 'lm_head.weight'"
    with pytest.raises(ValueError, match=message):
        open_source(EmissionOptions(str(tmp_path)))


# --- broken files -------------------------------------------------------------------------------------


def cut_short(name):
    def damage(folder) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def without(name):
    return lambda folder: (folder / name).unlink()


def config(**values):
    """Return a function that sets values of config.json, and deletes those that are None."""

    def damage(folder) -> None:
        changed = {**json.loads((folder / "config.json").read_text()), **values}
        changed = {name: value for name, value in changed.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(changed))

    return damage


def content(name, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def torchscript(folder) -> None:
    torch.jit.script(ToyExport(tiny.piece_count())).save(str(folder / "jit_script.pt"))


def other_features(folder) -> None:
    export = ToyExport(tiny.piece_count())
    export.encoder = nn.GRU(40, 8)
    torch.jit.script(export).save(str(folder / "jit_script.pt"))


def saved(folder) -> None:
    np.savez(folder / "a.npz", u=np.zeros((4, tiny.piece_count())))


def one_array(folder) -> None:
    np.save(folder / "a.npy", np.zeros(3))
    (folder / "a.npy").rename(folder / "a.npz")


OURS, HUGGING = (tiny.acoustic_model, ""), (tiny.hugging_face_ctc, "")
SCRIPT, SAVED = (torchscript, "jit_script.pt"), (saved, "")
WIDE = {"vocab_size": tiny.piece_count(), "encoder": {"size": 64, "layers": [1, 1, 0]}}
BROKEN = {
    "ours, weights cut short": (OURS, cut_short("model.safetensors"), "as an acoustic model"),
    "ours, no weights": (OURS, without("model.safetensors"), "model.safetensors is missing"),
    "ours, other size": (OURS, config(options=WIDE), "as an acoustic model: Error.* in loading state_dict"),
    "ours, no options": (OURS, config(options=None), "must have options"),
    "ours, options a list": (OURS, config(options=[3]), "as an acoustic model"),
    "ours, unknown option": (OURS, config(options={"depth": 3}), "as an acoustic model: .*'depth'"),
    "ours, unknown encoder option": (OURS, config(options={"encoder": {"depth": 3}}), "model: .*'depth'"),
    "ours, bad option": (OURS, config(options={"vocab_size": 1}), "model: .*must be at least 2, but is 1"),
    "ours, config cut short": (OURS, cut_short("config.json"), "as a JSON object"),
    "ours, config a list": (OURS, content("config.json", b"[]"), "as a JSON object"),
    "ours, pieces cut short": (OURS, cut_short("bpe.model"), "must be a SentencePiece model"),
    "TorchScript, cut short": (SCRIPT, cut_short("jit_script.pt"), "need --emissions.recipe"),
    "TorchScript, other features": (SCRIPT, other_features, "as an encoder of 80 features"),
    "Hugging Face, no weights": (HUGGING, without("model.safetensors"), "as a CTC model"),
    "Hugging Face, weights cut short": (HUGGING, cut_short("model.safetensors"), "as a CTC model"),
    "Hugging Face, other size": (HUGGING, config(hidden_size=32), "as a CTC model"),
    "Hugging Face, another kind": (HUGGING, config(model_type="t5"), "as a CTC model"),
    "Hugging Face, config cut short": (HUGGING, cut_short("config.json"), "as a JSON object"),
    "Hugging Face, no preprocessor": (HUGGING, without("preprocessor_config.json"), "as a feature extractor"),
    "Hugging Face, no vocabulary": (HUGGING, without("vocab.json"), "as a tokenizer"),
    "saved, cut short": (SAVED, cut_short("a.npz"), "as saved log-probs"),
    "saved, empty": (SAVED, content("a.npz", b""), "as saved log-probs"),
    "saved, one array": (SAVED, one_array, "as saved log-probs"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_refused_with_its_path(kind, tmp_path) -> None:
    (make, name), damage, message = BROKEN[kind]
    tokens = tmp_path / "tokens"
    tiny.write_bpe(tokens)
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    pieces = "" if make in (tiny.acoustic_model, tiny.hugging_face_ctc) else str(tokens)
    open_source(EmissionOptions(str(folder / name), tokens=pieces))
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_source(EmissionOptions(str(folder / name), tokens=pieces))
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1000


def test_a_vocabulary_beside_log_probs_comes_back_of_whatever_kind(tmp_path) -> None:
    letters = AcousticTokens.from_pieces(["<pad>", "|", "a", "b"], blank_id=0, delimiter="|")
    for number, tokens in enumerate((TOKENS, letters, AcousticTokens.load(tiny.write_bpe(tmp_path)))):
        folder = tmp_path / str(number)
        save_vocabulary(folder, tokens)
        for path in (folder, folder / "a.npz"):
            again = read_vocabulary(path)
            assert again.fingerprint() == tokens.fingerprint()
            assert again.starts_word == tokens.starts_word and again.encode("a a") == tokens.encode("a a")
    save_vocabulary(folder := tmp_path / "broken", letters)
    (folder / "vocabulary.json").write_text('{"pieces": []}')
    with pytest.raises(ValueError, match="vocabulary.json cannot be loaded as a vocabulary"):
        read_vocabulary(folder)


def test_saved_log_probs_that_rot_later_are_named(tmp_path) -> None:
    path = tmp_path / "a.npz"
    save_emissions(path, emissions())
    content = bytearray(path.read_bytes())
    place = content.index(b"u2.npy") + 200  # within the array
    content[place : place + 8] = b"rotten!!"
    path.write_bytes(content)
    source = SavedSource(path, TOKENS)
    source.emit(["u1"])
    with pytest.raises(ValueError, match="a.npz cannot be loaded as saved log-probs: .*u2"):
        source.emit(["u2"])


def test_a_hub_out_of_reach_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nobody/nothing cannot be loaded as a CTC model: .*connect"):
        open_source(EmissionOptions("nobody/nothing", kind="huggingface"))
