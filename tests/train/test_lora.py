"""Job ``train-lm --base``: documents of sentences, packed loss of many families, resume, export.
Knows: the job, adapters, CausalLm. Must not know: search, fusion, audio.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM

from icefall_fusion.lm import CausalLm, adapters, loading, starts
from icefall_fusion.train import lora
from icefall_fusion.train.checkpoints import load_checkpoint, newest_checkpoint
from icefall_fusion.train.language_model import TrainLmOptions, run
from icefall_fusion.train.lm_documents import DocumentOptions, prepare_streams, read_documents
from icefall_fusion.train.lora import AdapterLoss, Base, LoraOptions, check_packing, probe_start
from icefall_fusion.train.options import TrainerOptions
from icefall_fusion.train.token_stream import TokenBatches, attention_mask
from tests import tiny
from tests.lm.test_causal_lm import random_model

pytest.importorskip("peft")

SENTENCES = ["the cat sat on the mat", "a dog met near the old harbor",
             "we saw the sea at dawn", "she sold shells"]


def write_text(folder: Path, train: list[str], dev: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in (("train", train), ("dev", dev)):
        rows = [{"text": text, "cased": text.capitalize() + ".", "book": f"book {index // 10}"}
                for index, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.language_model(tmp_path_factory.mktemp("lora") / "llm", 3, pieces=False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text", SENTENCES * 20, SENTENCES * 3)


def make_options(base: Path, text: Path, exp: Path, max_steps: int = 20, **more) -> TrainLmOptions:
    precision = more.pop("precision", "float32")
    trainer = TrainerOptions(lr=1e-2, warmup_steps=2, max_steps=max_steps, tensorboard=False,
                             precision=precision, valid_every_steps=10, save_every_steps=10)
    asked = {"lora": LoraOptions(rank=4, alpha=8.0), "export_dtype": "float32", **more}
    return TrainLmOptions(data=str(text), base=str(base), exp=str(exp), trainer=trainer, rows=4, length=32,
                          device="cpu", **asked)


def words_perplexity(lm: CausalLm, texts: list[str]) -> float:
    words = sum(len(text.split()) + 1 for text in texts)
    return math.exp(-sum(lm.log_probs(texts, eos=True)) / words)


def test_the_job_adapts_goes_on_and_its_folder_scores_as_it_says(base, text, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(make_options(base, text, whole)) == 0
    stopped = make_options(base, text, parts)
    object.__setattr__(stopped.trainer, "max_minutes", 1e-9)  # after one step
    assert run(stopped) == 4
    assert run(make_options(base, text, parts)) == 0
    states = [load_checkpoint(newest_checkpoint(exp))["model"] for exp in (whole, parts)]
    assert all("lora_" in name for name in states[0])  # the base is not in a checkpoint
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    lm, plain = CausalLm.from_pretrained(base, adapter=whole / "export"), CausalLm.from_pretrained(base)
    reached = words_perplexity(lm, SENTENCES)
    assert reached == pytest.approx(lines[-1]["valid_word_perplexity"], rel=1e-4)
    assert reached < 0.95 * words_perplexity(plain, SENTENCES)
    made_for = json.loads((whole / "export" / adapters.BASE_FILE).read_text())
    assert made_for["name"] == str(base) and len(made_for["sha256"]) == 64
    page = (whole / "export" / "README.md").read_text()
    assert made_for["sha256"] in page and f"| {lines[-1]['step']} | {lines[-1]['items']} |" in page
    still = make_options(base, text, tmp_path / "next", max_steps=1, init=str(whole / "export"))
    object.__setattr__(still.trainer, "lr", 1e-12)
    object.__setattr__(still.trainer, "min_lr", 0.0)
    assert run(still) == 0
    again = CausalLm.from_pretrained(base, adapter=tmp_path / "next" / "export")
    assert words_perplexity(again, SENTENCES) == pytest.approx(reached, rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_job_gives_a_base_the_acoustic_pieces(base, text, tmp_path: Path, precision: str) -> None:
    bpe = tiny.write_bpe(tmp_path / "bpe")
    asked = {"tokenizer": str(bpe), "precision": precision}
    for stop in (1e-9, 0.0):  # after one step, then to the end
        options = make_options(base, text, tmp_path / "exp", **asked)
        object.__setattr__(options.trainer, "max_minutes", stop)
        assert run(options) == (4 if stop else 0)
    state = load_checkpoint(newest_checkpoint(tmp_path / "exp"))["model"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    others = [name for name in state if "lora_" not in name]
    assert others == ["adapted.base_model.model.model.embed_tokens.weight"]
    export = tmp_path / "exp" / "export"
    lm = CausalLm.from_pretrained(base, adapter=export)
    assert lm.pieces is not None and lm.vocab_size == tiny.piece_count()
    lines = [json.loads(line) for line in (tmp_path / "exp" / "log.jsonl").read_text().splitlines()]
    reached = words_perplexity(lm, SENTENCES)
    allowed = 1e-4 if precision == "float32" else 0.05
    assert reached == pytest.approx(lines[-1]["valid_word_perplexity"], rel=allowed)
    assert reached < 0.9 * lines[0]["valid_word_perplexity"]
    still = make_options(base, text, tmp_path / "next", max_steps=1, init=str(export), **asked)
    object.__setattr__(still.trainer, "lr", 1e-12)
    object.__setattr__(still.trainer, "min_lr", 0.0)
    assert run(still) == 0
    again = CausalLm.from_pretrained(base, adapter=tmp_path / "next" / "export")
    assert words_perplexity(again, SENTENCES) == pytest.approx(reached, rel=allowed)
    with pytest.raises(ValueError, match="init .* must have no acoustic pieces of its own"):
        run(make_options(base, text, tmp_path / "other", init=str(export)))


def test_bf16_eager_and_averages_train_too(base, text, tmp_path: Path) -> None:
    options = make_options(base, text, tmp_path / "exp", precision="bf16", export_dtype="float16")
    object.__setattr__(options.trainer, "ema_decay", 0.9)
    assert run(options) == 0
    lm = CausalLm.from_pretrained(base, adapter=tmp_path / "exp" / "export")
    lines = [json.loads(line) for line in (tmp_path / "exp" / "log.jsonl").read_text().splitlines()]
    reached = words_perplexity(lm, SENTENCES)
    assert reached == pytest.approx(lines[-1]["valid_word_perplexity"], rel=0.05)
    assert reached < words_perplexity(CausalLm.from_pretrained(base), SENTENCES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "mistral-window", "gpt-neox"])
def test_packed_documents_of_any_family_score_as_if_alone(
    name: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(name)
    model.set_attn_implementation(attention)
    documents = [[1, 7, 9, 2], [1, 5, 2], [1, 3, 4, 2], [1, 8, 2]]
    np.save(tmp_path / "s.npy", np.array([token for document in documents for token in document], np.uint16))
    (batch,) = TokenBatches(tmp_path / "s.npy", 1, 2, rows=1, length=16, shuffle=False)
    targets = ["c_attn", "c_fc"] if name == "gpt2" else "all-linear"
    adapted = adapters.add_adapter(model, 2, 4.0, 0.0, targets, name)
    check_packing(AdapterLoss(adapted), batch, name)
    moved = batch._replace(positions=batch.positions + 3 * (batch.documents > 0))
    seen = batch._replace(documents=torch.zeros_like(batch.documents))  # documents see each other
    for wrong in [moved] * (name == "gpt2") + [seen] * (name == "llama"):  # rotary positions are relative
        monkeypatch.setattr(lora, "attention_mask", lambda _, wrong=wrong: attention_mask(wrong.documents))
        with pytest.raises(ValueError, match=f"base {name} must score packed documents like single ones"):
            check_packing(AdapterLoss(adapted), wrong._replace(documents=batch.documents), name)


def test_documents_are_neighbours_in_the_asked_form(text: Path) -> None:
    def documents(train: bool = True, **more) -> list[str]:
        return list(read_documents(text / "train.jsonl", DocumentOptions(**more), train))

    plain = SENTENCES * 20
    assert documents(max_group=1) == plain == documents(train=False, max_group=8, cased_share=1.0, share=0.1)
    grouped = documents(max_group=4)
    assert " ".join(grouped) == " ".join(plain) and grouped == documents(max_group=4) != plain
    assert max(len(document.split()) for document in grouped) > 12
    assert any(document in plain for document in grouped)
    both = documents(max_group=1, cased_share=1.0)
    assert len(both) == 160 and "The cat sat on the mat." in both
    assert documents(max_group=1, text="sentence")[0] == "The cat sat on the mat"
    assert 20 < len(documents(max_group=1, share=0.5)) < 60


def test_streams_are_made_once_for_a_text_and_options(base: Path, text: Path, tmp_path: Path) -> None:
    source = Base.load(str(base), torch.float32, torch.device("cpu"), eager=False)

    def prepare(**asked: int) -> Path:
        options = DocumentOptions(**asked)
        more = (source.encode, source.marks, "x", source.size)
        return prepare_streams(text, tmp_path / "streams", options, *more)

    folder = prepare()
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare() == folder and made == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(max_group=1) != folder
    stream = np.load(folder / "dev.npy")
    first = stream[1 : int(np.flatnonzero(stream == source.marks[1])[0])].tolist()
    assert stream[0] == source.marks[0] and source.vocabulary.tokenizer.decode(first) == SENTENCES[0]
    assert prepare_streams(folder, tmp_path, DocumentOptions(), source.encode, (0, 1), "x", 9) == folder


def test_another_start_is_named_where_it_is_better(base: Path, tmp_path: Path, monkeypatch) -> None:
    source = Base.load(str(base), torch.float32, torch.device("cpu"))
    loss = AdapterLoss(lora.add_adapter(source, LoraOptions(), "")[0])
    rows = [[0, *ids, 1] for ids in source.encode(SENTENCES)]
    np.save(tmp_path / "s.npy", np.array([token for row in rows for token in row], np.uint16))
    (batch,) = TokenBatches(tmp_path / "s.npy", 0, 1, rows=1, length=64, shuffle=False)
    nats = []
    for bos in ("<s>", "</s>"):
        scores = CausalLm.from_pretrained(base, bos_token=bos).log_probs(SENTENCES, eos=True)
        nats.append(-sum(scores) / sum(len(row) - 1 for row in rows))
    monkeypatch.setattr(starts, "CLEARLY", -1.0)
    found = probe_start(loss, batch, source)
    assert found == (("<s>", "</s>")[int(np.argmin(nats))], pytest.approx(nats[0], abs=1e-3),
                     pytest.approx(min(nats), abs=1e-3))
    monkeypatch.setattr(starts, "CLEARLY", 9.0)
    assert probe_start(loss, batch, source) is None


def test_the_job_starts_documents_as_asked_and_warns(base, text, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(starts, "CLEARLY", -1.0)
    assert run(make_options(base, text, tmp_path / "exp", max_steps=1, bos_token="</s>")) == 0
    assert "start with token 1" in caplog.text
    made_for = json.loads((tmp_path / "exp" / "export" / adapters.BASE_FILE).read_text())
    assert (made_for["bos"], made_for["eos"]) == ("</s>", "</s>")
    (stream,) = (tmp_path / "exp" / "streams").glob("*/dev.npy")
    assert np.load(stream)[0] == 1


def test_bad_input_is_named(base: Path, text: Path, tmp_path: Path) -> None:
    def refused(message: str, kind: type = ValueError, data: Path = text, model: Path = base, **more) -> None:
        with pytest.raises(kind, match=message):
            run(make_options(model, data, tmp_path / "exp", **more))

    refused("must hold train.jsonl or train.npy", FileNotFoundError, tmp_path)
    none = write_text(tmp_path / "none", ["", " "], SENTENCES)
    refused("the text of train must hold a sentence", data=none)
    refused("bos_token must be a token of .*, or text of one token", bos_token="two words")
    refused("must be linear layers", lora=LoraOptions(targets=("w_query",)))
    refused("init: .* must be a PEFT folder", FileNotFoundError, init=str(base))
    config = transformers.MistralConfig(**{**AutoModelForCausalLM.from_pretrained(base).config.to_dict(),
                                           "sliding_window": 8, "model_type": "mistral"})
    window = tiny.language_model(tmp_path / "window", 3, pieces=False)
    transformers.MistralForCausalLM(config).save_pretrained(window)
    refused("TrainLmOptions.length must be at most 8", model=window)
    assert run(make_options(base, text, tmp_path / "done", max_steps=1)) == 0
    other = tiny.language_model(tmp_path / "other", 4, pieces=False)
    refused("must have been made for the model", model=other, init=str(tmp_path / "done" / "export"))
    refused("has another rank", init=str(tmp_path / "done" / "export"), lora=LoraOptions(rank=5))
    with pytest.raises(ValueError, match="have the layers and the rank of TrainLmOptions.lora"):
        run(make_options(base, text, tmp_path / "done", lora=LoraOptions(rank=5)))
    with pytest.raises(ValueError, match="TrainLmOptions.tokenizer must be set, or else TrainLmOptions.base"):
        TrainLmOptions(data="x", exp="y", trainer=TrainerOptions(max_steps=1))
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": ()}):
        with pytest.raises(ValueError, match=f"LoraOptions.{next(iter(wrong))} must"):
            LoraOptions(**wrong)
    for wrong in ({"max_group": 0}, {"cased_share": 2.0}, {"share": 0.0}, {"text": "upper"}):
        with pytest.raises(ValueError, match=f"DocumentOptions.{next(iter(wrong))} must"):
            DocumentOptions(**wrong)


def test_each_character_is_a_word_where_words_have_no_spaces() -> None:
    letters = sorted(set("你好，世界 ok the cat sat a café"))
    spelled = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    spelled.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=spelled)
    base = Base("letters", "letters", None, loading.Vocabulary(tokenizer, None, 0, 1))
    for text, words in (("你好，世界 ok", 6), ("the cat sat", 3), ("a café", 2)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text) and base.count_words(ids) == words
