"""Tests what ops say when a CUDA launch fails, by a host program around csrc/launch_error.h."""

import ctypes
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = r"""
#include "launch_error.h"

extern "C" const char* text(int error) {
  static std::string text;
  text = specextend::launch_error("some_op", cudaError_t(error), "what CUDA says", "80-real,90");
  return text.c_str();
}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch_errors")
    source, library = folder / "text.cpp", folder / "text.so"
    source.write_text(PROGRAM)
    includes = [f"-I{ROOT}/tests/emulation/include", f"-I{ROOT}/csrc"]
    command = ["c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *includes]
    subprocess.run([*command, source, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).text
    function.restype = ctypes.c_char_p
    return lambda error: function(error).decode()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (209, "built for 80-real,90. Build it on this machine, or set SPECEXTEND_CUDA_ARCHS"),
        (98, "built for 80-real,90. Build it on this machine, or set SPECEXTEND_CUDA_ARCHS"),
        (35, "Update the driver, or build specextend with a CUDA that the driver knows"),
        (222, "Update the driver, or build specextend with a CUDA that the driver knows"),
        (100, "See nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (46, "See nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (2, "Take fewer or shorter sequences"),
        (900, "broken off by an operation before this one"),
        (901, "broken off by an operation before this one"),
        (906, "broken off by an operation before this one"),
        (700, "launched earlier, of any library, has failed"),
        (716, "launched earlier, of any library, has failed"),
        (719, "launched earlier, of any library, has failed"),
        (1, "Please report it with the shapes"),
        (9, "Please report it with the shapes"),
    ],
)
def test_an_error_says_what_to_do(text, error, remedy):
    message = text(error)
    assert message.startswith(f"some_op: the CUDA launch failed: what CUDA says (error {error}). ")
    assert remedy in message
