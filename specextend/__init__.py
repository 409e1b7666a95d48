"""Decodes long inputs speculatively, without loss: kernels, a drop-in for Hugging Face models.

``import specextend._C`` registers ``torch.ops.specextend.*``; ``specextend.ops`` wraps them with
documentation; :class:`SpecExtend` drives the draft-verify loop.
"""

import importlib

import torch  # libtorch is in the process before _C needs it

from . import versions

__version__ = "0.1.0"

versions.check("torch", torch.__version__)  # the module would fail to load, for reasons of its own

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "specextend's compiled module is missing or does not load in this Python "
        f"({error}). Install the package (`pip install .` in its source folder) and do not run "
        "Python inside that folder with a package that was not built in place "
        "(`pip install --no-build-isolation -e .` builds it there)."
    ) from None  # the message has the cause; a second traceback above it would hide it

if _C.version != __version__:
    raise ImportError(
        f"specextend's compiled module is stale: it was built for version {_C.version}, the Python "
        f"files are version {__version__}. Install the package again (`pip install .`)."
    )

from . import ops  # noqa: E402

# The loop needs transformers, which takes seconds to import; the kernels alone do not.
_LAZY = {
    "SpecConfig": "config",
    "SpecExtend": "decode",
    "Step": "generation",
    "SpecStats": "stats",
    "UnsupportedModelError": "guard",
}

__all__ = [*_LAZY, "__version__", "ops"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module(".compat", __name__)  # refuses a transformers outside the range
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
