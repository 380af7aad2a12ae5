"""Job ``train``: the CTC-AED acoustic model from lhotse cuts with features, exported as a model folder.
Knows: the acoustic model, batches, the training loop. Must not know: language models, search, fusion.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator, Union

import torch
from torch import Tensor, nn

from icefall_fusion.acoustic.models import CtcAed, ModelOptions, greedy_pieces, load, save
from icefall_fusion.acoustic.models.ctc import ctc_loss_sum
from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import write_json
from icefall_fusion.common.memory import keep_freed_memory
from icefall_fusion.common.processes import check_compiler, gather_over_processes, sum_tensor
from icefall_fusion.data.datamodule import Batch, DataOptions, EvalBatches, TrainBatches
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.lattice.k2_fsas import ctc_loss_rows, load_k2
from icefall_fusion.scoring.wer import count_errors
from icefall_fusion.train.checkpoints import average_checkpoints, list_checkpoints
from icefall_fusion.train.loop import STOPPED, Trainer, TrainerOptions, init_distributed

DTYPES = ("float32", "float16", "bfloat16")
LISTED = 10_000  # utterances that could not be read


@dataclass(frozen=True)
class TrainOptions:
    """Train the acoustic model; run again with the same options to go on after a stop.

    Args:
        data_dir: holds ``fbank/CORPUS_cuts_SPLIT.jsonl.gz`` and ``lang_bpe_500/``.
        corpus: name that the manifests begin with.
        train_split: what to train on.
        valid_split: what to validate on.
        bpe: the SentencePiece model, or its folder; empty: ``lang_bpe_500`` of ``data_dir``.
        data: how utterances become batches, SpecAugment.
        exp: folder for checkpoints, logs and ``export/``, the average of the newest ``avg`` checkpoints.
        init: acoustic model folder whose weights a new training begins with, feature statistics included
            (fine-tuning, or one more leg of training: then set ``easy_batches`` to 0); empty: random weights.
        model: shape and loss.
        trainer: optimization, limits and checkpoints.
        easy_batches: so many batches at first hold short utterances only, unmasked, where CTC finds its
            alignments soonest (after Amodei et al. 2016, Deep Speech 2, section 3.2); 0 = none.
        easy_seconds: longest utterance in them.
        avg: how many of the newest checkpoints an export averages.
        valid_utterances: how many utterances a validation takes; 0 = all.
        stats_seconds: seconds of training data that the feature mean and deviation are taken from.
        device: "auto", "cpu" or "cuda".
        ctc_loss: "torch", or "k2" (equal within rounding; needs k2, see tools/install_k2.sh).
        compile: fuse each layer with torch.compile (needs a C++ compiler; a minute to start, then a seventh
            faster on a CPU).
        threads: CPU threads; 0 = leave torch's choice.
        export_to: write the averaged model to this folder and do not train.
        export_dtype: "float32", "float16" or "bfloat16" of the exported weights.
    """

    data_dir: str = "data"
    corpus: str = "minibooks"
    train_split: str = "train"
    valid_split: str = "dev"
    bpe: str = ""
    data: DataOptions = field(default_factory=DataOptions)
    exp: str = "exp/ctc_aed"
    init: str = ""
    model: ModelOptions = field(default_factory=ModelOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    easy_batches: int = 0
    easy_seconds: float = 4.0
    avg: int = 3
    valid_utterances: int = 200
    stats_seconds: float = 3600.0
    device: str = "auto"
    ctc_loss: str = "torch"
    compile: bool = False
    threads: int = 0
    export_to: str = ""
    export_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        kept = self.trainer.keep_checkpoints
        check(
            1 <= self.avg <= kept, "TrainOptions.avg", f"be in 1..{kept} (trainer.keep_checkpoints)", self.avg
        )
        for name in ("valid_utterances", "threads", "easy_batches"):
            check(getattr(self, name) >= 0, f"TrainOptions.{name}", "be at least 0", getattr(self, name))
        check(self.stats_seconds > 0, "TrainOptions.stats_seconds", "be above 0", self.stats_seconds)
        check_choice(self.export_dtype, DTYPES, "TrainOptions.export_dtype")
        check_choice(self.ctc_loss, ("torch", "k2"), "TrainOptions.ctc_loss")


def feature_statistics(
    batches: Iterable[Batch], seconds: float, device: Union[str, torch.device] = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [bins] over the first ``seconds`` of features of 10 ms.

    Args:
        batches: each process has its own share.
        seconds: of each share.
        device: of the process group, if there is one.

    Raises:
        ValueError: there is no frame.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        real = torch.arange(batch["features"].shape[1]) < batch["lens"][:, None]
        frames = batch["features"][real].double()
        count, total, squares = count + len(frames), total + frames.sum(0), squares + frames.square().sum(0)
        if count >= seconds * 100:
            break
    check(count > 0, "the training data", "hold at least one feature frame", count)
    sums = torch.stack((torch.full_like(total, count), total, squares)).double().to(device)
    count, total, squares = sum_tensor(sums).cpu()
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-6).sqrt().float()


class Curriculum:
    """Some batches of an easy source, then all of a full one; a BatchSource.

    Args:
        easy: goes round as often as needed.
        full: what follows.
        batches: how many easy ones.
    """

    def __init__(self, easy: TrainBatches, full: TrainBatches, batches: int) -> None:
        self.easy, self.full, self.batches = easy, full, batches
        self.given = 0

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The utterances that could not be read so far."""
        return [*self.easy.skipped, *self.full.skipped]

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the easy batches and of the full source's epoch."""
        while self.given < self.batches:
            before = self.given
            for batch in self.easy:
                self.given += 1
                yield batch
                if self.given >= self.batches:
                    break
            if self.given == before:
                raise ValueError("TrainOptions.easy_seconds must leave some utterance, but leaves none")
        yield from self.full

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was yielded last."""
        return {"given": self.given, "easy": self.easy.state_dict(), "full": self.full.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.given = state["given"]
        self.easy.load_state_dict(state["easy"])
        self.full.load_state_dict(state["full"])


def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the loss summed over tokens, the number of tokens, and summed parts (a LossFunction)."""
    core: CtcAed = getattr(model, "module", model)
    targets = batch["tokens"]
    tokens = max(sum(map(len, targets)), 1)
    if not core.training:
        return validation_loss(core, batch, tokens)
    loss, info = model(batch["features"], batch["lens"], targets)
    parts = {name: info[name] * tokens for name in ("ctc", "ctc_middle", "attention") if name in info}
    return (
        loss * tokens,
        tokens,
        {**parts, "impossible": info["impossible"], "seconds": sum(batch["seconds"])},
    )


def validation_loss(model: CtcAed, batch: Batch, tokens: int) -> tuple[Tensor, int, dict[str, Any]]:
    """As ``compute_loss``: joint loss without the auxiliary part; word errors of greedy CTC decoding."""
    frames, lens = model.encoder(batch["features"], batch["lens"])
    log_probs = model.ctc_log_probs(frames)
    blank, weight = model.options.blank_id, model.options.ctc_weight
    losses = model.ctc.row_losses
    ctc, impossible = ctc_loss_sum(log_probs, lens, batch["tokens"], blank, losses)
    attention = model.decoder_loss(frames, lens, batch["tokens"]) * tokens
    hypotheses = [model.tokens.decode(pieces) for pieces in greedy_pieces(log_probs, lens, blank)]
    errors = [count_errors(text, found) for text, found in zip(batch["texts"], hypotheses)]
    parts = {
        "ctc": ctc,
        "attention": attention,
        "impossible": impossible,
        "word_errors": sum(e.insertions + e.deletions + e.substitutions for e in errors),
        "words": sum(e.words for e in errors),
    }
    return weight * ctc + (1 - weight) * attention, tokens, parts


def describe(means: dict[str, float]) -> dict[str, float]:
    """Add the word error rate (%) of greedy CTC decoding to validation means a token."""
    return {"greedy_wer": 100 * means["word_errors"] / max(means["words"], 1e-9)}


def export(options: TrainOptions, folder: str) -> list[Path]:
    """Write the average of the newest checkpoints of ``options.exp`` as a model folder; return their paths.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    paths = list_checkpoints(options.exp)[-options.avg :]
    if not paths:
        raise FileNotFoundError(f"{options.exp} holds no checkpoint-STEP.pt to export")
    model = CtcAed(options.model, bpe_path(options))
    model.load_state_dict(average_checkpoints(paths))
    save(model, folder, None if options.export_dtype == "float32" else getattr(torch, options.export_dtype))
    return paths


def bpe_path(options: TrainOptions) -> Path:
    """Return where the SentencePiece model is."""
    return Path(options.bpe) if options.bpe else Path(options.data_dir) / "lang_bpe_500"


def run(options: TrainOptions) -> int:
    """Train (or go on training) and export; return 0, or 4 when it was stopped before its last step.

    Raises:
        FileNotFoundError, ValueError: data or vocabulary are missing or do not fit each other.
        RuntimeError: the loss was not finite too often.
    """
    if options.export_to:
        names = ", ".join(path.name for path in export(options, options.export_to))
        print(f"wrote the average of {names} to {options.export_to}", file=sys.stderr)
        return 0
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    rank, world, device = init_distributed(options.device)
    trainer = make_trainer(options, device, rank, world)
    result = trainer.run()
    report_skipped(trainer, Path(options.exp) / "skipped.json")
    if rank == 0:
        print(result, file=sys.stderr)
    return 0 if result["reason"] == "max_steps" else STOPPED


def report_skipped(trainer: Trainer, path: Path) -> None:
    """Write what could not be read, by any process, and print how much; nothing if all could."""
    mine = [*trainer.train_batches.skipped, *trainer.valid_batches.skipped]
    shares = gather_over_processes(mine)
    entries = list({(e.get("kind"), e["id"]): e for share in shares for e in share}.values())
    if trainer.rank == 0 and entries:
        noise = sum(entry.get("kind") == "noise" for entry in entries)
        counts = {"utterances": len(entries) - noise, "noise": noise}
        write_json(path, {**counts, "skipped": entries[:LISTED]})
        said = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        print(f"{said} could not be read, see {path}", file=sys.stderr)


def begin_from(model: CtcAed, folder: str) -> None:
    """Take over the weights of a model folder.

    Raises:
        FileNotFoundError, ValueError: it is no acoustic model folder, or its model has another shape or
            vocabulary.
    """
    given = load(folder)
    for part in ("encoder", "decoder", "vocab_size", "blank_id", "sos_eos_id"):
        wanted, found = (_without_dropout(getattr(m.options, part)) for m in (model, given))
        check(found == wanted, f"TrainOptions.init {folder}: {part}", f"be {wanted}", found)
    if given.tokens is not None and model.tokens is not None:
        same = given.tokens.fingerprint() == model.tokens.fingerprint()
        check(same, f"TrainOptions.init {folder}", "have the pieces of TrainOptions.bpe", given.bpe)
    model.load_state_dict(given.state_dict())


def _without_dropout(value: Any) -> Any:
    return dataclasses.replace(value, dropout=0.0) if hasattr(value, "dropout") else value


def compile_layers(model: CtcAed) -> None:
    """Fuse each layer of encoder and decoder by itself, for batches of any shape."""
    for layer in (*(layer for stack in model.encoder.stacks for layer in stack), *model.decoder.layers):
        layer.compile(dynamic=True)


def use_k2_loss(model: CtcAed) -> None:
    """Let k2 compute the CTC losses of a model.

    Raises:
        Unavailable: there is no k2 that works; with the remedy.
        ValueError: the blank is not piece 0, as k2 has it.
    """
    load_k2()
    blank = model.options.blank_id
    check(blank == 0, "ModelOptions.blank_id", "be 0 for TrainOptions.ctc_loss k2", blank)
    model.ctc.row_losses = model.middle_ctc.row_losses = ctc_loss_rows


def make_trainer(options: TrainOptions, device: torch.device, rank: int = 0, world: int = 1) -> Trainer:
    """Put together model, batches and loop; the model of a new training gets the features' statistics."""
    torch.manual_seed(options.trainer.seed)
    model = CtcAed(options.model, bpe_path(options))
    folder = Path(options.data_dir) / "fbank"
    train, valid = (
        cuts_path(folder, split, options.corpus) for split in (options.train_split, options.valid_split)
    )
    plain = dataclasses.replace(options.data, frequency_warp=0.0, spec_augment=False, noise="")
    if list_checkpoints(options.exp):
        pass  # the loop goes on from the newest
    elif options.init:
        begin_from(model, options.init)
    else:
        source = TrainBatches(train, dataclasses.replace(plain, workers=0))
        mean, deviation = feature_statistics(source, options.stats_seconds, device)
        model.encoder.mean.copy_(mean)
        model.encoder.deviation.copy_(deviation)
    if rank == 0:
        size, encoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.encoder))
        print(f"{size:.2f}M parameters ({encoder:.2f}M encoder), {device}", file=sys.stderr, flush=True)
    untrained = [model.decoder] if options.model.ctc_weight == 1 else []
    untrained += [model.middle_norm, model.middle_ctc] if options.model.middle_weight == 0 else []
    if options.ctc_loss == "k2":
        use_k2_loss(model)
    for part in untrained:  # data parallel waits for the gradient of whatever asks for one
        part.requires_grad_(False)
    if options.compile:
        check_compiler(device, "TrainOptions.compile")
        compile_layers(model)
    encode = model.tokens.encode
    longest = min(options.easy_seconds, options.data.max_seconds)
    short = dataclasses.replace(plain, max_seconds=longest)
    easy, full = TrainBatches(train, short, encode), TrainBatches(train, options.data, encode)
    return Trainer(
        options.trainer,
        model.to(device),
        compute_loss,
        Curriculum(easy, full, options.easy_batches),
        EvalBatches(valid, options.data, encode, options.valid_utterances or None, rank=rank, world=world),
        options.exp,
        device=device,
        on_save=lambda step: export(options, str(Path(options.exp) / "export")),
        describe=describe,
    )
