"""Tiny real models in folders: an acoustic model, language models, a manifest of noise; random by seed.
Knows: the folder layouts that jobs read. Must not know: any job.
"""
from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from icefall_fusion.acoustic.models import CtcAed, DecoderOptions, EncoderOptions, ModelOptions, save
from icefall_fusion.data.manifests import cut_of, write_cuts
from icefall_fusion.train.piece_ngram import TrainNgramOptions, run

LINES = (
    "the cat sat on the mat and looked at the sea",
    "a dog and a cat met near the old harbor",
    "we saw the sea at dawn and he didn't speak",
    "she sold the red shells to an honest sailor",
) * 8


@functools.lru_cache(maxsize=8)
def bpe_bytes(lines: tuple[str, ...] = LINES, size: int = 40) -> bytes:
    """Return a SentencePiece model of at most ``size`` pieces in the acoustic convention."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type="unigram", unk_id=2,
        bos_id=-1, eos_id=-1, user_defined_symbols=["<blk>", "<sos/eos>"], minloglevel=2,
        hard_vocab_limit=False,
    )
    return model.getvalue()


def write_bpe(folder: Path, lines: Sequence[str] = LINES, size: int = 40) -> Path:
    """Write ``bpe.model`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bpe.model").write_bytes(bpe_bytes(tuple(lines), size))
    return folder / "bpe.model"


def piece_count() -> int:
    return sentencepiece.SentencePieceProcessor(model_proto=bpe_bytes()).get_piece_size()


def acoustic_model(folder: Path) -> Path:
    """Write a random CTC-AED with about 30 thousand parameters."""
    options = ModelOptions(
        vocab_size=piece_count(),
        encoder=EncoderOptions(size=32, heads=2, feedforward=48, layers=(1, 1, 0), kernel=5),
        decoder=DecoderOptions(heads=2, feedforward=48, layers=1),
    )
    torch.manual_seed(5)
    model = CtcAed(options, write_bpe(folder))
    with torch.no_grad():
        model.ctc.linear.weight.mul_(6)  # decided enough for hypotheses to have words
    save(model.eval(), folder)
    return folder


def language_model(folder: Path, seed: int, pieces: bool) -> Path:
    """Write a random Llama over the acoustic pieces, or over a byte-level BPE of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if pieces:
        write_bpe(folder)
        size, bos, eos = piece_count(), 1, 1
    else:
        size, bos, eos = _byte_bpe(folder), 0, 1
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=bos, eos_token_id=eos, tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def _byte_bpe(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    whole.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def ngram(folder: Path) -> Path:
    """Write a trigram over the acoustic pieces."""
    bpe = write_bpe(folder / "ngram")
    pieces = sentencepiece.SentencePieceProcessor(str(bpe))
    stream = np.array([i for line in LINES for i in (1, *pieces.encode(line), 1)])
    for name in ("train", "dev"):
        np.save(folder / "ngram" / f"{name}.npy", stream)
    path = folder / "ngram.arpa.gz"
    run(TrainNgramOptions(str(folder / "ngram"), str(bpe), str(path), order=3))
    return path


def arpa_text(*orders: str) -> str:
    """Return an ARPA file of the lines of each order: log10 of P, words, back-off, with tabs between."""
    rows = [lines.strip("\n").split("\n") for lines in orders]
    counts = [f"ngram {order}={len(lines)}" for order, lines in enumerate(rows, 1)]
    parts = ["\n".join([f"\\{order}-grams:", *lines]) for order, lines in enumerate(rows, 1)]
    return "\n\n".join(["\n".join(["\\data\\", *counts]), *parts, "\\end\\"]) + "\n"


def hugging_face_ctc(folder: Path, masked: bool = True) -> list[str]:
    """Write a random wav2vec 2.0 with a letter vocabulary and return its letters by id."""
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDE'"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(folder)
    torch.manual_seed(4)
    config = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        intermediate_size=32, conv_dim=(8, 8, 8), conv_stride=(5, 4, 4), conv_kernel=(10, 4, 4),
        num_feat_extract_layers=3, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer" if masked else "group",
    )
    model = Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # decided enough for hypotheses to have words
    model.save_pretrained(folder)
    return letters


def manifest(folder: Path, count: int = 7, name: str = "noise") -> Path:
    """Write noises of about a second as FLAC files and a manifest of them, with references."""
    rng = np.random.default_rng(7)
    cuts = []
    for index in range(count):
        samples = rng.normal(0, 0.1, 9000 + 2500 * index).astype(np.float32)
        samples *= np.sin(np.arange(len(samples)) * 2 * np.pi / 4000) ** 2  # loud and quiet by turns
        path = folder / f"{name}-{index}.flac"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, 16000)
        utterance = {"id": f"{name}-{index}", "text": LINES[index % 4]}
        cuts.append(cut_of(utterance, path, len(samples), {"voice": "noise"}))
    path = folder / f"{name}.jsonl.gz"
    write_cuts(cuts, path)
    return path


def everything(folder: Path) -> dict[str, str]:
    """Write all models and a manifest; return their paths by name."""
    made = {
        "model": acoustic_model(folder / "ctc_aed"),
        "nlm": language_model(folder / "nlm", 11, pieces=True),
        "llm": language_model(folder / "llm", 12, pieces=False),
        "matched_llm": language_model(folder / "matched_llm", 13, pieces=True),
        "ngram": ngram(folder),
        "lodr": shutil.copy(folder / "ngram.arpa.gz", folder / "lodr.arpa.gz"),
        "cuts": manifest(folder / "audio"),
    }
    return {name: str(path) for name, path in made.items()}

