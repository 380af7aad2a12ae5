"""Jobs on Mandarin and Spanish text with tiny random models: the language is the model's, or an option.
Knows: jobs and their files. Must not know: how a search works.
"""
from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.models import CtcAed, DecoderOptions, EncoderOptions, ModelOptions, load, save
from icefall_fusion.data.tokenizers import train_pieces
from icefall_fusion.decode import tune
from icefall_fusion.fusion.watch import BeamWatch
from icefall_fusion.text.language import ENGLISH, Language
from icefall_fusion.text.scripts import has_unspaced, unspaced
from icefall_fusion.text.tokens import AcousticTokens

LINES = ["今天天气很好我们去公园", "明天天气不好我们在家", "他们在学校学写字", "世界上有很多好书"] * 8
PIECES = 30


def byte_level(folder: Path) -> Path:
    """Write a random Llama over byte-level BPE of the Chinese lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    whole.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mandarin(tmp_path_factory) -> dict[str, str]:
    """A random acoustic model over Chinese pieces, a random LLM, and noise with Chinese references."""
    folder = tmp_path_factory.mktemp("zh")
    train_pieces(LINES, PIECES, folder / "lang")
    options = ModelOptions(
        vocab_size=PIECES, decoder=DecoderOptions(heads=2, feedforward=48, layers=1),
        encoder=EncoderOptions(size=32, heads=2, feedforward=48, layers=(1, 1, 0), kernel=5),
    )
    torch.manual_seed(5)
    model = CtcAed(options, folder / "lang")
    model.language = Language("zh")
    with torch.no_grad():
        model.ctc.linear.weight.mul_(6)
    save(model.eval(), folder / "ctc_aed")
    cuts = tiny.manifest(folder / "audio", 4)
    rows = [json.loads(line) for line in gzip.open(cuts, "rt")]
    for row, line in zip(rows, LINES):
        row["supervisions"][0]["text"] = f"{line}３。"
    with gzip.open(cuts, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {"model": str(folder / "ctc_aed"), "llm": str(byte_level(folder / "llm")), "cuts": str(cuts)}


def decode(made: dict[str, str], out: Path, *more: str) -> int:
    return main(["decode", "--emissions.model", made["model"], "--llm.path", made["llm"], "--test_sets.noise",
                 made["cuts"], "--methods", "ctc-prefix,llm-nbest-rescoring,llm-delayed-shortest",
                 "--search.beam=4", "--out", str(out), *more])


def test_pieces_of_chinese_have_no_mark_and_close_each_other(mandarin) -> None:
    tokens = AcousticTokens.load(mandarin["model"])
    assert not any(piece.startswith("▁今") for piece in tokens.pieces)
    assert all(tokens.starts_word[index] for index in tokens.encode(LINES[0]))
    assert unspaced(tokens.decode(tokens.encode(LINES[0]))) == LINES[0]


def test_a_model_folder_keeps_its_language(mandarin, made) -> None:
    assert load(mandarin["model"]).language == Language("zh")
    assert load(made["model"]).language == ENGLISH
    config = json.loads((Path(made["model"]) / "config.json").read_text())
    assert "language" not in config  # folders of English are what they were


@pytest.mark.parametrize("boundaries", ["words", "tokens"])
def test_decode_counts_characters_and_scores_whole_text(mandarin, tmp_path, boundaries) -> None:
    assert decode(mandarin, tmp_path, "--llm.boundaries", boundaries) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    expected = sum(len(line) + 1 for line in LINES[:4])
    for row in rows:
        assert row["unit"] == "characters" and row["words"] == expected and row["wer"] is not None
        assert row["options"]["language"] == {"language": "zh"}
    assert (tmp_path / "wer-summary-noise-ctc-prefix.txt").read_text().startswith("settings\tCER\n")
    assert main(["report", "--runs", str(tmp_path)]) == 0
    ref = ["--ref", mandarin["cuts"], "--hyp", str(tmp_path / "nbest-noise-ctc-prefix.jsonl")]
    assert main(["score", *ref]) == 0  # the run file says its language
    method = "llm-nbest-rescoring"
    assert main(["tune", "--nbest", str(tmp_path / f"nbest-noise-{method}.jsonl"), "--ref", mandarin["cuts"],
                 "--out", str(tmp_path / "w.yaml"), "--methods", method]) == 0


def test_the_wrong_language_is_refused_before_anything_is_decoded(mandarin, tmp_path, capsys) -> None:
    assert decode(mandarin, tmp_path, "--language", "en") == 2
    assert "references of noise must have words of the language 'en'" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    assert decode(mandarin, tmp_path, "--language", "Chinese") == 2
    assert "language must be an ISO 639 code" in capsys.readouterr().err


def test_transcripts_have_no_spaces_between_characters(mandarin, capsys) -> None:
    audio = str(next(Path(mandarin["cuts"]).parent.glob("*.flac")))
    assert main(["transcribe", "--emissions.model", mandarin["model"], "--method", "ctc-prefix", audio]) == 0
    text = capsys.readouterr().out.splitlines()[0].split("\t")[1]
    assert has_unspaced(text) and " " not in text


def test_transcripts_name_their_language(mandarin, tmp_path, capsys) -> None:
    audio = str(next(Path(mandarin["cuts"]).parent.glob("*.flac")))
    command = ["transcribe", "--emissions.model", mandarin["model"], "--method", "ctc-prefix", audio]
    assert main([*command, "--format", "json,lhotse", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "words.jsonl").read_text())["language"] == "zh"
    with gzip.open(tmp_path / "supervisions.jsonl.gz", "rt") as file:
        assert json.loads(file.read())["language"] == "zh"
    assert main([*command, "--format", "json", "--language", "en"]) == 0
    assert "language" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("job", "message"), [
    (["transcribe", "a.wav", "--normalizer", "json:dumps"], "TranscribeOptions.normalizer must be left out"),
    (["transcribe", "-", "--stream", "true", "--language", "zh"], "language must be left out in a stream"),
    (["serve", "--language", "zh"], "ServeOptions.language must be left out in a server"),
    (["serve", "--normalizer", "json:dumps"], "ServeOptions.normalizer must be left out: this job"),
    (["pruning-errors", "--cuts", "a", "--normalizer", "json:dumps"], "normalizer must be left out"),
])
def test_options_that_would_do_nothing_are_refused(job, message, capsys) -> None:
    assert main(job) == 2
    assert message in capsys.readouterr().err


def test_pruning_errors_count_characters(mandarin, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    assert main(["pruning-errors", "--emissions.model", mandarin["model"], "--llm.path", mandarin["llm"],
                 "--search.beam", "4", "--cuts", mandarin["cuts"], "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["words"] == sum(map(len, LINES[:4])) + 4  # "３。"
    assert sum(map(sum, (kind.values() for kind in told["kinds"].values()))) == told["wrong"] > 4
    page = capsys.readouterr().out
    assert f"of {told['words']} characters of the references" in page and "| function word |" in page


def test_words_of_several_characters_are_watched_by_character() -> None:
    watch = BeamWatch({}, None, Language("zh").split)
    assert watch._units(["世界", "上", "python"]) == ("世", "界", "上", "python")
    assert BeamWatch({}, None)._units(["世界", "a"]) == ("世界", "a")


def test_tuning_decodes_in_the_language_that_it_scores_in(mandarin, tmp_path, monkeypatch) -> None:
    """The confirming decode has a normalizer, the lists have a language: both hold for both."""
    assert decode(mandarin, tmp_path / "run") == 0
    own, seen = "icefall_fusion.text.any_script:normalize", []
    start = tune.Recognizer.__init__
    monkeypatch.setattr(tune.Recognizer, "__init__",
                        lambda self, options, *more: seen.append(options) or start(self, options, *more))
    method, confirm = "llm-delayed-shortest", [
        f"emissions.model={mandarin['model']}", f"llm.path={mandarin['llm']}", f"normalizer={own}",
        f"test_sets.noise={mandarin['cuts']}", f"out={tmp_path / 'confirm'}", "search.beam=4"]
    assert main(["tune", "--nbest", str(tmp_path / "run" / "nbest-noise-llm-nbest-rescoring.jsonl"), "--ref",
                 mandarin["cuts"], "--out", str(tmp_path / "w.yaml"), "--methods", method,
                 "--confirm_rounds", "0", *(f"--confirm.{one}" for one in confirm)]) == 0
    assert [(one.language, one.normalizer) for one in seen] == [("zh", own)]
