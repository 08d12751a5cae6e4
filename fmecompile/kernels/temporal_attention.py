"""Attention over frames that reads the layout of the spatial layers by strides, so that nothing is permuted."""

# pyright: reportInvalidTypeForm=false
# Without Triton its annotations are a stand-in.

from typing import Any

import torch
from torch.nn import functional as F

from fmecompile.kernels.registry import IS_INTERPRETED, jit, register, require, tl
from fmecompile.kernels.strides import is_wide

MAX_FRAMES, MAX_WIDTH = 64, 128
"""Frames, and features of a head, that one program holds at once."""

_LEAST_TILE = 16
"""The least side of a matrix product in Triton."""


def temporal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """(B, T, S, H, D), (B, K, S, H, D) twice -> (B, T, S, H, D), contiguous: attention of T frames over K frames.

    Args:
        query: floating point, in any layout; so are ``key`` and ``value``. S tokens a frame, H heads of D features.
        scale: of the products; 1/sqrt(D) by default.

    Raises:
        OptionError: operands that differ in more than their number of frames, or in type.
    """
    batch, frames, tokens, heads, width = query.shape
    q, k, v = (t.permute(0, 2, 3, 1, 4).reshape(batch * tokens, heads, -1, width) for t in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return result.reshape(batch, tokens, heads, frames, width).permute(0, 3, 1, 2, 4)


def serves(frames: int, keys: int, width: int) -> bool:
    """Whether one program holds so many frames, and features of a head."""
    return 0 < max(frames, keys) <= MAX_FRAMES and 0 < width <= MAX_WIDTH


def _empty(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    del scale
    shapes = [tuple(t.shape) for t in (query, key, value)]
    rest = {(len(shape), shape[:1], shape[2:]) for shape in shapes}
    fits = query.ndim == 5 and len(rest) == 1 and shapes[1] == shapes[2]
    require(fits, f"temporal attention of {shapes}", "give it three (B, T, S, H, D) that differ in T at most")
    dtypes = {t.dtype for t in (query, key, value)}
    require(len(dtypes) == 1, f"attention of {', '.join(map(str, dtypes))}", "cast query, key and value to one type")
    return query.new_empty(query.shape)


def _is_served(query: torch.Tensor, key: torch.Tensor, *_: object) -> bool:
    """Matrix products in float64 are left to libraries."""
    return query.dtype != torch.float64 and serves(query.shape[1], key.shape[1], query.shape[4])


def _launch(
    out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> None:
    batch, frames, tokens, heads, width = query.shape
    tiles = (_tile(frames), _tile(key.shape[1]), _tile(width))
    _kernel[(batch * tokens * heads,)](
        out,
        query,
        key,
        value,
        (tokens, heads, frames, key.shape[1], width),
        out.stride(),
        query.stride(),
        key.stride(),
        value.stride(),
        width**-0.5 if scale is None else scale,
        *tiles,
        _multiplied_in(query.dtype),
        is_wide(out, query, key, value),
    )


def _multiplied_in(dtype: torch.dtype) -> Any:
    """The type of factors on their way into a product: their own, but Triton's interpreter multiplies no bfloat16."""
    if dtype == torch.bfloat16 and not IS_INTERPRETED:
        return tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def _tile(size: int) -> int:
    """The least power of two that holds ``size``."""
    return max(_LEAST_TILE, 1 << (size - 1).bit_length())


@jit
def _start(strides, sample, token, head):
    return sample * strides[0] + token * strides[2] + head * strides[3]


@jit
def _kernel(
    out,
    query,
    key,
    value,
    sizes,
    out_at,
    query_at,
    key_at,
    value_at,
    scale,
    FRAMES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    FACTOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One head of one token: heads go fastest, as neighbours in memory. Scores and sums are float32."""
    tokens, heads, frames, keys, width = sizes
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    head, rest = program % heads, program // heads
    token, sample = rest % tokens, rest // tokens
    row, column, feature = tl.arange(0, FRAMES), tl.arange(0, KEYS), tl.arange(0, WIDTH)
    in_rows = (row[:, None] < frames) & (feature[None, :] < width)
    in_columns = (column[:, None] < keys) & (feature[None, :] < width)
    q_at = _start(query_at, sample, token, head) + row[:, None] * query_at[1] + feature[None, :] * query_at[4]
    k_at = _start(key_at, sample, token, head) + column[:, None] * key_at[1] + feature[None, :] * key_at[4]
    v_at = _start(value_at, sample, token, head) + column[:, None] * value_at[1] + feature[None, :] * value_at[4]
    q = tl.load(query + q_at, in_rows, 0).to(FACTOR)
    k = tl.load(key + k_at, in_columns, 0).to(FACTOR)
    v = tl.load(value + v_at, in_columns, 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(column[None, :] < keys, scores, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    total = tl.sum(weights, 1)
    result = tl.dot(weights.to(v.dtype).to(FACTOR), v.to(FACTOR), input_precision="ieee") / total[:, None]
    o_at = _start(out_at, sample, token, head) + row[:, None] * out_at[1] + feature[None, :] * out_at[4]
    tl.store(out + o_at, result, in_rows)


TEMPORAL_ATTENTION = register(temporal_attention, _empty, _launch, _is_served)
