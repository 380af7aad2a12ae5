"""Trains the two vocabularies: SentencePiece pieces of the acoustic model, byte-level BPE of the LLM.
Knows: utterance files. Must not know: audio, acoustic models, language models.
"""
from __future__ import annotations

import io
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.files import atomic_path, write_text
from icefall_fusion.data.books import read_jsonl
from icefall_fusion.text.scripts import has_unspaced
from icefall_fusion.text.tokens import AcousticTokens

BLANK, SOS_EOS, UNKNOWN = "<blk>", "<sos/eos>", "<unk>"  # ids 0, 1, 2: icefall's convention
LLM_BOS, LLM_EOS = "<s>", "</s>"  # ids 0, 1


@dataclass(frozen=True)
class TokenizerOptions:
    """Train the acoustic pieces (SentencePiece) and the LLM's tokenizer (byte-level BPE).

    Each line of ``text/train.jsonl`` is a JSON object with the keys ``text`` (normalized: lower case, no
    punctuation) and ``cased`` (the same words as printed). ``prepare-text`` writes it.

    Args:
        data_dir: folder with ``text/train.jsonl``; ``lang_bpe_<pieces>/`` and ``llm_tokenizer/`` are written.
        pieces: size of the acoustic vocabulary, blank included.
        pieces_from: a SentencePiece model, or its folder, whose pieces are copied, e.g. those of a model for
            ``train --init``; empty: learn them.
        piece_lines: number of normalized utterances to learn the acoustic pieces from.
        coverage: share of the characters of these utterances that have a piece (0.98 to 1), the frequent
            ones; others are the unknown piece. Below 1 for Chinese, whose rare characters are thousands.
            1 with pieces_from, which are not learned.
        llm_tokens: size of the LLM's vocabulary; 0 makes none (the LLM has its own).
        llm_cased_lines: number of cased utterances to learn the LLM's tokens from.
        llm_normalized_lines: number of normalized utterances to learn them from.
        seed: of the samples.
    """

    data_dir: str = "data"
    pieces: int = 500
    pieces_from: str = ""
    piece_lines: int = 200_000
    coverage: float = 1.0
    llm_tokens: int = 8192
    llm_cased_lines: int = 300_000
    llm_normalized_lines: int = 100_000
    seed: int = 17

    def __post_init__(self) -> None:
        check_at_least(32, self, "pieces")
        check_at_least(1, self, "piece_lines")
        check(0.98 <= self.coverage <= 1, "TokenizerOptions.coverage", "be from 0.98 to 1", self.coverage)
        rule = "be 0, or from 258 (bytes, <s>, </s>) to 65536 (uint16)"
        good = self.llm_tokens == 0 or 258 <= self.llm_tokens <= 65536
        check(good, "TokenizerOptions.llm_tokens", rule, self.llm_tokens)
        rule = "be 1.0 with TokenizerOptions.pieces_from, whose pieces are not learned"
        check(not self.pieces_from or self.coverage == 1, "TokenizerOptions.coverage", rule, self.coverage)
        lines = self.llm_cased_lines + self.llm_normalized_lines
        rule = "be at least 1 (with llm_normalized_lines)"
        check(lines >= 1, "TokenizerOptions.llm_cased_lines", rule, lines)


def run(options: TokenizerOptions) -> int:
    """Train both vocabularies from ``text/train.jsonl`` (or take the pieces); return the exit status 0.

    Raises:
        FileNotFoundError: the utterance file is not there.
        ValueError: a line of it is broken, or the text is too small for so many pieces.
    """
    root = Path(options.data_dir)
    utterances, lang = root / "text" / "train.jsonl", root / f"lang_bpe_{options.pieces}"
    if options.pieces_from:
        take_pieces(options.pieces_from, options.pieces, lang)
        print(f"{options.pieces} acoustic pieces from {options.pieces_from}")
    plans = [("text", 0 if options.pieces_from else options.piece_lines, options.seed)]
    if options.llm_tokens:
        plans.append(("cased", options.llm_cased_lines, options.seed))
        plans.append(("text", options.llm_normalized_lines, options.seed + 1))
    spoken, *written = sample_fields(utterances, plans)
    if not options.pieces_from:
        print(f"training {options.pieces} acoustic pieces on {len(spoken)} utterances", flush=True)
        train_pieces(spoken, options.pieces, lang, options.coverage)
        print(f"{options.pieces} acoustic pieces from {len(spoken)} utterances")
    if options.llm_tokens:
        lines = [line for sample in written for line in sample]
        print(f"training {options.llm_tokens} LLM tokens on {len(lines)} utterances", flush=True)
        size = train_llm_tokenizer(lines, options.llm_tokens, root / "llm_tokenizer")
        print(f"{size} LLM tokens from {len(lines)} utterances")
    return 0


def sample_fields(path: Path, plans: Sequence[tuple[str, int, int]]) -> list[list[str]]:
    """Return random samples of fields of a file of utterances, which is never in memory as a whole.

    Args:
        path: JSON lines.
        plans: for each sample the field, its size (all lines where there are no more) and its seed.
    """
    names = tuple(dict.fromkeys(name for name, _, _ in plans))
    total = sum(1 for _ in tqdm(read_jsonl(path, names), unit="utt", desc="count"))
    samples: list[list[str]] = []
    positions: list[dict[int, int]] = []  # of each sample: number of a line -> its index
    for _, count, seed in plans:
        chosen = range(total) if total <= count else random.Random(seed).sample(range(total), count)
        positions.append({line: index for index, line in enumerate(chosen)})
        samples.append([""] * len(chosen))
    for number, utterance in enumerate(tqdm(read_jsonl(path, names), total=total, unit="utt", desc="sample")):
        for (name, _, _), index, sample in zip(plans, positions, samples):
            if number in index:
                sample[index[number]] = utterance[name]
    return samples


def train_pieces(lines: list[str], size: int, folder: Path, coverage: float = 1.0) -> None:
    """Train SentencePiece unigram pieces and write ``bpe.model`` and ``tokens.txt`` (piece and id a line).

    In scripts without spaces each character and its frequent successions are pieces, without a word mark.

    Args:
        lines: normalized utterances.
        size: pieces in all; 0 is the blank, 1 start and end of sentence, 2 unknown.
        folder: where both files go.
        coverage: share of the characters in the text that have a piece.

    Raises:
        ValueError: the text is too small for so many pieces, or has more characters than pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    marked = not any(map(has_unspaced, lines))  # a mark at the beginning would make each character two pieces
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=size, model_type="unigram",
            user_defined_symbols=[BLANK, SOS_EOS], unk_id=2, unk_piece=UNKNOWN, bos_id=-1, eos_id=-1,
            pad_id=-1, normalization_rule_name="identity", character_coverage=coverage, num_threads=1,
            minloglevel=1, **({} if marked else {"add_dummy_prefix": False}),
        )
    except RuntimeError as error:
        raise ValueError(f"pieces must fit {len(lines)} lines of text, but is {size} (coverage {coverage}): "
                         f"{error}") from error
    with atomic_path(folder / "bpe.model") as path:
        path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "bpe.model"))
    write_table([processor.id_to_piece(index) for index in range(processor.get_piece_size())], folder)


def take_pieces(model: str, size: int, folder: Path) -> None:
    """Write the pieces of another model as `train_pieces` writes new ones.

    Raises:
        FileNotFoundError, ValueError: there is no SentencePiece model, or one of another size.
    """
    tokens = AcousticTokens.load(model)
    check(tokens.size == size, "TokenizerOptions.pieces", f"be {tokens.size}, as {model} has it", size)
    path = Path(model) / "bpe.model" if Path(model).is_dir() else Path(model)
    with atomic_path(folder / "bpe.model") as target:
        target.write_bytes(path.read_bytes())
    write_table(tokens.pieces, folder)


def write_table(pieces: Sequence[str], folder: Path) -> None:
    """Write ``tokens.txt``: piece and id a line."""
    write_text(folder / "tokens.txt", "".join(f"{piece} {index}\n" for index, piece in enumerate(pieces)))


def train_llm_tokenizer(lines: list[str], size: int, folder: Path) -> int:
    """Train byte-level BPE and write a folder that ``AutoTokenizer`` loads; return the size reached.

    A text's first word has no leading space, other words have one; no special token is ever added.

    Args:
        lines: cased and normalized utterances.
        size: tokens in all; 0 is ``<s>``, 1 is ``</s>``, every byte is a token.
        folder: where the files go.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[LLM_BOS, LLM_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_leading_spaces(lines), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=LLM_BOS,
        eos_token=LLM_EOS,
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )
    with tempfile.TemporaryDirectory() as temporary:
        wrapped.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            write_text(folder / path.name, path.read_text(encoding="utf-8"))
    return len(wrapped)


def _with_leading_spaces(lines: list[str]) -> Iterator[str]:
    """Yield each line twice in three with a space before: most words of a document have one."""
    for index, line in enumerate(lines):
        yield line if index % 3 == 0 else " " + line
