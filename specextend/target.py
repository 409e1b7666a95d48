"""Describes the model whose text is written."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import PatchedModel

#: what the layers of `peft` say of the adapters that count in their forwards
_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")

#: fields of configurations that say nothing of what a model computes from tokens
_SILENT = (
    "_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype",
    "transformers_version", "use_cache",
)  # fmt: skip

_SAMPLE = 1024  # elements of each tensor of weights that are looked at


def underlying(model: nn.Module, role: str = "model") -> PreTrainedModel:
    """Return the model of `transformers` in what users wrap it in.

    ``torch.compile(model)`` and a ``PeftModel`` are themselves none, but run one, in which adapters
    are layers: whether they are active is found there at every forward. ``generate`` of both calls
    that model's, too.

    Args:
        role: for the text of the error.

    Raises:
        TypeError: it is something else.
        ValueError: an adapter that is not in the layers.
    """
    inner = getattr(model, "_orig_mod", model)
    check_adapters(inner)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
        inner = getattr(inner, "_orig_mod", inner)
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"{role} must be a transformers model, got {type(model).__name__}")
    return inner


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters of a ``PeftModel`` that change more than layers.

    Raises:
        ValueError: with the kind of adapter.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            what = "puts keys or tokens of its own before the prompt"
        elif getattr(config, "alora_invocation_tokens", None):
            kind, what = "aLoRA", "begins to count in the middle of the prompt"
        else:
            continue
        raise ValueError(f"the adapter {name!r} ({kind}) {what}, which specextend does not follow")


def identity(model: PreTrainedModel) -> dict:
    """Say which model it is, the same in every process and on every device: its class, its dtype,
    its configuration, and its weights."""
    config = model.config.to_diff_dict().items()
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": {k: v for k, v in config if k not in _SILENT and not k.endswith("_token_id")},
        **weights_identity(model),
    }


def weights_identity(module: nn.Module) -> dict:
    """Say which weights a module has, the adapters in it and how they count.

    Of each tensor some elements are looked at, from everywhere in it, so that it takes no time;
    weights that differ in a few places alone may pass for the same. Of a tensor that has no bytes
    of its own, as on the device "meta", the shape is all that is known.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.replace("_orig_mod.", "").encode())  # of torch.compile
            _count_in(digest, tensor)
    adapters = [
        str(getattr(m, name)) for m in module.modules() for name in _ADAPTERS if hasattr(m, name)
    ]
    said = {"weights": digest.hexdigest()[:16]}
    if adapters:
        said["adapters"] = hashlib.sha256("\n".join(adapters).encode()).hexdigest()[:16]
    return said


def _count_in(digest, tensor: Tensor) -> None:
    """Have a digest depend on a tensor: its shape, its dtype, and some of its elements."""
    digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # made of others, as quantised weights are
        for name in tensor.__tensor_flatten__()[0]:
            _count_in(digest, getattr(tensor, name))
        return
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return
    plain = tensor.detach().as_subclass(Tensor).flatten()
    step = len(plain) // _SAMPLE | 1  # odd: not always the same column of a matrix
    digest.update(plain[::step].cpu().contiguous().view(torch.uint8).numpy())


class Target(PatchedModel):
    """Gives the engine and the drafts what they know of a target.

    Args:
        model: a decoder-only causal LM of `transformers`, used where it lies, or what wraps one
            (:func:`underlying`).
        score_layers: layers whose attention is scored for retrieval, counted from 0; negative ones
            count from the end among those that attend to all of the text, if any do.

    Raises:
        TypeError: ``model`` is something else.
        ValueError: a layer that it does not have.
    """

    def __init__(self, model: PreTrainedModel, score_layers: tuple[int, ...] = (-1,)):
        super().__init__(underlying(model))
        n = self.num_layers
        wrong = [i for i in score_layers if not -n <= i < n]
        if wrong:
            raise ValueError(f"score_layers must be in [{-n}, {n}) for this model, got {wrong[0]}")
        self._wanted_layers = score_layers

    @cached_property
    def score_layers(self) -> frozenset[int]:
        """Return the layers whose attention is scored, counted from 0. Tries the model on two
        tokens.

        Raises:
            ValueError: a layer that does not attend, or one before the first.
        """
        windows = self.find_windows()
        attending = [i for i, kind in enumerate(self.kinds) if kind.rows or i in windows]
        wide = [i for i in attending if not windows.get(i) and i not in self.chunks] or attending
        if not attending:
            raise ValueError(
                f"{type(self.model).__name__} does not attend: there are no scores for retrieval; "
                'use draft_cache="window" or "full"'
            )
        for i in self._wanted_layers:
            if i >= 0 and i not in attending:
                raise ValueError(f"score_layers: layer {i} of this model does not attend")
            if i < -len(wide):
                raise ValueError(f"score_layers: {i} is before the {len(wide)} layers to count")
        return frozenset(i if i >= 0 else wide[i] for i in self._wanted_layers)

    def fingerprint(self) -> int:
        """Return a number that is another one once weights were replaced or changed in place, or
        adapters switched, scaled or merged; but not where weights were changed through ``.data``.
        """
        # Rotary embeddings replace theirs as the lengths of forwards want it.
        passing = {id(t) for module in self._changing for t in module.buffers()}
        seen: list = [
            (name, id(t), t.data_ptr(), 0 if t.is_inference() else t._version)
            for name, t in (*self.model.named_parameters(), *self.model.named_buffers())
            if id(t) not in passing
        ]
        for module in self.model.modules():
            seen += [str(getattr(module, name)) for name in _ADAPTERS if hasattr(module, name)]
        return hash(tuple(seen))

    @property
    def group(self) -> int:
        """Count the query heads of a KV head."""
        config = self.model.config.get_text_config()
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return config.num_attention_heads // kv_heads
