"""Reads a folder of weights, here or on the Hugging Face Hub: its configuration, its tensors."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Checkpoint:
    """Describes what a folder has.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        config: contents of config.json.
        files: by name of a tensor, the file that has it.
    """

    name: str
    folder: Path
    config: dict
    files: dict[str, Path] = field(default_factory=dict)

    @staticmethod
    def open(name: str | Path) -> Checkpoint:
        """Read the configuration and the names of the tensors; what is no folder is downloaded.

        A file ``*.pth`` holds tensors alone, without a configuration.

        Raises:
            ValueError: nothing of this name, or no readable configuration or weights in it.
        """
        folder = Path(name)
        if folder.suffix == ".pth" and folder.is_file():
            return Checkpoint(
                str(name), folder.parent, {}, dict.fromkeys(_read_names(folder), folder)
            )
        if not folder.is_dir():
            folder = _download(str(name))
        found = sorted(path.name for path in folder.iterdir())
        try:
            config = json.loads((folder / "config.json").read_text())
            if not isinstance(config, dict):
                raise ValueError(f"it holds a {type(config).__name__}")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(name)!r} is no draft: config.json cannot be read ({error}); the folder has "
                f"{found}"
            ) from error
        checkpoint = Checkpoint(str(name), folder, config)
        paths = _weight_files(folder)
        if not paths:
            raise ValueError(
                f"{str(name)!r} is no draft: no weights, model.safetensors or pytorch_model.bin; "
                f"the folder has {found}"
            )
        for path in paths:
            checkpoint.files.update(dict.fromkeys(_read_names(path), path))
        return checkpoint

    def tensors(self) -> dict[str, Tensor]:
        """Read every tensor, onto the CPU."""
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.files.values()):
            found.update(load_file(path) if path.suffix == ".safetensors" else _load_bin(path))
        return found

    def describe(self) -> str:
        """Return the name, what the configuration says and some names of tensors, for errors."""
        said = {k: self.config[k] for k in ("model_type", "architectures") if k in self.config}
        names = sorted(self.files)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"{self.name!r}: config.json says {said}, the tensors are {names[:8]}{more}"


def rope_of(config: dict) -> dict:
    """Return type, base and options of a rotary embedding, as `transformers` 5 names them.

    Older configurations say the base beside ``rope_scaling``, and the type under another name. One
    that says nothing has Llama's first embedding.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    older = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or older or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return rope


def _download(name: str) -> Path:
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not _weight_files(folder):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:  # many types: not a valid name, not there, no network
        raise ValueError(
            f"draft {name!r} is neither a folder, nor 'ngram' or 'self', nor could it be fetched "
            f"from the Hugging Face Hub: {error}"
        ) from error
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """Prefer safetensors to pickles, and files that an index names to all that are there."""
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except Exception as error:  # many types, as what it holds may be anything
                raise ValueError(f"{index} cannot be read: {error!r}") from error
            return sorted(folder / name for name in names)
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            return [single]
    return []


def _read_names(path: Path) -> list[str]:
    try:
        return _names(path)
    except Exception as error:  # many types: a pickle, a zip, a header may be broken
        raise ValueError(f"{path} cannot be read: {error}") from error


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return list(file.keys())
    return list(_load_bin(path))


def _load_bin(path: Path) -> dict[str, Tensor]:
    # Only weights are unpickled: anything else would run code of the file.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"a dict of tensors is wanted, got {type(state).__name__}")
    return state
