"""Any Hugging Face causal LM as a scorer of token trees.
Knows: transformers, tokens, devices. Must not know: acoustic models, search, fusion.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Sequence, Union

import torch
from torch import Tensor

from icefall_fusion.common.checks import check, check_text, is_count
from icefall_fusion.common.files import PathLike
from icefall_fusion.lm.loading import (
    Vocabulary,
    attention_window,
    check_tree,
    load_model,
    longest_path,
    model_source,
    use_packed_attention,
)
from icefall_fusion.lm.tree_forward import integers, run_packed
from icefall_fusion.lm.tree_memory import TreeCache
from icefall_fusion.lm.tree_scorer import TreeOptions, TreeScorer

if TYPE_CHECKING:
    from icefall_fusion.lm.fused import FusedModel


class CausalLm:
    """A causal LM that scores texts and token paths (natural log) through a token tree.

    Attributes:
        tokenizer: Hugging Face tokenizer; None if the folder has ``bpe.model`` or no tokenizer.
        pieces: `AcousticTokens` when the folder has ``bpe.model`` (ids equal the acoustic ids), else None.
        vocab_size: entries of the output layer; some may be padding beyond the tokenizer's.
        bos_id: put before every text; None if the model has none (a prompt is needed then).
        eos_id: end of a text, or None.
        device: of token ids and log-probs.
        name: folder or hub name.
        packed: whether tokens of all utterances share one row without padding; else each utterance has a row.
        fused: the layers as fused kernels, for the Llama family on a GPU; else None.
        fused_failure: on a GPU, why the layers are not fused, with the traceback of what failed.
        window: sliding attention window in tokens, or None.
        max_tokens: longest path in tokens, where positions have an end; else None.
    """

    tree_kind = TreeScorer

    def __init__(self, model: Any, vocabulary: Vocabulary, name: str, self_check: bool = True) -> None:
        """Wrap a loaded model; usually called by `from_pretrained`."""
        self.model, self.name = model.eval(), name
        self.tokenizer, self.pieces = vocabulary.tokenizer, vocabulary.pieces
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(config.vocab_size)
        self.layers = int(config.num_hidden_layers)
        self.device = model.get_input_embeddings().weight.device
        self.window, self._mixed = attention_window(config, name)
        self.max_tokens = longest_path(model, config)
        self.packed = use_packed_attention(model)
        self.fused: Optional[FusedModel] = None
        self.fused_failure: Optional[str] = None
        for what, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            check(token is None or 0 <= token < self.vocab_size, f"{what} id of {name}",
                  f"lie between 0 and {self.vocab_size - 1}", token)
        size = len(self.tokenizer) if self.tokenizer is not None else self.pieces.size if self.pieces else 0
        check(size <= self.vocab_size, f"tokenizer of {name}", f"have no more entries than the model's "
              f"{self.vocab_size}", size)
        if self.device.type == "cuda":
            # cuDNN's attention plans each new shape anew, and nearly every event has a new shape
            torch.backends.cuda.enable_cudnn_sdp(False)
            if self.packed:
                from icefall_fusion.lm.fused_loading import use_fused_kernels

                self.fused_failure = use_fused_kernels(self)
        if self_check and self.fused is None:
            check_tree(self)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: PathLike,
        dtype: Union[torch.dtype, str] = torch.float32,
        device: Union[torch.device, str] = "cpu",
        device_map: Any = None,
        quantization: Optional[str] = None,
        self_check: bool = True,
        adapter: Optional[PathLike] = None,
        bos_token: Optional[str] = None,
        eos_token: Optional[str] = None,
    ) -> CausalLm:
        """Load a model folder, a GGUF file, a hub name or a LoRA adapter with its base.

        Args:
            path_or_name: folder with config.json, weights and tokenizer (or ``bpe.model``); a ``.gguf`` file,
                which is converted once into the cache; either as ``package:NAME/FILE``; a hub name; or a PEFT
                folder, which names its base.
            dtype: torch dtype, its name, "auto" (as saved), or "fast" (see `fast_dtype`).
            device: the model's device; not used with ``device_map``.
            device_map: as in transformers, e.g. "auto" to spread over GPUs and host (needs accelerate).
            quantization: None; "8bit" or "4bit" (by bitsandbytes); "int8" (weights alone, by torchao).
            self_check: compare a random tree with plain forwards and refuse a model that disagrees.
            adapter: PEFT folder of a LoRA adapter to add to the weights (not with ``quantization``); one
                with ``bpe.model`` gives the model that vocabulary.
            bos_token, eos_token: what starts and ends a text: a token or the text of one; None: as the
                tokenizer says. For chat models that is rarely best.
        Raises:
            FileNotFoundError: no such folder or file, or no config in it.
            ValueError: not a causal LM, a GGUF file that is broken or of an unknown kind, missing weights,
                a tokenizer that contradicts its own files, or a model whose tree forward differs from its
                plain forward (ALiBi models such as BLOOM); an adapter that was made for another model.
            ImportError: an optional package is needed; the message says which.
        """
        base, adapter = _base_and_adapter(path_or_name, adapter)
        source = model_source(base)
        model = load_model(source, dtype, device, device_map, quantization, adapter)
        vocabulary = Vocabulary.load(_tokens_of(source, adapter), model.config)
        vocabulary = vocabulary.with_marks(bos_token, eos_token, source)
        return cls(model, vocabulary, str(path_or_name), self_check)

    @property
    def kv_bytes_a_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        config = self.model.config.get_text_config(decoder=True)
        heads = int(config.num_attention_heads)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return 2 * self.layers * key_heads * head_size * self.model.dtype.itemsize

    # --- texts -------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, no bos, no eos."""
        check_text(text, "text")
        if self.pieces is not None:
            return self.pieces.encode(text)
        check(self.tokenizer is not None, f"model {self.name}", "have a tokenizer to score text", None)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_prob(self, text: str, prompt: Optional[str] = None, eos: bool = False) -> float:
        """Return log P(text | prompt), natural log; with ``eos`` also the end of the text.

        Prompt and text are tokenized apart. A tokenizer that puts no space before a text (byte-level BPE)
        needs the text after a prompt to begin with one.
        """
        return self.log_probs([text], prompt, eos)[0]

    def log_probs(self, texts: Sequence[str], prompt: Optional[str] = None, eos: bool = False) -> list[float]:
        """Return `log_prob` of each text; shared beginnings are forwarded once."""
        good = isinstance(texts, Sequence) and not isinstance(texts, str)
        check(good, "texts", "be a list of texts, not one text", texts)
        if prompt is not None:
            check_text(prompt, "prompt")
        prompts = None if prompt is None else [self.encode(prompt)]
        scorer = self.open_tree(1, prompts, TreeOptions(max_forward_tokens=512))
        ends = [scorer.insert(scorer.root(0), self.encode(text)) for text in texts]
        return scorer.score(ends, eos=eos).tolist() if ends else []

    @torch.inference_mode()
    def token_log_probs(
        self, paths: Sequence[Sequence[int]], prompt: Sequence[int] = (), eos: bool = False
    ) -> list[list[float]]:
        """Return log P of each token of each path, one plain forward a path: the slow twin of the tree.

        Args:
            paths: token ids after bos and prompt.
            prompt: token ids before each path.
            eos: add log P(eos) as the last entry.
        """
        start = self.start_ids(prompt)
        result = []
        check(isinstance(paths, Sequence), "paths", "be a list of token ids for each path", paths)
        for path in paths:
            tokens = [*start, *integers(path, "paths").tolist()] + ([self.eos_id] if eos else [])
            logits = self.model(torch.tensor([tokens], device=self.device), use_cache=False).logits[0]
            log_probs = torch.log_softmax(logits[len(start) - 1 : -1].float(), dim=-1)
            following = torch.tensor(tokens[len(start) :], dtype=torch.long, device=log_probs.device)
            result.append(log_probs.gather(1, following[:, None])[:, 0].tolist())
        return result

    # --- the tree ----------------------------------------------------------------------------------------

    def open_tree(
        self,
        batch: int,
        prompts: Optional[Sequence[Sequence[int]]] = None,
        options: Optional[TreeOptions] = None,
        aside: bool = False,
        names: Optional[Sequence[str]] = None,
    ) -> TreeScorer:
        """Return a tree for ``batch`` utterances.

        Args:
            batch: B, number of utterances.
            prompts: token ids after bos, one list for each utterance (earlier text, instructions).
            options: bounds on memory.
            aside: on a GPU, run the model at the same time as the caller's code (see `TreeScorer.launch`).
            names: of the utterances, for a model that remembers them (remembered.py); of no use here.
        """
        check(is_count(batch), "batch", "be an integer, at least 1", batch)
        prompts = [()] * batch if prompts is None else prompts
        check(isinstance(prompts, Sequence), "prompts", "be a list of token ids for each utterance", prompts)
        check(len(prompts) == batch, "prompts", f"be one for each of the {batch} utterances", len(prompts))
        starts = [self.start_ids(prompt) for prompt in prompts]
        options = TreeOptions() if options is None else options
        check(isinstance(options, TreeOptions), "options", "be TreeOptions", options)
        return self.tree_kind(self, starts, options, aside)

    def tree_logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        window_mask: Optional[Tensor],
        cache: TreeCache,
        wanted: Tensor,
    ) -> Tensor:
        """Return logits [n, V] after the tokens of index ``wanted`` [n]; writes the cache at its plan.

        Args:
            tokens, positions: [Q] ids and depths.
            mask: [R, 1, W, S] bool, True where a token sees a slot.
            window_mask: the same for layers with a sliding window; None while no path is longer than it.
            cache: keys and values by slot, with its plan set.
            wanted: [n] index into the Q tokens.
        """
        plan, (rows, _, width, _) = cache.plan, mask.shape
        arguments = {"past_key_values": cache, "use_cache": True}
        arguments["attention_mask"] = self._masks(mask, window_mask)
        if plan.packed:
            arguments.update(input_ids=tokens[None], position_ids=positions[None], logits_to_keep=wanted)
            with run_packed(plan):
                return self.model(**arguments).logits[0]
        _, _, valid, padded = plan.on(tokens.device)
        shape = (rows, width)
        logits = self.model(
            input_ids=tokens[padded].view(shape), position_ids=positions[padded].view(shape), **arguments
        ).logits
        return logits.flatten(0, 1)[valid[wanted]]

    def _masks(self, mask: Tensor, window_mask: Optional[Tensor]) -> Union[Tensor, dict[str, Tensor]]:
        if self.model.config._attn_implementation == "eager":  # adds its mask to the logits
            mask, window_mask = self._additive(mask), self._additive(window_mask)
        if window_mask is None:
            return mask
        if self._mixed:
            return {"full_attention": mask, "sliding_attention": window_mask}
        return window_mask

    def _additive(self, mask: Optional[Tensor]) -> Optional[Tensor]:
        if mask is None:
            return None
        zeros = torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device)
        return zeros.masked_fill_(~mask, torch.finfo(self.model.dtype).min)

    def start_ids(self, prompt: Sequence[int]) -> list[int]:
        """Return bos and the token ids of a prompt."""
        start = [] if self.bos_id is None else [self.bos_id]
        start += integers(prompt, "prompt").tolist()
        check(len(start) > 0, "prompt", f"hold at least one token, as {self.name} has no bos", list(prompt))
        return start


def _base_and_adapter(path_or_name: PathLike, adapter: Optional[PathLike]) -> tuple[PathLike, Any]:
    """Return the model and the adapter of it; a PEFT folder in the place of a model names its base itself.

    Raises:
        ValueError: ``adapter`` is set for a path that is an adapter.
    """
    folder = Path(path_or_name) if isinstance(path_or_name, (str, os.PathLike)) else Path("-")
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return path_or_name, adapter
    check(adapter is None, "adapter", f"be left out, as {folder} is an adapter itself", str(adapter))
    from icefall_fusion.lm.adapters import base_of

    return base_of(folder), folder


def _tokens_of(source: str, adapter: Optional[PathLike]) -> PathLike:
    """Return the folder or hub name that has the vocabulary: an adapter may bring its own."""
    if adapter is None:
        return source
    from icefall_fusion.lm.adapters import has_pieces

    return adapter if has_pieces(adapter) else source
