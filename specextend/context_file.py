"""Writes and reads files of contexts: plain data with tensors in it, as safetensors.

All that is no tensor is JSON in the header of the file, with the name of each tensor in its place.
A file is written beside where it belongs, and is moved there when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: of what is in a file, and how; another one is not read
LAYOUT = 1

_FORMAT = "specextend context"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}


def write(path: str | os.PathLike, said: dict, parts: dict) -> None:
    """Write a file; one that was there before stays whole until the new one is.

    Args:
        path: in a folder that is there.
        said: of whom the context is, for JSON.
        parts: what it has: dicts, lists, tensors, dtypes, devices, and what JSON has.
    """
    tensors: dict[str, Tensor] = {}
    parts = _take_apart(parts, "context", tensors)
    # The largest elements first, so that each begins at a multiple of its size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    metadata = {
        "format": _FORMAT, "layout": str(LAYOUT), "said": json.dumps(said),
        "parts": json.dumps(parts),
    }  # fmt: skip
    with _replacing(Path(path)) as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors.values():  # one after the other: only one is held twice
            data = tensor.cpu().contiguous().flatten().view(torch.uint8)
            file.write(data.numpy())


def _header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Make the beginning of a file of safetensors."""
    entries: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file beside ``path``, which takes its place at the end of the ``with`` block; in
    an error it is removed."""
    path = path.resolve()  # what a link leads to is replaced, and not the link
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike, device: torch.device) -> tuple[dict, Callable[[], dict]]:
    """Open a file that :func:`write` has written.

    Args:
        device: of the tensors, and what the devices in the file become.

    Returns:
        What is said of it, and what reads its parts.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none, or cut, or of another layout.
    """
    with open(path, "rb"):
        pass  # an error of the system has the path in its text
    try:
        with safe_open(path, "pt") as file:  # which looks whether all of it is there
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no context that was saved, or not the whole of one: {error}"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds tensors, but is no context that was saved")
    if metadata["layout"] != str(LAYOUT):
        raise ValueError(
            f"{path} is a context of layout {metadata['layout']}, and layout {LAYOUT} is wanted: "
            "it was saved by another version of specextend"
        )
    return json.loads(metadata["said"]), partial(_read_parts, path, metadata, device)


def _read_parts(path: str | os.PathLike, metadata: dict[str, str], device: torch.device) -> dict:
    """Read the parts, each tensor into memory of its own. (Copied from a mapping they would be
    faulted in, a few pages at a time, and all of them are needed at the first token.)"""
    with open(path, "rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if entries.pop("__metadata__") != metadata:
            raise ValueError(f"{path} was replaced while it was read")
        tensors = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            tensor = torch.empty(entry["shape"], dtype=_NAMED[entry["dtype"]])
            data = tensor.flatten().view(torch.uint8).numpy()
            if file.readinto(data) < len(data):
                raise ValueError(f"{path} was cut while it was read")
            tensors[name] = tensor.to(device)
    return _put_together(json.loads(metadata["parts"]), tensors, device)


def _take_apart(data: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return data for JSON; its tensors are put into ``tensors``, by their places in it."""
    if isinstance(data, Tensor):
        tensors[name] = data
        return {"tensor": name}
    if isinstance(data, torch.dtype):
        return {"dtype": str(data).removeprefix("torch.")}
    if isinstance(data, torch.device):
        return {"device": None}
    if isinstance(data, dict):  # whose keys need not be strings
        items = data.items()
        return {"dict": [[k, _take_apart(v, f"{name}.{k}", tensors)] for k, v in items]}
    if isinstance(data, (list, tuple)):
        return [_take_apart(item, f"{name}.{i}", tensors) for i, item in enumerate(data)]
    return data


def _put_together(data: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """Undo :func:`_take_apart`."""
    if isinstance(data, list):
        return [_put_together(item, tensors, device) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return device
    return {k: _put_together(v, tensors, device) for k, v in value}
