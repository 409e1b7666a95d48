import pytest
import torch

from specextend import _C, ops  # noqa: F401  registers the refusals

CUDA = torch._C.DispatchKey.CUDA


def all_ops():
    for name in sorted(torch.ops.specextend):
        packet = getattr(torch.ops.specextend, name)
        yield from (getattr(packet, overload) for overload in packet.overloads())


def test_every_op_has_an_answer_to_cuda_tensors():
    found = [op for op in all_ops() if op.has_kernel_for_dispatch_key(CUDA)]
    assert found == list(all_ops()) and len(found) >= 9


def test_the_refusal_says_what_to_do():
    """The dispatcher is told that the tensors are on a GPU; there need not be one."""
    if _C.has_cuda:
        pytest.skip("built with CUDA kernels")
    o, lse = torch.zeros(2, 4), torch.zeros(2)
    keys = torch._C.DispatchKeySet(CUDA)
    with pytest.raises(NotImplementedError, match="^merge_states: .* built without CUDA .*=ON pip"):
        torch.ops.specextend.merge_states.default.redispatch(keys, o, lse, o, lse)
    with pytest.raises(NotImplementedError, match="^compact_kv: "):
        lens = torch.zeros(1, dtype=torch.int32)
        torch.ops.specextend.compact_kv.default.redispatch(keys, [o], lens, lens[None], lens)
