"""Writes and reads files of contexts: plain data with tensors in it, as safetensors.

All that is no tensor is JSON in the header of the file, with the name of each tensor in its place.
Rows of layers begin with pages, head by head, and fill them, so that they can be mapped; zeros
follow the last ones. A file is written beside where it belongs, and is moved there when it is
whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .arena import OpenFile, Place, Rows, Stored, fill_pages

#: of what is in a file, and how; another one is not read
LAYOUT = 2

#: bytes that heads begin at multiples of
_PAGE = 4096

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
        parts: what it has: dicts, lists, tensors, rows, dtypes, devices, and what JSON has.
    """
    tensors: dict[str, Tensor | Rows] = {}
    parts = _take_apart(parts, "context", tensors)
    # Rows first, which fill pages; then the largest elements, so that each begins at a multiple of
    # its size.
    tensors = dict(sorted(tensors.items(), key=lambda item: _order(item[1])))
    metadata = {
        "format": _FORMAT, "layout": str(LAYOUT), "said": json.dumps(said),
        "parts": json.dumps(parts),
    }  # fmt: skip
    with _replacing(Path(path)) as file:
        file.write(_header(tensors, metadata))
        for tensor in tensors.values():  # one after the other: only one is held twice
            data = _filled(tensor) if isinstance(tensor, Rows) else tensor.cpu().contiguous()
            file.write(data.flatten().view(torch.uint8).numpy())


def _order(tensor: Tensor | Rows) -> tuple[bool, int]:
    """Say where a tensor belongs in a file: what is less comes first."""
    return (False, 0) if isinstance(tensor, Rows) else (True, -tensor.element_size())


def _shape(tensor: Tensor | Rows) -> list[int]:
    """Return the shape that a tensor has in a file."""
    if isinstance(tensor, Tensor):
        return list(tensor.shape)
    batch, heads, rows, dim = tensor.tensor.shape
    return [batch, heads, fill_pages(rows, [dim * tensor.tensor.element_size()], _PAGE), dim]


def _filled(rows: Rows) -> Tensor:
    """Copy rows to the host, with zeros behind those of each head."""
    made = torch.zeros(_shape(rows), dtype=rows.tensor.dtype)
    made[:, :, : rows.tensor.shape[2]] = rows.tensor
    return made


def _header(tensors: dict[str, Tensor | Rows], metadata: dict[str, str]) -> bytes:
    """Make the beginning of a file of safetensors."""
    entries: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        dtype = (tensor.tensor if isinstance(tensor, Rows) else tensor).dtype
        shape = _shape(tensor)
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
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
    """Read the parts, each tensor into memory of its own; rows stay where they are if the host is
    to have them."""
    held = OpenFile(os.open(path, os.O_RDONLY))
    file = open(held.descriptor, "rb", closefd=False)
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    if entries.pop("__metadata__") != metadata:
        raise ValueError(f"{path} was replaced while it was read")
    begin = 8 + length
    end = begin + max(entry["data_offsets"][1] for entry in entries.values())
    if os.fstat(held.descriptor).st_size < end:
        raise ValueError(f"{path} was cut while it was read")

    def take(name: str, rows: int | None = None) -> Tensor | Stored:
        """Return a tensor, or the first rows of one."""
        shape, dtype = entries[name]["shape"], _NAMED[entries[name]["dtype"]]
        offset = begin + entries[name]["data_offsets"][0]
        if rows is not None and device.type == "cpu":
            stored = Stored(held, Place(tuple(shape), dtype, offset), rows)
            if stored.can_be_mapped:
                return stored
        tensor = torch.empty(shape, dtype=dtype)
        file.seek(offset)
        data = tensor.flatten().view(torch.uint8).numpy()
        if file.readinto(data) < len(data):
            raise ValueError(f"{path} was cut while it was read")
        return tensor.to(device)[(..., slice(rows), slice(None)) if rows is not None else ...]

    return _put_together(json.loads(metadata["parts"]), take, device)


def _take_apart(data: Any, name: str, tensors: dict[str, Tensor | Rows]) -> Any:
    """Return data for JSON; its tensors are put into ``tensors``, by their places in it."""
    if isinstance(data, Tensor):
        tensors[name] = data
        return {"tensor": name}
    if isinstance(data, Rows):
        tensors[name] = data
        return {"rows": [name, data.tensor.shape[2]]}
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


def _put_together(data: Any, take: Callable[..., Tensor | Stored], device: torch.device) -> Any:
    """Undo :func:`_take_apart`.

    Args:
        take: returns a tensor by its name, or the first rows of one by name and number.
    """
    if isinstance(data, list):
        return [_put_together(item, take, device) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "tensor":
        return take(value)
    if kind == "rows":
        return take(*value)
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return device
    return {k: _put_together(v, take, device) for k, v in value}
