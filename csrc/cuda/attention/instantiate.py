"""Write the instantiations of the attention kernels, a source file each, and print their paths.

    python csrc/cuda/attention/instantiate.py FOLDER

A file holds the kernels for heads of one size, so that a build compiles many side by side, and a
test only those that it looks at. CMake runs this when it configures, tests/emulation before it
compiles. A file that is there and right keeps its time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

TYPES = {"half": "__half", "bf16": "__nv_bfloat16"}
# Sizes of keys and of values, as kAttentionDims in attention_layout.h; those of wide heads apart.
DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
WIDE_DIMS = ((512, 512), (576, 512))
HOPPER_DIMS = (64, 128, 192, 256)  # as hopper_dim in hopper_tiles.h
HOPPER_CHUNK, HOPPER_CHUNK_DIM = 32, 192  # kHopperChunk, kHopperChunkDim


SOURCE = """\
// Written by csrc/cuda/attention/instantiate.py.

#include "{header}"

namespace specextend {{

{instantiations}
}}  // namespace specextend
"""


def text(header: str, instantiation: str, arguments: list[str]) -> str:
    """Return a source that instantiates a template with each of the arguments."""
    lines = [f"template cudaError_t {instantiation.format(a)};\n" for a in arguments]
    return SOURCE.format(header=header, instantiations="".join(lines))


def size(dims: tuple[int, int]) -> str:
    """Name the size of heads in a file's name."""
    keys, values = dims
    return f"d{keys}" if keys == values else f"d{keys}_{values}"


def sources() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every file; a name that ends in _sm90 is Hopper's."""
    header = "kernels/attention/portable/kernel.cuh"
    launch = "launch_attention<{}>(const AttentionCall&, cudaStream_t)"
    for dims in DIMS:
        for name, kind in TYPES.items():
            for suffix, chunks in (("", "false"), ("_chunks", "true")):
                content = text(header, launch, [f"{kind}, {dims[0]}, {dims[1]}, {chunks}"])
                yield f"tree_attention_{name}_{size(dims)}{suffix}.cu", content
    header = "kernels/attention/portable/wide.cuh"
    launch = "launch_wide_attention<{}>(const AttentionCall&, cudaStream_t)"
    for dims in WIDE_DIMS:
        for name, kind in TYPES.items():
            content = text(header, launch, [f"{kind}, {dims[0]}, {dims[1]}"])
            yield f"tree_attention_{name}_{size(dims)}.cu", content
    header = "kernels/attention/hopper/kernel.cuh"
    launch = "launch_hopper_attention<{}>(const AttentionCall&, int, cudaStream_t)"
    for dim in HOPPER_DIMS:
        chunks = (0, HOPPER_CHUNK) if dim <= HOPPER_CHUNK_DIM else (0,)
        arguments = [f"{kind}, {dim}, {chunk}" for kind in TYPES.values() for chunk in chunks]
        yield f"tree_attention_d{dim}_sm90.cu", text(header, launch, arguments)


def write(folder: Path) -> list[Path]:
    """Write all files into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in sources():
        path = folder / name
        if not path.exists() or path.read_text() != content:
            # Another process that reads or writes it meets a whole file.
            new = folder / f"{name}.{os.getpid()}"
            new.write_text(content)
            new.replace(path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(*write(Path(sys.argv[1])), sep="\n")
