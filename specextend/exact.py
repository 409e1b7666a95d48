"""Computes a model's forward so that a row has the same bits whatever rows are beside it.

A target is asked for one row in plain decoding and for a tree of them in speculative decoding.
Libraries compute the two in other ways: matrix products choose an algorithm by the number of rows,
and vectorised functions leave the last elements of a thread's share to others. A logit may then
differ in its last bit, and in bf16, where two logits are often equal or neighbours, the token with
it. :class:`RowInvariant` sees a forward's operators at the level of aten, below `nn.Linear`, LoRA,
einsum and experts, and computes those of which that is true in a way that does not depend on the
number of rows (batch invariance: Horace He, "Defeating Nondeterminism in LLM Inference", 2025).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves

from . import ops

# Moves, compares, counts or rounds exactly, each element by itself: what the operators below give
# is defined to the last bit.
_EXACT = frozenset(
    """
    abs all amax amin any arange argmax argmin argsort _assert_async _assert_tensor_metadata
    bincount bitwise_and bitwise_not bitwise_or bitwise_xor bucketize cat ceil clamp clamp_max
    clamp_min clone constant_pad_nd contiguous copy copy_ detach div embedding empty empty_like
    empty_strided eq equal eye fill flatten flip floor floor_divide fmod full full_like gather ge gt
    hardtanh histc index index_add index_copy index_fill index_select is_nonzero isfinite isinf
    isnan item le leaky_relu lift_fresh lift_fresh_copy _local_scalar_dense logical_and logical_not
    logical_or logical_xor lt masked_fill masked_scatter masked_select max maximum min minimum mul
    ne neg new_empty new_empty_strided new_full new_ones new_zeros nonzero one_hot ones ones_like
    pad reciprocal relu remainder repeat repeat_interleave reshape roll round scalar_tensor
    searchsorted sign sort sqrt stack to _to_copy topk tril triu trunc type_as unbind _unique2
    unique_dim _unsafe_index _unsafe_view where zero zeros zeros_like
    """.split()
)
# Functions of one tensor whose vectorised form and the one for single elements may differ.
_ELEMENTWISE = frozenset(
    """
    acos asin atan celu cos cosh elu erf erfc exp exp2 expm1 gelu hardsigmoid hardswish log log10
    log1p log2 log_sigmoid logit mish pow rsqrt selu sigmoid silu sin sinh softplus square tan tanh
    """.split()
)
# Sums along the last dimension, row by row; the place of their argument `dim`, or None for those
# that have another.
_ROWWISE = {
    "_fused_rms_norm": None, "_log_softmax": 1, "_softmax": 1, "linalg_vector_norm": 2,
    "logsumexp": 1, "native_layer_norm": None, "std": 1, "var": 1, "var_mean": 1,
}  # fmt: skip

_VECTOR = 64  # elements: a multiple of what any processor computes at a time
_SERIAL = 1 << 14  # elements that torch computes in one thread, without a rest in between
_LONGEST_ROW = 1 << 15  # torch sums a single row of so many elements with all threads
_BLOCK = 64  # rows that a GPU computes at a time
_MOST_TERMS = 64  # of a sum over another dimension than the last


class RowInvariant(TorchDispatchMode):
    """Computes the operators of a ``with`` block so that a row's bits do not depend on the others.

    Raises:
        NotImplementedError: an operator of which this is not known; the message names it.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # keeping torch.compile out would cost more than the rest of a call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = _handler(func)
        if handler is None:
            with self:  # what it is made of comes here as well
                return func.decompose(*args, **kwargs)
        return handler(func, args, kwargs)


def refusal(model: torch.nn.Module) -> str | None:
    """Say why a model cannot run under :class:`RowInvariant`; None if nothing is known."""
    for module in model.modules():
        if (
            type(module).__name__ == "OptimizedModule"
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(module.forward, "_torchdynamo_orig_callable")
        ):
            return "it is compiled by torch.compile, whose kernels choose their own order of sums"
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        return "it is quantised, and its products are those of another library"
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return (
                f"its weight {name} is a {type(tensor).__name__}, which multiplies in its own way"
            )
    return None


@functools.cache
def _handler(func: torch._ops.OpOverload) -> Callable | None:
    """Return what computes an operator; None for one that is to be seen in its parts."""
    name = func.overloadpacket.__name__
    if any(argument.is_out for argument in func._schema.arguments):
        return _plainly if name in _EXACT else _refuse
    if name in _SPECIAL:
        return _SPECIAL[name]
    if func.namespace == "specextend":
        return _plainly
    if func.namespace in ("aten", "prims"):
        plain = name.removesuffix("_")
        if plain in _BY_ARGUMENTS:
            return _BY_ARGUMENTS[plain]
        if plain in _ELEMENTWISE:
            return _elementwise
        if plain in _ROWWISE:
            return _by_rows
        if name in _EXACT or plain in _EXACT or _is_view(func):
            return _plainly
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return None
    return _unknown


def _is_view(func: torch._ops.OpOverload) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _refuse(func, args, kwargs, why: str = ""):
    raise NotImplementedError(
        f"exact=True does not know how {func} is computed{why}: its rows might depend on each other"
    )


def _unknown(func, args, kwargs):
    """Let operators on integers pass, which round nothing."""
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if not tensors or any(t.is_floating_point() or t.is_complex() for t in tensors):
        return _refuse(func, args, kwargs)
    return func(*args, **kwargs)


def _plainly(func, args, kwargs):
    return func(*args, **kwargs)


# ---- products ----------------------------------------------------------------------------------


def _product(func, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply [.., M, K] by [.., K, N]: two matrices, or two batches of them."""
    if not a.is_floating_point():
        return a @ b
    if a.dtype == torch.float64:
        _refuse(func, (), {}, " in float64")
    if bias is None and a.shape[-2] > b.shape[-1]:
        # What is streamed is the larger one. A product of numbers commutes, also in its last bit.
        return ops.invariant_linear(_rows(b.mT), _rows_or_columns(a)).mT.contiguous()
    return ops.invariant_linear(_rows(a), _rows_or_columns(b.mT), bias)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_or_columns(w: Tensor) -> Tensor:
    return w if 1 in w.stride()[-2:] else w.contiguous()


def _mm(func, args, kwargs):
    return _product(func, args[0], args[1])


def _mv(func, args, kwargs):
    return _product(func, args[0], args[1][:, None])[:, 0]


def _dot(func, args, kwargs):
    return _product(func, args[0][None], args[1][:, None])[0, 0]


def _addmm(func, args, kwargs):
    bias, a, b = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    if beta == alpha == 1 and bias.dim() == 1 and len(bias) == b.shape[-1]:
        return _product(func, a, b, bias if bias.stride(0) == 1 else bias.contiguous())
    product = _product(func, a, b)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (bias if beta == 1 else bias * beta)


def _linear(func, args, kwargs):
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not x.is_floating_point() or weight.dim() != 2 or x.dim() < 2:
        return _refuse(func, args, kwargs, f" for {x.dtype} {list(x.shape)}")
    y = _product(func, x.reshape(-1, x.shape[-1]), weight.mT, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _grouped(func, args, kwargs):
    """Multiply rows [S, K], sorted by expert, by [E, K, N]; ``offs`` [E]: where each one's end."""
    a, b, offs = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs")
    if a.is_cuda or a.dim() != 2 or b.dim() != 3 or offs is None:
        advice = '; load the model with experts_implementation="batched_mm"' if a.is_cuda else ""
        return _refuse(func, args, kwargs, f" on {a.device.type}{advice}")
    y, start = a.new_zeros(a.shape[0], b.shape[2]), 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            y[start:end] = _product(func, a[start:end], b[expert])
        start = end
    return y


# ---- functions ---------------------------------------------------------------------------------


def _elementwise(func, args, kwargs):
    """Apply a function to whole vectors only, in shares that one thread computes."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    if len(places) != 1 or tree_any(lambda a: isinstance(a, Tensor), kwargs):
        return _refuse(func, args, kwargs, f" of {len(places)} tensors")
    x = args[places[0]]
    if x.is_cuda:  # each element is one thread's
        return func(*args, **kwargs)
    if func._schema.is_mutable:
        return x.copy_(_elementwise(_functional(func), args, kwargs))
    flat = x.reshape(-1)
    count = flat.numel()
    if count % _VECTOR:
        flat = torch.nn.functional.pad(flat, (0, -count % _VECTOR))
    before, after = args[: places[0]], args[places[0] + 1 :]
    parts = [func(*before, part.contiguous(), *after, **kwargs) for part in flat.split(_SERIAL)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:count].view(x.shape)


def _silu_mul(func, args, kwargs):
    """Call torch's silu where the operator would, but on whole vectors."""
    gate, up = args
    if gate.is_cuda or gate.dtype != torch.float32:
        return func(*args, **kwargs)
    return _elementwise(torch.ops.aten.silu.default, (gate,), {}).mul_(up)


def _functional(func: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """Return the operator that gives what this one writes in place."""
    packet = getattr(torch.ops.aten, func.overloadpacket.__name__.removesuffix("_"))
    return getattr(packet, func._overloadname)


def _by_rows(func, args, kwargs):
    """Compute what torch computes row by row along the last dimension."""
    x, place = args[0], _ROWWISE[func.overloadpacket.__name__]
    if place is None:
        last = len(args[1]) == 1  # the shape that is normalised
    else:
        dims = args[place] if len(args) > place else kwargs.get("dim")
        dims = tuple(dims) if isinstance(dims, (list, tuple)) else (dims,)
        named = func._schema.arguments[place].name == "dim"
        last = named and dims in ((-1,), (x.dim() - 1,))
    if not last or x.dim() == 0:
        return _refuse(func, args, kwargs, " over other dimensions than the last")
    if place is not None and len(args) > place:
        fixed = [-1] if isinstance(args[place], (list, tuple)) else -1
        args = (*args[:place], fixed, *args[place + 1 :])
    return _in_blocks(lambda rows: func(rows, *args[1:], **kwargs), x)


def _in_blocks(function: Callable, x: Tensor):
    """Call a function of rows on [.., K] so that the shape it sees does not depend on their number,
    where that would change a row."""
    size = _BLOCK if x.is_cuda else 1
    if not x.is_cuda and x.shape[-1] < _LONGEST_ROW:
        return function(x.contiguous())
    rows = x.reshape(-1, x.shape[-1])
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % size))
    parts = [function(block) for block in padded.split(size)]

    def join(parts):
        return torch.cat(parts)[: len(rows)].view(*x.shape[:-1], *parts[0].shape[1:])

    if isinstance(parts[0], Tensor):
        return join(parts)
    return tuple(join(part) for part in zip(*parts, strict=True))


def _sum(func, args, kwargs):
    """Sum or average: along the last dimension as torch does, along another term after term."""
    x = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    dtype = kwargs.get("dtype")
    mean = func.overloadpacket.__name__ == "mean"
    if not x.is_floating_point() and not (dtype and dtype.is_floating_point):
        return func(*args, **kwargs)
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    if len(dims) != 1:
        return _refuse(func, args, kwargs, f" over the dimensions {dims}")
    dim = dims[0] % x.dim()
    if dim == x.dim() - 1:

        def reduce(rows):
            return func(rows, [-1], True, dtype=dtype)

        total = _in_blocks(reduce, x)
        return total if keep else total.squeeze(-1)
    if x.shape[dim] > _MOST_TERMS:
        return _refuse(func, args, kwargs, f" over {x.shape[dim]} terms in dimension {dim}")
    total = torch.zeros_like(x.select(dim, 0), dtype=torch.float32)
    for term in x.unbind(dim):
        total = total + term.float()
    total = (total / x.shape[dim] if mean else total).to(dtype or x.dtype)
    return total.unsqueeze(dim) if keep else total


def _add(func, args, kwargs):
    """Add or subtract; a factor is multiplied before, as it may be fused or not."""
    alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
    if alpha == 1:
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    scaled = args[1] * alpha if not name.startswith("rsub") else args[1]
    first = args[0] * alpha if name.startswith("rsub") else args[0]
    return func(first, scaled)


def _cumsum(func, args, kwargs):
    """Add up, one after the other along each row."""
    if args[0].is_cuda and args[0].is_floating_point():
        return _refuse(func, args, kwargs, " on a GPU")
    return func(*args, **kwargs)


def _placed(func, args, kwargs):
    """Write to places, but add up nothing there: the order of the terms would be anybody's."""
    adds = "reduce" in kwargs or kwargs.get("accumulate") or (len(args) > 3 and args[3] is True)
    if adds:
        return _refuse(func, args, kwargs, " where terms are added up")
    return func(*args, **kwargs)


_SPECIAL = {
    "_grouped_mm": _grouped,
    "grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "bmm": _mm,
    "dot": _dot,
    "linear": _linear,
    "mm": _mm,
    "mv": _mv,
    "silu_mul": _silu_mul,
    "view_as_complex": _refuse,  # products of complex numbers round more than once
}
_BY_ARGUMENTS = {
    "add": _add, "cumsum": _cumsum, "index_put": _placed, "mean": _sum, "rsub": _add,
    "scatter": _placed, "sub": _add, "sum": _sum,
}  # fmt: skip
