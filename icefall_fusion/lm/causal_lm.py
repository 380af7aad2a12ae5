"""Any Hugging Face causal LM as a scorer of token trees.
Knows: transformers, tokens, devices. Must not know: acoustic models, search, fusion.
"""
from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Optional, Sequence, Union

import torch
from safetensors import SafetensorError
from torch import Tensor

from icefall_fusion.common.checks import check, check_choice, check_text, is_count
from icefall_fusion.common.files import PathLike
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lm import packed_attention
from icefall_fusion.lm.self_check import check_tree
from icefall_fusion.lm.token_tree import integers
from icefall_fusion.lm.tree_cache import TreeCache
from icefall_fusion.lm.tree_scorer import TreeOptions, TreeScorer
from icefall_fusion.lm.vocabulary import Vocabulary, check_folder

if TYPE_CHECKING:
    from icefall_fusion.lm.fused import FusedModel

LAYER_TYPES = {"full_attention", "sliding_attention"}
QUANTIZATIONS = (None, "8bit", "4bit", "int8")


class CausalLm:
    """A causal LM that scores texts and token paths (natural log) through a token tree.

    Attributes:
        tokenizer: Hugging Face tokenizer; None when the folder has ``bpe.model`` or no tokenizer at all.
        pieces: `AcousticTokens` when the folder has ``bpe.model`` (ids equal the acoustic ids), else None.
        vocab_size: entries of the output layer (may exceed the tokenizer's, padding).
        bos_id: put before every text; None when the model has none (then a prompt is needed).
        eos_id: end of a text, or None.
        device: where token ids go in and log-probs come out.
        name: folder or hub name.
        packed: whether tokens of all utterances share one unpadded row (`sdpa` attention), else one row each.
        fused: runs the layers by fused kernels, on a GPU, for models of the Llama family; else None.
        window: sliding attention window in tokens, or None.
        max_tokens: longest path in tokens that positions allow, or None (rotary positions have no table).
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, name: str, self_check: bool = True) -> None:
        """Wrap a loaded model; see `from_pretrained` for the usual way in."""
        self.model, self.name = model.eval(), name
        self.tokenizer, self.pieces = vocabulary.tokenizer, vocabulary.pieces
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        config = model.config.get_text_config(decoder=True)
        self.vocab_size = int(config.vocab_size)
        self.layers = int(config.num_hidden_layers)
        self.device = model.get_input_embeddings().weight.device
        self.window, self._mixed = _window(config, name)
        self.max_tokens = _max_tokens(model, config)
        self.packed = _use_packed_attention(model)
        self.fused: Optional[FusedModel] = None
        for what, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            check(token is None or 0 <= token < self.vocab_size, f"{what} id of {name}",
                  f"lie between 0 and {self.vocab_size - 1}", token)
        size = len(self.tokenizer) if self.tokenizer is not None else self.pieces.size if self.pieces else 0
        check(size <= self.vocab_size, f"tokenizer of {name}", f"have no more entries than the model's "
              f"{self.vocab_size}", size)
        if self.device.type == "cuda":
            # cuDNN's attention makes a plan for each new shape, and nearly each event of a tree has one
            torch.backends.cuda.enable_cudnn_sdp(False)
            if self.packed:
                self._use_fused_kernels()
        if self_check and self.fused is None:
            check_tree(self)

    def _use_fused_kernels(self) -> None:
        """Run the layers by fused kernels where the model allows it and they score as plain forwards do."""
        from icefall_fusion.lm.fused import FusedModel, check_fusible

        try:
            check_fusible(self.model)
            self.fused = FusedModel(self.model)
            self.fused.try_kernels()
            check_tree(self)
        except Unavailable as reason:
            logging.info("%s runs as transformers runs it: %s", self.name, reason)
        except Exception:  # of a compiler or a driver: any
            self.fused = None
            told = "%s runs as transformers runs it, which takes the host longer: fused kernels fail"
            logging.warning(told, self.name, exc_info=True)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: PathLike,
        dtype: Union[torch.dtype, str] = torch.float32,
        device: Union[torch.device, str] = "cpu",
        device_map: Any = None,
        quantization: Optional[str] = None,
        self_check: bool = True,
    ) -> CausalLm:
        """Load a model folder or a hub name.

        Args:
            path_or_name: folder with config.json, weights and tokenizer (or ``bpe.model``), or a hub name.
            dtype: torch dtype, its name, or "auto" (as saved).
            device: where the model goes, unless ``device_map`` is given.
            device_map: as in transformers, e.g. "auto" to spread over GPUs and host (needs accelerate).
            quantization: None; "8bit" or "4bit" (by bitsandbytes); "int8" (weights alone, by torchao).
            self_check: compare a random tree with plain forwards and refuse a model that disagrees.
        Raises:
            FileNotFoundError: no such folder, or no config.json in it.
            ValueError: not a causal LM, missing weights, a tokenizer that contradicts its own files, or a
                model whose tree forward differs from its plain forward (ALiBi models such as BLOOM).
            ImportError: an optional package is needed; the message says which.
        """
        model = _load(path_or_name, dtype, device, device_map, quantization)
        return cls(model, Vocabulary.load(path_or_name, model.config), str(path_or_name), self_check)

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

        Prompt and text are tokenized apart: where the tokenizer puts no space before a text of its own
        (byte-level BPE), a text that goes on after a prompt has to begin with one.
        """
        return self.log_probs([text], prompt, eos)[0]

    def log_probs(self, texts: Sequence[str], prompt: Optional[str] = None, eos: bool = False) -> list[float]:
        """Return `log_prob` of each text; beginnings that texts share are forwarded once."""
        check(not isinstance(texts, str), "texts", "be a list of texts, not one text", texts)
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
        """Return log P of each token of each path, by one plain forward each: the slow twin of the tree.

        Args:
            paths: token ids after bos and prompt.
            prompt: token ids before each path.
            eos: add log P(eos) as the last entry.
        """
        start = self._start(prompt)
        result = []
        for path in paths:
            tokens = [*start, *path] + ([self.eos_id] if eos else [])
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
    ) -> TreeScorer:
        """Return a tree for ``batch`` utterances.

        Args:
            batch: B, number of utterances.
            prompts: token ids after bos, one list for each utterance (earlier text, instructions).
            options: bounds on memory.
            aside: on a GPU run the model beside what the caller does (see ``TreeScorer.launch``).
        """
        check(is_count(batch), "batch", "be an integer, at least 1", batch)
        prompts = [()] * batch if prompts is None else prompts
        check(len(prompts) == batch, "prompts", f"be one for each of the {batch} utterances", len(prompts))
        starts = [self._start(prompt) for prompt in prompts]
        return TreeScorer(self, starts, options or TreeOptions(), aside)

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
        if plan.packed and self.fused is not None:
            return self.fused.logits(tokens, positions, mask, window_mask, cache, wanted)
        if plan.packed:
            arguments.update(input_ids=tokens[None], position_ids=positions[None], logits_to_keep=wanted)
            with packed_attention.running(plan):
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

    def _start(self, prompt: Sequence[int]) -> list[int]:
        start = [] if self.bos_id is None else [self.bos_id]
        start += integers(prompt, "prompt").tolist()
        check(len(start) > 0, "prompt", f"hold at least one token, as {self.name} has no bos", list(prompt))
        return start


def _load(
    path_or_name: PathLike, dtype: Any, device: Any, device_map: Any, quantization: Optional[str]
) -> Any:
    """Return the transformers model; see `CausalLm.from_pretrained`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = str(path_or_name)
    check_folder(name)
    options = {"dtype": dtype, "device_map": device_map, **_quantization(quantization)}
    if device_map is not None and find_spec("accelerate") is None:
        raise ImportError("device_map needs the package accelerate: pip install accelerate")
    if quantization is not None and device_map is None:
        options["device_map"] = {"": device}  # quantized weights are made on their device
    options = {key: value for key, value in options.items() if value is not None}
    try:
        config = AutoConfig.from_pretrained(name)
        kind = config.model_type
        check(not config.is_encoder_decoder, f"model {name}", "be a causal LM, not an encoder-decoder", kind)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, config=config, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be loaded as a causal LM: {error}") from error
    missing = sorted(info["missing_keys"])
    check(not missing, f"weights of {name}", "be complete, but these are missing", missing[:5])
    return model if "device_map" in options else model.to(device)


def _quantization(quantization: Optional[str]) -> dict[str, Any]:
    if quantization is None:
        return {}
    check_choice(quantization, QUANTIZATIONS[1:], "quantization")
    by_torchao = quantization == "int8"
    package = "torchao" if by_torchao else "bitsandbytes"
    if (find_spec("torchao") if by_torchao else find_spec("bitsandbytes")) is None:
        raise ImportError(f"quantization {quantization!r} needs {package}: pip install {package}")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if by_torchao:
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    elif quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config}


def _use_packed_attention(model: Any) -> bool:
    """Switch an `sdpa` model to packed attention; return whether the model can follow."""
    if model.config._attn_implementation not in ("sdpa", packed_attention.NAME):
        return False
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # sdpa leaves the cap out; newer transformers choose this too
        return False
    if not getattr(model, "_supports_attention_backend", False):  # its attention is a class of its own
        return False
    model.set_attn_implementation(packed_attention.NAME)
    return True


def _window(config: Any, name: str) -> tuple[Optional[int], bool]:
    """Return (sliding window in tokens or None, whether some layers have one and some not)."""
    types = set(getattr(config, "layer_types", None) or ())
    check(types <= LAYER_TYPES, f"layers of {name}", f"be of types {sorted(LAYER_TYPES)}", sorted(types))
    alibi = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    check(not alibi, f"positions of {name}", "be given by position ids, not by ALiBi", "alibi")
    window = getattr(config, "sliding_window", None)
    if types:
        return (window, len(types) > 1) if "sliding_attention" in types else (None, False)
    return (window if getattr(config, "use_sliding_window", True) else None), False


def _max_tokens(model: Any, config: Any) -> Optional[int]:
    """Return the longest path: a table of positions has an end; some rotary scalings depend on the length."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") in ("dynamic", "longrope"):
        return int(rope.get("original_max_position_embeddings") or limit)
    inputs = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not inputs]
    return int(limit) if limit and any(table.num_embeddings >= limit for table in tables) else None
