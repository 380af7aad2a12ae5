"""Job ``train-lm``: packing, its mask, resume, and the exported folder.
Knows: the job, its model, token streams. Must not know: search, fusion, audio.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.train.language_model import TrainLmOptions, run
from icefall_fusion.train.llama import (
    LlamaOptions,
    PackedLoss,
    Vocabulary,
    build_model,
    export,
    load_vocabulary,
)
from icefall_fusion.train.options import TrainerOptions
from icefall_fusion.train.token_stream import NO_DOCUMENT, TokenBatches, document_bounds, pack_rows

TINY = LlamaOptions(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=48)
TEXT = "the rain in spain stays mainly on the plain but a storm came over all the hills at night".split()


def write_stream(path: Path, documents: list[list[int]], bos: int, eos: int) -> None:
    ids = [token for document in documents for token in [bos, *document, eos]]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(ids, dtype=np.uint16))


def random_documents(count: int, size: int, low: int, seed: int, longest: int = 14) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest, count)
    return [generator.integers(low, size, length).tolist() for length in lengths]


def make_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([" ".join(TEXT)] * 3, trainer)
    marked = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    marked.save_pretrained(folder)
    return folder


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(2, 16))
@settings(deadline=None, max_examples=60)
def test_rows_hold_every_place_once(lengths: list[int], length: int) -> None:
    rows = pack_rows(np.array(lengths), length)
    assert all(sum(size for *_, size in row) <= length for row in rows)
    held = sorted((document, place) for row in rows for document, offset, size in row
                  for place in range(offset, offset + size))
    assert held == [(document, place) for document, size in enumerate(lengths) for place in range(size)]


def test_bounds_for_one_or_two_marks_and_broken_streams() -> None:
    assert document_bounds(np.array([0, 5, 6, 1, 0, 1]), 0, 1).tolist() == [[0, 4], [4, 6]]
    assert document_bounds(np.array([1, 5, 6, 1, 1, 1]), 1, 1).tolist() == [[0, 4], [4, 6]]
    for broken in ([0, 5, 6], [5, 0, 1], [0, 5, 1, 7, 0, 1], [0, 0, 1, 1], [0, 5, 1, 7]):
        with pytest.raises(ValueError, match="must be documents of bos=0"):
            document_bounds(np.array(broken), 0, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("bos, eos", [(0, 1), (1, 1)])
def test_packed_documents_score_as_if_alone(tmp_path: Path, attention: str, bos: int, eos: int) -> None:
    """The packed loss is the sum of plain forwards, one document at a time."""
    documents = random_documents(25, 50, 2, seed=3)
    write_stream(tmp_path / "s.npy", documents, bos, eos)
    torch.manual_seed(0)
    lm = build_model(TINY, Vocabulary(tmp_path, 50, bos, eos, len), attention).eval()
    alone = 0.0
    with torch.no_grad():
        for document in documents:
            ids = torch.tensor([[bos, *document, eos]])
            log_probs = lm(input_ids=ids[:, :-1]).logits.log_softmax(-1)
            alone -= float(log_probs.gather(-1, ids[:, 1:, None]).sum())
        batches = list(TokenBatches(tmp_path / "s.npy", bos, eos, rows=3, length=20))
        packed = sum(float(PackedLoss(lm)(batch)) for batch in batches)
    assert packed == pytest.approx(alone, rel=1e-5)
    assert sum(int((batch.targets >= 0).sum()) for batch in batches) == sum(len(d) + 1 for d in documents)
    assert all(bool((batch.targets[batch.documents == NO_DOCUMENT] == -100).all()) for batch in batches)


def test_batches_resume_anywhere_and_are_shared(tmp_path: Path) -> None:
    write_stream(tmp_path / "s.npy", random_documents(90, 50, 2, seed=5), 0, 1)
    settings_: dict[str, Any] = {"rows": 2, "length": 16, "seed": 4, "block": 20}

    def source(**more: int) -> TokenBatches:
        return TokenBatches(tmp_path / "s.npy", 0, 1, **settings_, **more)

    def flat(batches: Any) -> list[list[int]]:
        return [batch.tokens.flatten().tolist() for batch in batches]

    one = source()
    two_epochs = flat(one) + flat(one)
    assert flat(source()) != two_epochs[len(two_epochs) // 2 :]  # another order each epoch
    for stop in range(0, len(two_epochs), 5):
        cut, seen = source(), []
        while len(seen) < stop:
            for batch in cut:
                seen += flat([batch])
                if len(seen) == stop:
                    break
        later = source()
        later.load_state_dict(cut.state_dict())
        rest = flat(later)
        assert rest == two_epochs[stop : stop + len(rest)]
    assert one.batches_in(2) <= len(two_epochs) <= 1.2 * one.batches_in(2)  # rows are nearly full
    shares = [flat(source(rank=rank, world=2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    merged = [batch for pair in zip(*shares) for batch in pair]
    assert [batch for batch in merged if any(batch)] == [batch for batch in flat(source()) if any(batch)]
    with pytest.raises(ValueError, match="state\\['seed'\\] must be 4"):
        source().load_state_dict({**one.state_dict(), "seed": 5})


def make_options(folder: Path, tokenizer: Path, max_steps: int = 30) -> TrainLmOptions:
    trainer = TrainerOptions(lr=5e-3, warmup_steps=5, max_steps=max_steps, tensorboard=False,
                             valid_every_steps=15)
    return TrainLmOptions(data=str(folder / "lm"), tokenizer=str(tokenizer), exp=str(folder / "exp"),
                          model=TINY, trainer=trainer, rows=4, length=32, device="cpu",
                          export_dtype="float32")


def test_job_trains_exports_and_goes_on(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tokenizer(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [" ".join(TEXT[first : first + 6]) for first in range(12)]
    documents = [tokenizer.encode(text, add_special_tokens=False) for text in texts] * 4
    write_stream(tmp_path / "lm" / "train.npy", documents, bos, eos)
    write_stream(tmp_path / "lm" / "dev.npy", documents[:12], bos, eos)
    assert run(make_options(tmp_path, folder, max_steps=15)) == 0
    assert run(make_options(tmp_path, folder)) == 0

    lines = [json.loads(line) for line in (tmp_path / "exp" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [15, 30]
    assert lines[1]["valid_loss"] < lines[0]["valid_loss"] < np.log(tokenizer.vocab_size)
    export = tmp_path / "exp" / "export"
    lm = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(export).encode(texts[0]) == documents[0]
    assert (lm.config.bos_token_id, lm.config.eos_token_id) == (bos, eos)
    nats = tokens = 0.0
    with torch.no_grad():
        for document in documents[:12]:
            ids = torch.tensor([[bos, *document, eos]])
            nats -= float(lm(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum())
            tokens += len(document) + 1
    assert nats / tokens == pytest.approx(lines[1]["valid_loss"], rel=0.02)  # trained under bf16 autocast
    still = TrainerOptions(lr=1e-12, min_lr=0, max_steps=1, tensorboard=False)  # exports what it begins with
    assert run(TrainLmOptions(**{**vars(make_options(tmp_path, folder)), "exp": str(tmp_path / "next"),
                                 "init": str(export), "trainer": still})) == 0
    weights = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
               for path in (export, tmp_path / "next" / "export")]
    assert all(torch.allclose(value, weights[1][name], atol=1e-9) for name, value in weights[0].items())
    words = sum(len(text.split()) + 1 for text in texts)
    expected = np.exp(lines[1]["valid_loss"] * tokens / words)
    assert lines[1]["valid_word_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_bad_input_is_named(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer_config.json or bpe.model"):
        load_vocabulary(tmp_path)
    with pytest.raises(FileNotFoundError, match="train.npy does not exist"):
        run(make_options(tmp_path, folder))
    for name in ("train", "dev"):
        write_stream(tmp_path / "lm" / f"{name}.npy", [[5000, 7]], 0, 1)
    with pytest.raises(ValueError, match="must be below .* but is 5000"):
        run(make_options(tmp_path, folder))
    write_stream(tmp_path / "lm" / "train.npy", [[5, 7]] * 4, 0, 1)
    write_stream(tmp_path / "lm" / "dev.npy", [[5, 7]], 0, 1)
    options = vars(make_options(tmp_path, folder))
    with pytest.raises(FileNotFoundError, match="TrainLmOptions.init: .* must be a model folder"):
        run(TrainLmOptions(**{**options, "init": str(folder)}))
    vocabulary = load_vocabulary(folder)
    other, sample = LlamaOptions(hidden=16, layers=1, heads=2), torch.tensor([[0, 5, 7]])
    export(build_model(other, vocabulary, "eager"), vocabulary, tmp_path / "small", "float32", sample)
    with pytest.raises(ValueError, match="TrainLmOptions.init .*: num_key_value_heads must be 1, but is 2"):
        run(TrainLmOptions(**{**options, "init": str(tmp_path / "small")}))
    small = LlamaOptions(hidden=16, layers=1, heads=2, kv_heads=1)
    export(build_model(small, vocabulary, "eager"), vocabulary, tmp_path / "small", "float32", sample)
    with pytest.raises(ValueError, match="TrainLmOptions.init .* have the shape of TrainLmOptions.model"):
        run(TrainLmOptions(**{**options, "init": str(tmp_path / "small")}))
    with pytest.raises(ValueError, match="LlamaOptions.hidden must be a multiple of heads=3"):
        LlamaOptions(hidden=32, heads=3)
