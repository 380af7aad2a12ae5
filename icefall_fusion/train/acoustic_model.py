"""Job ``train``: the CTC-AED acoustic model from lhotse cuts with features, exported as a model folder.
Knows: the acoustic model, batches, the training loop. Must not know: language models, search, fusion.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from icefall_fusion.acoustic.models import CtcAed, ModelOptions, save
from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.files import write_json
from icefall_fusion.common.processes import check_compiler, gather_over_processes
from icefall_fusion.data.datamodule import DataOptions, EvalBatches, TrainBatches
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.data.resident import FeatureStore
from icefall_fusion.text.language import language_of
from icefall_fusion.train.acoustic_loss import compute_loss, describe, use_k2_losses
from icefall_fusion.train.checkpoints import average_checkpoints, list_checkpoints, load_checkpoint
from icefall_fusion.train.curriculum import Curriculum, feature_statistics
from icefall_fusion.train.encoder_cache import check_cache, keep_frames
from icefall_fusion.train.init_weights import freeze_parts, start_from
from icefall_fusion.train.job import check_export, report_size, run_training
from icefall_fusion.train.loop import Trainer
from icefall_fusion.train.options import TrainingOptions
from icefall_fusion.train.spelling import check_spelling

LISTED = 10_000  # at most so many unreadable utterances are listed


@dataclass(frozen=True)
class TrainOptions(TrainingOptions):
    """Train the acoustic model; run again with the same options to go on after a stop.

    Args:
        data_dir: folder with ``fbank/CORPUS_cuts_SPLIT.jsonl.gz`` and ``lang_bpe_500/``.
        corpus: first word of the manifests' names.
        train_split: split to train on.
        valid_split: split to validate on.
        bpe: the SentencePiece model, or its folder; empty: ``lang_bpe_500`` of ``data_dir``.
        data: batches and augmentation.
        exp: folder of checkpoints, logs and ``export/``.
        init: acoustic model folder whose weights and feature statistics a new training starts from (set
            ``easy_batches`` to 0 then); heads that it lacks start from random weights. Empty: all do.
        init_encoder: take the encoder of ``init`` alone: its pieces may be others, as for another language.
        model: shape and loss.
        heads: in place of ``model.heads``, with commas: "ctc,aed,transducer"; empty: those.
        freeze: parts that are not trained, of encoder and the heads, with commas: "encoder,ctc,aed" trains a
            new transducer head on an encoder of ``init``.
        encoder_cache: folder for the frames of a frozen encoder, made once, before the first step, and read
            in place of features from then on (encoder_cache.py); without augmentation. Empty: none.
        easy_batches: number of first batches that hold short utterances only, unmasked, where CTC finds its
            alignments soonest (after Amodei et al. 2016, Deep Speech 2, section 3.2); 0 = none.
        easy_seconds: longest utterance in them.
        avg: number of newest checkpoints that an export averages.
        export_weights: "average" of the newest ``avg`` checkpoints, or "ema": the moving average
            (``trainer.ema_decay``) of the newest one.
        export_shards: largest file of exported weights, e.g. "15MB"; empty: one file.
        valid_utterances: number of utterances in a validation; 0 = all.
        stats_seconds: seconds of training data from which feature mean and deviation are computed.
        ctc_loss: "torch", or "k2" (equal within rounding; needs k2, see tools/install_k2.sh).
        transducer_loss: "torchaudio", or "k2" (equal within rounding).
        compile: fuse each layer with torch.compile (needs a C++ compiler on a CPU; a minute to start, then
            a seventh faster).
        export_to: write the averaged model to this folder and do not train.
        language: ISO 639 code of the text, e.g. en, es, zh; kept with the model.
        normalizer: module:function from a text to its spoken words; empty: that of the language.
    """

    data_dir: str = "data"
    corpus: str = "minibooks"
    train_split: str = "train"
    valid_split: str = "dev"
    bpe: str = ""
    data: DataOptions = field(default_factory=DataOptions)
    exp: str = "exp/ctc_aed"
    model: ModelOptions = field(default_factory=ModelOptions)
    heads: str = ""
    freeze: str = ""
    encoder_cache: str = ""
    easy_batches: int = 0
    easy_seconds: float = 4.0
    avg: int = 3
    export_weights: str = "average"
    export_shards: str = ""
    valid_utterances: int = 200
    stats_seconds: float = 3600.0
    init_encoder: bool = False
    ctc_loss: str = "torch"
    transducer_loss: str = "torchaudio"
    export_to: str = ""
    language: str = "en"
    normalizer: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads:
            heads = tuple(head.strip() for head in self.heads.split(","))
            object.__setattr__(self, "model", dataclasses.replace(self.model, heads=heads))
        rule = "be empty without TrainOptions.init: parts of random weights would never be trained"
        check(not self.freeze or bool(self.init), "TrainOptions.freeze", rule, self.freeze)
        if self.encoder_cache:
            check_cache(self)
        kept = self.trainer.keep_checkpoints
        rule = f"be in 1..{kept} (trainer.keep_checkpoints)"
        check(1 <= self.avg <= kept, "TrainOptions.avg", rule, self.avg)
        check_at_least(0, self, "valid_utterances", "easy_batches")
        rule = "be left alone without TrainOptions.init"
        check(not self.init_encoder or bool(self.init), "TrainOptions.init_encoder", rule, self.init_encoder)
        check(self.stats_seconds > 0, "TrainOptions.stats_seconds", "be above 0", self.stats_seconds)
        language_of(self.language, self.normalizer)
        check_choice(self.ctc_loss, ("torch", "k2"), "TrainOptions.ctc_loss")
        check_choice(self.transducer_loss, ("torchaudio", "k2"), "TrainOptions.transducer_loss")
        check_choice(self.export_weights, ("average", "ema"), "TrainOptions.export_weights")
        averaged = self.export_weights == "average" or self.trainer.ema_decay > 0
        rule = "be above 0 for export_weights ema"
        check(averaged, "TrainOptions.trainer.ema_decay", rule, self.trainer.ema_decay)


def export(options: TrainOptions, folder: str) -> list[Path]:
    """Write the averaged weights of ``options.exp`` as a model folder; return the paths of their checkpoints.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the weights do not fit ``options.export_dtype``; nothing is written.
    """
    paths = list_checkpoints(options.exp)[-(1 if options.export_weights == "ema" else options.avg) :]
    if not paths:
        raise FileNotFoundError(f"{options.exp} holds no checkpoint-STEP.pt to export")
    model = new_model(options)
    model.load_state_dict(exported_weights(options, paths))
    check_export(model.eval(), options.export_dtype, log_probs_of_noise)
    save(model, folder, getattr(torch, options.export_dtype), options.export_shards or None)
    return paths


def exported_weights(options: TrainOptions, paths: list[Path]) -> dict[str, Tensor]:
    """Return the weights that an export has: averaged over checkpoints, or as they moved until the newest."""
    if options.export_weights == "average":
        return average_checkpoints(paths)
    state = load_checkpoint(paths[-1])
    check("ema" in state, str(paths[-1]), "hold averages for TrainOptions.export_weights ema", sorted(state))
    return {**state["model"], **state["ema"]["weights"]}


def log_probs_of_noise(model: CtcAed) -> list[Tensor]:
    """Return log-probs [B,T,...,V] of the CTC and transducer heads for noise with the features' statistics.

    Those of the attention decoder for a text's first piece stand for a model that has neither.
    """
    noise = torch.randn(2, 400, model.options.encoder.bins, generator=torch.Generator().manual_seed(0))
    features = noise * model.encoder.deviation + model.encoder.mean
    frames, lens = model.encoder(features, torch.tensor([400, 400]))
    found, head = [], model.transducer
    if model.ctc is not None:
        found.append(model.ctc_log_probs(frames))
    if head is not None:
        states = head.predict(torch.tensor([head.start]))
        found.append(head.join(head.project(frames), states))
    if model.decoder is not None and not found:
        start = torch.full((2, 1, 1), model.options.sos_eos_id)
        found.append(model.decoder(start, frames, lens).float().log_softmax(dim=-1))
    return found


def new_model(options: TrainOptions) -> CtcAed:
    """Return the model of the options, its weights random."""
    model = CtcAed(options.model, bpe_path(options))
    model.language = language_of(options.language, options.normalizer)
    return model


def bpe_path(options: TrainOptions) -> Path:
    """Return the path of the SentencePiece model, or of its folder."""
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
    return run_training(options, make_trainer, report_skipped)


def report_skipped(trainer: Trainer) -> None:
    """Write ``skipped.json``, what any process could not read, and print how much; nothing if all could."""
    path = trainer.folder / "skipped.json"
    shares = gather_over_processes([*trainer.train_batches.skipped, *trainer.valid_batches.skipped])
    entries = list({(e.get("kind"), e["id"]): e for share in shares for e in share}.values())
    if trainer.rank == 0 and entries:
        noise = sum(entry.get("kind") == "noise" for entry in entries)
        counts = {"utterances": len(entries) - noise, "noise": noise}
        write_json(path, {**counts, "skipped": entries[:LISTED]})
        unread = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        print(f"{unread} could not be read, see {path}", file=sys.stderr)


def compile_layers(model: CtcAed) -> None:
    """Fuse each layer of encoder and decoder by itself, for batches of any shape."""
    decoder = [] if model.decoder is None else model.decoder.layers
    for layer in (*(layer for stack in model.encoder.stacks for layer in stack), *decoder):
        layer.compile(dynamic=True)


def make_model(options: TrainOptions, device: torch.device, source: TrainBatches) -> CtcAed:
    """Return the model on ``device``: a new one has the weights of ``init``, or statistics of features.

    Args:
        options: of the job.
        device: of the process group too.
        source: training batches without augmentation.
    """
    model = new_model(options)
    freeze_parts(model, options.freeze)
    if list_checkpoints(options.exp):
        pass  # the loop goes on from the newest
    elif options.init:
        start_from(model, options.init, options.init_encoder)
    else:
        mean, deviation = feature_statistics(source, options.stats_seconds, device)
        model.encoder.mean.copy_(mean)
        model.encoder.deviation.copy_(deviation)
    both = {"ctc", "aed"} <= set(model.trained_heads)
    untrained = [model.decoder] if options.model.ctc_weight == 1 and both else []
    if options.model.middle_weight == 0 and model.ctc is not None:
        untrained += [model.middle_norm, model.middle_ctc]
    for module in untrained:  # data parallel waits for the gradient of every parameter that requires one
        module.requires_grad_(False)
    use_k2_losses(model, options.ctc_loss == "k2", options.transducer_loss == "k2")
    if options.compile:
        check_compiler(device, "TrainOptions.compile")
        compile_layers(model)
    return model.to(device)


def manifest_of(options: TrainOptions, split: str) -> Path:
    """Return a split's manifest: of features, or of audio where only `DataOptions.resident` needs it."""
    stored, audio = (cuts_path(Path(options.data_dir) / folder, split, options.corpus)
                     for folder in ("fbank", "manifests"))
    return audio if options.data.resident and audio.is_file() and not stored.is_file() else stored


def stores(
    options: TrainOptions, train: Path, valid: Path, device: torch.device
) -> tuple[Optional[FeatureStore], Optional[FeatureStore]]:
    """Return the features of training and validation in the device's memory; None without `data.resident`."""
    if not options.data.resident:
        return None, None
    heard = FeatureStore(valid, device, threads=max(1, options.data.workers))
    return FeatureStore.of(train, options.data, device), heard


def make_trainer(options: TrainOptions, device: torch.device, rank: int = 0, world: int = 1) -> Trainer:
    """Build the loop with its model and batches."""
    torch.manual_seed(options.trainer.seed)
    train, valid = manifest_of(options, options.train_split), manifest_of(options, options.valid_split)
    memory, heard = stores(options, train, valid, device)
    pin = device.type == "cuda"
    plain = dataclasses.replace(options.data, frequency_warp=0.0, spec_augment=False, noise="")
    first = TrainBatches(train, dataclasses.replace(plain, workers=0), store=memory)
    model = make_model(options, device, first)
    if rank == 0:
        for path in (train, valid):
            check_spelling(path, model.tokens, model.language)
    encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    report_size(model, f" ({encoder:.2f}M encoder), {device}", rank)
    encode = model.tokens.encode
    longest = min(options.easy_seconds, options.data.max_seconds)
    short = dataclasses.replace(plain, max_seconds=longest)
    frames = keep_frames(options, train, encode, device, rank, world) if options.encoder_cache else None
    easy, full = (TrainBatches(train, data, encode, memory, pin, frames) for data in (short, options.data))
    return Trainer(
        options.trainer,
        model,
        compute_loss,
        Curriculum(easy, full, options.easy_batches),
        EvalBatches(
            valid, options.data, encode, options.valid_utterances or None, (), rank, world, heard, pin
        ),
        options.exp,
        device=device,
        on_save=lambda step: export(options, str(Path(options.exp) / "export")),
        describe=describe,
    )
