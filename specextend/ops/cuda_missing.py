"""Refuses CUDA tensors for operators without a CUDA kernel: torch's own error gives no advice."""

import torch

from .. import _C

_library = torch.library.Library("specextend", "IMPL")  # registrations live as long as it does


def _refusal(name: str):
    if _C.has_cuda:
        message = "specextend has no CUDA kernel for it, and the arguments are CUDA tensors"
    else:
        message = (
            "specextend was built without CUDA kernels, and the arguments are CUDA tensors. In its "
            "source folder, with nvcc on PATH: SPECEXTEND_CUDA=ON pip install --force-reinstall "
            "--no-deps ."
        )

    def refuse(*args, **kwargs):
        raise NotImplementedError(f"{name}: {message}")

    return refuse


def register() -> None:
    """Give every operator of the namespace that has no CUDA kernel one that says so."""
    for name in sorted(torch.ops.specextend):
        packet = getattr(torch.ops.specextend, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if not op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA):
                short = name if overload == "default" else f"{name}.{overload}"
                _library.impl(op, _refusal(short), "CUDA")
