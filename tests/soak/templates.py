"""Lines of random modules: the operators that have axis rules, in all their spellings, and some that have none.

A template gives the expression of a new value, or lines in which it is called ``NEW``, or None where it does not fit.
What does not run is not taken, so that a template may try what fits seldom.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.soak.graphs import Template, _Writer

    W = _Writer

UNARY = (
    "F.silu({x})", "F.gelu({x})", "F.gelu({x}, approximate='tanh')", "F.relu({x})", "torch.sigmoid({x})",
    "torch.tanh({x})", "torch.exp(-{x}.abs())", "torch.sin({x})", "torch.cos({x})", "-{x}", "{x}.abs()",
    "torch.rsqrt({x}.abs() + 0.5)", "torch.sqrt({x}.abs() + 0.1)", "torch.log({x}.abs() + 1.5)", "{x}.clone()",
    "{x}.contiguous()", "F.leaky_relu({x}, 0.2)", "F.hardtanh({x})", "F.elu({x})", "F.softplus({x})", "F.mish({x})",
    "torch.reciprocal({x}.abs() + 1.0)", "torch.square({x})", "torch.zeros_like({x}) + {x}", "torch.ones_like({x}) * 2",
    "{x} + 2", "2 - {x}", "{x} * 0.5", "{x} / 3", "1.0 / ({x}.abs() + 1)", "{x} ** 2", "({x}.abs() + 0.5) ** 0.3",
    "{x}.clamp(-0.5, 0.5)", "{x}.clamp(min=0)", "{x}.clamp(max=0.3)", "{x}.detach()", "F.dropout({x}, 0.5, False)",
    "{x}.to(torch.float64)", "{x}.to(torch.float64, copy=True)", "{x} * 1", "{x} / 1.0", "{x}.contiguous().view({x}.shape)",
    "torch.add({x}, {x}, alpha=0.5)", "{x} - 0", "F.silu({x}) * F.gelu({x})", "torch.erf({x})", "{x}.round()",
    "F.hardswish({x})", "{x}.double()", "{x}.type_as({x})", "torch.where({x} > 0, {x}, 0.1)", "{x}.masked_fill({x} < 0, 0.25)",
    "torch.stack([{x}, {x}]).sum(0)", "torch.logaddexp({x}, {x})", "torch.nan_to_num({x})", "({x} > 0) * {x}",
    "torch.lerp({x}, F.silu({x}), 0.25)", "torch.relu_({x}.clone())", "torch.special.expit({x})", "{x}.sign()",
)  # fmt: skip
BINARY = (
    "{x} + {y}", "{x} - {y}", "{x} * {y}", "{x} / ({y}.abs() + 1)", "torch.maximum({x}, {y})", "torch.minimum({x}, {y})",
    "{y} + {x}", "{y} - {x}", "torch.add({x}, {y}, alpha=2)", "torch.where({y} > 0, {x}, -{x})",
    "torch.addcmul({x}, {y}, {y}, value=0.5)", "torch.addcmul({y}, {x}, {y})", "torch.lerp({x}, {y} + {x} * 0, 0.3)",
    "torch.where({x} > {y}, {x}, {y})", "{x} * F.gelu({y})", "torch.atan2({x}, {y}.abs() + 1)", "torch.hypot({x}, {y})",
    "torch.broadcast_tensors({x}, {y})[1] * {x}", "torch.broadcast_tensors({y}, {x})[0].contiguous()",
    "torch.sub({x}, {y}, alpha=0.5)", "{x}.clone().add_({y})", "{x}.clone().mul_({y})", "torch.lerp({x}, {x} * 2, torch.sigmoid({y}))",
)  # fmt: skip
INPLACE = (
    "NEW.add_(1.0)", "NEW.mul_(0.5)", "NEW[:1].mul_(2.0)", "NEW[..., -1] = 0.5", "NEW[..., ::2] += 1.0",
    "NEW.transpose(0, -1).add_(0.1)", "NEW.flatten()[0] = 3.0", "NEW.unsqueeze(0).add_(1.0)", "NEW.copy_(NEW.flip(0))",
    "NEW.relu_()", "NEW[:, :1].fill_(0.25)", "NEW.select(0, 0).zero_()", "NEW.clamp_(-1, 1)", "NEW[1:].copy_(NEW[:-1].clone())",
    "F.silu(NEW, inplace=True)", "NEW.masked_fill_(NEW > 1, 1.0)", "NEW.sigmoid_()", "NEW += NEW.mean(0, keepdim=True)",
)  # fmt: skip


def unary(w: W, x: str) -> str:
    return w.rng.choice(UNARY).format(x=x)


def binary(w: W, x: str) -> str:
    return w.rng.choice(BINARY).format(x=x, y=w.other(x))


def residual(w: W, x: str) -> str:
    return f"{w.same(x)} + {x}"


def inplace(w: W, x: str) -> list[str]:
    """On a copy, mostly; else on whatever storage that value lies in."""
    first = (
        f"NEW = {x}.clone()" if w.rng.random() < 0.7 else f"NEW = F.silu({x})" if w.rng.random() < 0.7 else f"NEW = {x}"
    )
    return [first, *(w.rng.choice(INPLACE) for _ in range(w.rng.choice((1, 1, 2))))]


def layer_norm(w: W, x: str) -> str:
    shape = w.of(x)
    last = shape[w.rng.randint(max(len(shape) - 2, 0), len(shape) - 1) :]
    affine = (w.weight(*last), w.weight(*last)) if w.rng.random() < 0.5 else (None, None)
    if w.rng.random() < 0.2:
        return f"F.rms_norm({x}, {last}, {affine[0]}, 1e-2)"
    return f"F.layer_norm({x}, {last}, {affine[0]}, {affine[1]}, 1e-2)"


def group_norm(w: W, x: str) -> str:
    channels = w.of(x)[1]
    groups = w.rng.choice([d for d in range(1, channels + 1) if channels % d == 0])
    affine = (w.weight(channels), w.weight(channels)) if w.rng.random() < 0.5 else (None, None)
    call = f"F.group_norm({x}, {groups}, {affine[0]}, {affine[1]}, 1e-2)"
    return f"F.silu({call})" if w.rng.random() < 0.5 else call


def other_norm(w: W, x: str) -> str:
    ways = ("F.instance_norm({x}, eps=1e-2)", "F.normalize({x}, dim={d}, eps=0.1)", "{x} / ({x}.norm(dim={d}, keepdim=True) + 1)",
            "F.batch_norm({x}, torch.zeros({c}, dtype=torch.float64), torch.ones({c}, dtype=torch.float64), eps=1e-2)",
            "{x} - {x}.mean({d}, keepdim=True)", "{x} / ({x}.var({d}, keepdim=True, unbiased=False) + 1).sqrt()")  # fmt: skip
    return w.rng.choice(ways).format(x=x, d=w.dim(x), c=w.of(x)[1])


def convolution(w: W, x: str) -> str:
    """1-D to 3-D, with strides, dilations, groups and paddings that keep rows, and that do not."""
    shape, rng = w.of(x), w.rng
    n = len(shape) - 2
    if n not in (1, 2, 3):
        raise ValueError
    groups = rng.choice([d for d in (1, 1, 1, 2, shape[1]) if shape[1] % d == 0])
    out = groups * rng.choice((1, 2, 3))
    kernel = [rng.choice((1, 2, 3, 3, 3, 5)) for _ in range(n)]
    dilation = [rng.choice((1, 1, 1, 2)) for _ in range(n)]
    stride = [rng.choice((1, 1, 1, 2, 3)) for _ in range(n)]
    padding = [k // 2 * d if rng.random() < 0.8 else rng.randint(0, 3) for k, d in zip(kernel, dilation, strict=True)]
    weight, bias = w.weight(out, shape[1] // groups, *kernel), w.weight(out) if rng.random() < 0.5 else None
    if rng.random() < 0.1:
        return f"F.conv{n}d({x}, {weight}, {bias}, padding='same')"
    if rng.random() < 0.1:
        return f"F.conv_transpose{n}d({x}, {w.weight(shape[1], 2, *kernel)}, None, {stride}, {padding})"
    if rng.random() < 0.2:
        return f"F.conv{n}d({x}, {weight}, {bias}, {stride[0]}, {padding[0]}, {dilation[0]}, {groups})"
    return f"F.conv{n}d({x}, {weight}, {bias}, {stride}, {padding}, {dilation}, {groups})"


def linear(w: W, x: str) -> str:
    out = w.rng.choice((1, 2, 3, 4, 6))
    bias = w.weight(out) if w.rng.random() < 0.5 else None
    return f"F.linear({x}, {w.weight(out, w.of(x)[-1])}, {bias})"


def product(w: W, x: str) -> str | None:
    shape, rng = w.of(x), w.rng
    if len(shape) < 2:
        return f"{x} @ {w.weight(shape[-1], 2)}"
    k = rng.choice((1, 2, 4))
    ways = [
        f"{x} @ {w.weight(shape[-1], k)}", f"{x} @ {x}.transpose(-1, -2)", f"{x}.transpose(-1, -2) @ {x}",
        f"torch.matmul({w.weight(k, shape[-2])}, {x})", f"{x} @ {w.weight(shape[-1])}", f"{w.weight(shape[-2])} @ {x}",
        f"torch.einsum('...ij,kj->...ik', {x}, {w.weight(k, shape[-1])})",
        f"torch.tensordot({x}, {w.weight(shape[-1], k)}, 1)",
    ]  # fmt: skip
    if len(shape) == 2:
        ways += [
            f"torch.addmm({w.weight(*rng.choice([(k,), (1, k), (shape[0], 1), (shape[0], k), ()]))}, {x}, {w.weight(shape[1], k)}, beta=0.5, alpha=2)"
        ]
        ways += [f"torch.mm({x}, {x}.t())"]
    if len(shape) == 3:
        batch = w.weight(shape[0], shape[2], k)
        ways += [f"torch.bmm({x}, {batch})", f"torch.bmm({x}, {x}.mT)"] * 2
        ways += [f"torch.baddbmm({w.weight(shape[0], 1, k)}, {x}, {batch}, alpha=0.5)"]
        ways += [f"torch.matmul({x}, {w.weight(2, 1, shape[2], k)})"]
    return rng.choice(ways)


def attention(w: W, x: str) -> str:
    """Of the value with itself, with a context of few rows, with masks, causal, or in grouped heads."""
    shape, rng = w.of(x), w.rng
    e, rows = shape[-1], shape[-2]
    s = rng.choice((1, 2, 3, rows))
    context = w.weight(*rng.choice([shape[:-2], (1,) * len(shape[:-2])]), s, e)
    masks = ["None"] * 3
    masks += [f"{w.weight(rows, s)}", f"({w.weight(rows, s)} > -0.5)", w.weight(1, s), w.weight(*shape[:-2], rows, s)]
    masks += [w.weight(*(1 for _ in shape[:-2]), rows, 1) + f".expand({(*(1 for _ in shape[:-2]), rows, s)})"]
    ways = [
        f"F.scaled_dot_product_attention({x}, {x}, {x})",
        f"F.scaled_dot_product_attention({x}, {context}, {context}, {rng.choice(masks)})",
        f"F.scaled_dot_product_attention({x}, {context}, {context}, attn_mask={rng.choice(masks)}, scale=0.3)",
        f"F.scaled_dot_product_attention({x}, {x}, {x}, is_causal=True)",
        f"F.scaled_dot_product_attention({context}, {x}, {x})",
        f"F.scaled_dot_product_attention({x}, {context}, {w.weight(*shape[:-2], s, e)})",
        f"torch.softmax({x} @ {context}.transpose(-1, -2), -1) @ {context}",
    ]
    return rng.choice(ways)


def heads(w: W, x: str) -> list[str] | None:
    """Self-attention in heads, as models write it."""
    shape = w.of(x)
    if len(shape) != 3:
        return None
    n, rows, e = shape
    h = w.rng.choice([d for d in (1, 2, 4) if e % d == 0])
    q, k, v = (w.weight(e, e) for _ in range(3))
    s = w.rng.choice((rows, 1, 2))
    source = x if s == rows else w.weight(n, s, e)
    return [
        f"q = F.linear({x}, {q}).view({n}, -1, {h}, {e // h}).transpose(1, 2)",
        f"k = F.linear({source}, {k}).view({n}, -1, {h}, {e // h}).transpose(1, 2)",
        f"v = F.linear({source}, {v}).view({n}, -1, {h}, {e // h}).transpose(1, 2)",
        f"NEW = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape({n}, {rows}, {e})",
    ]


def factors(w: W, numel: int, most: int = 5) -> list[int]:
    sizes: list[int] = []
    while len(sizes) < most - 1 and (numel > 1 or w.rng.random() < 0.3):
        sizes.append(w.rng.choice([d for d in range(1, numel + 1) if numel % d == 0]))
        numel //= sizes[-1]
    sizes.append(numel)
    w.rng.shuffle(sizes)
    return sizes


def reshape(w: W, x: str) -> str:
    shape, rng = list(w.of(x)), w.rng
    d = w.dim(x)
    sizes = factors(w, prod(shape))
    sizes[rng.randrange(len(sizes))] = -1
    ways = [
        f"{x}.reshape({factors(w, prod(shape))})", f"{x}.reshape({sizes})", f"{x}.flatten({rng.randint(0, len(shape) - 1)})",
        f"{x}.flatten(0, {rng.randint(0, len(shape) - 1)})", f"{x}.unflatten({d}, {factors(w, shape[d], 3)})",
        f"{x}.unsqueeze({d})", f"{x}.squeeze({d})", f"{x}.squeeze()", f"{x}.view({sizes})", f"{x}.reshape(-1)",
        f"{x}.contiguous().view({factors(w, prod(shape))})", f"torch.atleast_3d({x})", f"{x}.ravel()", f"{x}.reshape({shape[0]}, -1)",
        f"{x}[None]", f"{x}[..., None]", f"{x}.view_as({x})",
    ]  # fmt: skip
    return rng.choice(ways)


def permute(w: W, x: str) -> str:
    rank, rng = len(w.of(x)), w.rng
    order = [d - rank if rng.random() < 0.3 else d for d in rng.sample(range(rank), rank)]
    ways = [f"{x}.permute({order})"] * 3
    ways += [f"{x}.transpose({w.dim(x)}, {w.dim(x)})", f"{x}.movedim({w.dim(x)}, {w.dim(x)})", f"{x}.mT", f"{x}.t()"]
    ways += [
        f"{x}.permute({order}).contiguous()",
        f"{x}.swapaxes(0, -1)",
        f"{x}.contiguous(memory_format=torch.channels_last)",
    ]
    return rng.choice(ways)


def expand(w: W, x: str) -> str:
    shape, rng, d = list(w.of(x)), w.rng, w.dim(x)
    wide = [rng.choice((2, 3)) if size == 1 else rng.choice((size, -1)) for size in shape]
    times = [rng.choice((1, 1, 2)) for _ in shape]
    ways = [
        f"{x}.expand({wide})", f"{x}.expand(2, {', '.join(map(str, wide))})", f"{x}.repeat({times})", f"{x}.repeat({[2, *times]})",
        f"{x}.repeat_interleave(2, {d})", f"{x}.repeat_interleave(3, dim={d}, output_size={3 * shape[d]})", f"torch.tile({x}, {times})",
        f"{x}.unsqueeze({d}).expand({[*shape[: d % (len(shape) + 1)], 2, *shape[d % (len(shape) + 1) :]]})", f"{x}.repeat_interleave(2)",
        f"torch.broadcast_to({x}, {[2, *shape]})", f"{x}.mean({d}, keepdim=True).expand({shape})", f"{x}.select({d}, 0).unsqueeze({d}).expand_as({x})",
    ]  # fmt: skip
    return rng.choice(ways)


def cut(w: W, x: str) -> str:
    shape, rng, d = w.of(x), w.rng, w.dim(x)
    size = shape[d]
    start = rng.randint(0, size - 1)
    length = rng.randint(1, size - start)
    at = rng.randint(-size, size - 1)
    ways = [
        f"{x}.narrow({d}, {start}, {length})", f"{x}.select({d}, {at})", f"{x}.chunk(2, {d})[-1]", f"{x}.split({length}, {d})[0]",
        f"{x}.split([{start}, {size - start}], {d})[1]", f"{x}.unbind({d})[{at}]", f"{x}.flip({d})", f"{x}.flip([0, -1])",
        f"torch.tensor_split({x}, 2, {d})[0]", f"{x}[{start}:]", f"{x}[..., {start}:{start + length}]", f"{x}[..., ::2]", f"{x}[1::2, ..., :-1]",
        f"torch.roll({x}, 1, {d})", f"{x}.index_select({d}, torch.tensor([{start}, {at % size}]))", f"{x}[..., [0, -1]]",
        f"{x}.diagonal(0, 0, -1)", f"torch.tril({x})", f"{x}.unfold({d}, {length}, 1)", f"{x}[:, None, {start % 2}:]", f"{x}[-2:]", f"{x}[..., :0]",
        f"{x}.as_strided({[2, 2]}, {[1, 1]})", f"{x}.gather({d}, torch.zeros({list(shape)}, dtype=torch.int64))", f"torch.gather({x}, {d}, torch.argsort({x}, {d}))",
    ]  # fmt: skip
    return rng.choice(ways)


def join(w: W, x: str) -> str:
    rng, d, y = w.rng, w.dim(x), w.same(x)
    part = f"{x}.narrow({d}, 0, 1)"
    ways = [
        f"torch.cat([{x}, {y}], {d})", f"torch.cat([{part}, {x}, {part}], {d})", f"torch.stack([{x}, {y}], {d})", f"torch.cat([{x}, {x}])",
        f"torch.cat([{x}.chunk(2, {d})[1], {x}.chunk(2, {d})[0]], {d})", f"torch.hstack([{x}, {y}])", f"torch.cat([{x}, -{x}], dim=-1)",
        f"torch.stack([{x}, {y}], -1).flatten(-2)", f"torch.meshgrid({x}.flatten()[:6], {y}.flatten()[:7], indexing='ij')[0]",
        f"torch.meshgrid({x}.flatten()[:5], {y}.flatten()[:6], indexing='ij')[1] * 2", f"torch.cat([{x}, torch.zeros_like({x})], {d})",
    ]  # fmt: skip
    return rng.choice(ways)


def pad(w: W, x: str) -> str:
    rng, rank = w.rng, len(w.of(x))
    amounts = [rng.choice((0, 0, 1, 2, -1)) for _ in range(2 * rng.randint(1, min(rank, 3)))]
    mode = rng.choice(("constant", "constant", "reflect", "replicate", "circular"))
    if mode == "circular":  # beside a negative amount eager may return memory that nothing wrote
        amounts = [max(amount, 0) for amount in amounts]
    value = ", value=0.5" if mode == "constant" and rng.random() < 0.4 else ""
    return f"F.pad({x}, {amounts}, mode='{mode}'{value})"


def resample(w: W, x: str) -> str:
    rng, shape = w.rng, w.of(x)
    n = len(shape) - 2
    sizes = [rng.choice((size, 2 * size, 4 * size, size + 1, max(size // 2, 1))) for size in shape[2:]]
    scales = rng.choice(
        ("2.0", "2", "1.5", "2.1", "0.5", "3.0", "4.0", str([rng.choice((1.0, 2.0, 2.1, 4.0, 1.7)) for _ in range(n)]))
    )
    mode = rng.choice(
        ("nearest", "nearest", "nearest", "nearest-exact", {1: "linear", 2: "bilinear"}.get(n, "nearest"), "area")
    )
    kernel, stride = rng.choice((2, 3)), rng.choice((1, 2, 3))
    ways = [
        f"F.interpolate({x}, scale_factor={scales}, mode='{mode}')", f"F.interpolate({x}, size={sizes}, mode='{mode}')",
        f"F.interpolate({x}, scale_factor={scales}, mode='{mode}', recompute_scale_factor=True)",
        f"F.avg_pool{n}d({x}, {kernel}, {stride})", f"F.max_pool{n}d({x}, {kernel}, {stride})", f"F.max_pool{n}d({x}, 2, 2)",
        f"F.adaptive_avg_pool{n}d({x}, 2)", f"F.avg_pool{n}d({x}, 2, 2, ceil_mode=True)", f"F.max_pool{n}d({x}, 3, 1, 1)", f"F.max_pool{n}d({x}, 2, 1, 0, 2)",
        f"F.avg_pool{n}d({x}, 3, 1, 1, count_include_pad=False)", f"F.pixel_shuffle({x}, 2)", f"F.pixel_unshuffle({x}, 2)", f"F.channel_shuffle({x}, 2)",
    ]  # fmt: skip
    return rng.choice(ways)


def reduce(w: W, x: str) -> str:
    rng, d, rank = w.rng, w.dim(x), len(w.of(x))
    dims = rng.sample(range(rank), rng.randint(1, rank))
    ways = [
        f"{x}.mean({d})", f"{x}.mean({dims}, keepdim=True)", f"{x}.sum({dims})", f"{x}.sum({d}, keepdim=True)", f"{x}.amax({dims})", f"{x}.amax({d}, True)",
        f"{x}.mean()", f"{x}.sum()", f"{x}.sum(dim=[])", f"{x}.amax(())", f"torch.softmax({x}, {d})", f"torch.log_softmax({x}, {d})", f"F.softmin({x}, {d})",
        f"{x}.cumsum({d})", f"{x}.logsumexp({d})", f"{x}.std({d})", f"{x}.max({d})[0]", f"{x}.amin({d})", f"{x}.topk(1, {d})[0]", f"{x}.sort({d})[0]",
        f"{x}.prod({d}).tanh()", f"{x} - {x}.amax({dims}, keepdim=True)", f"{x} * torch.softmax({x}, {d})", f"{x}.mean({dims}, True) + {x}", f"{x}.norm()", f"{x}.var({d}, keepdim=True) + {x}",
        f"torch.cdist({x}, {x})", f"({x} > 0).sum({d}).to(torch.float64)", f"{x}.argmax({d}) + 0.5", f"({x} > 0).any({d}).double()", f"{x}.median({d})[0]",
    ]  # fmt: skip
    return rng.choice(ways)


def constant(w: W, x: str) -> str:
    """Values that depend on no input."""
    shape, rng, d = w.of(x), w.rng, w.dim(x)
    n = shape[-1]
    ways = [
        f"{x} + torch.arange({n}, dtype=torch.float64)", f"{x} * torch.linspace(0.0, 1.0, {n}, dtype=torch.float64)", f"torch.arange({n}) + torch.ones({shape}).double()",
        f"{x} + torch.tensor([0.5])", f"{x} * torch.full({shape}, 0.5, dtype=torch.float64)", f"torch.cat([{x}, {x}.new_zeros({shape})], {d})",
        f"{x} + {x}.new_ones(1)", f"torch.eye({n}, dtype=torch.float64) @ {x}.unsqueeze(-1)", "torch.tensor(3.0).double()", "torch.arange(6.0).double().reshape(2, 3)",
        f"{x} * torch.tril(torch.ones({n}, {n}, dtype=torch.float64)).sum(0)", "torch.outer(torch.arange(3.0), torch.ones(2)).double()", f"{x} + {d} * torch.ones(())",
    ]  # fmt: skip
    return rng.choice(ways)


def block(w: W, x: str) -> list[str]:
    """What real models repeat: a residual block, or a feed-forward with a gate."""
    shape, rng = w.of(x), w.rng
    if len(shape) == 4 and rng.random() < 0.6:
        c = shape[1]
        return [
            f"NEW = F.conv2d(F.silu(F.group_norm({x}, 1, eps=1e-2)), {w.weight(c, c, 3, 3)}, None, 1, 1)",
            f"NEW = F.conv2d(F.silu(F.group_norm(NEW, 1, eps=1e-2)), {w.weight(c, c, 3, 3)}, {w.weight(c)}, 1, 1)",
            f"NEW = {x} + NEW",
        ]
    e = shape[-1]
    return [
        f"NEW = F.linear(F.layer_norm({x}, ({e},), None, None, 1e-2), {w.weight(4 * e, e)})",
        "NEW, gate = NEW.chunk(2, dim=-1)",
        f"NEW = {x} + F.linear(NEW * F.gelu(gate), {w.weight(e, 2 * e)})",
    ]


def temporal(w: W, x: str) -> list[str] | None:
    """Frames and pixels change places, and back."""
    shape = w.of(x)
    if len(shape) != 4:
        return None
    n, c, h, wide = shape
    frames = w.rng.choice([d for d in range(1, n + 1) if n % d == 0])
    k = w.rng.choice((1, 3))
    return [
        f"NEW = {x}.reshape({n // frames}, {frames}, {c}, {h}, {wide}).permute(0, 2, 1, 3, 4)",
        f"NEW = NEW + F.conv3d(NEW, {w.weight(c, c, k, 1, 1)}, None, 1, ({k // 2}, 0, 0))",
        f"NEW = NEW.permute(0, 2, 1, 3, 4).reshape({n}, {c}, {h}, {wide})",
    ]


def low_precision(w: W, x: str) -> str:
    w.made.tolerance = 1e-4
    return w.rng.choice(
        (
            f"{x}.float()",
            f"F.silu({x}.to(torch.float32)).double()",
            f"{x}.to(torch.float32) + {x}",
            f"{x}.float().softmax(-1)",
        )
    )


TEMPLATES: tuple[Template, ...] = (
    *(unary,) * 4, *(binary,) * 4, *(residual,) * 2, *(inplace,) * 2, *(layer_norm,) * 2, *(group_norm,) * 3, other_norm, *(convolution,) * 4, *(linear,) * 2,
    *(product,) * 2, *(attention,) * 2, *(heads,) * 2, *(reshape,) * 4, *(permute,) * 3, *(expand,) * 2, *(cut,) * 4, *(join,) * 2, pad, *(resample,) * 2,
    *(reduce,) * 3, constant, *(block,) * 3, *(temporal,) * 2, low_precision,
)  # fmt: skip
