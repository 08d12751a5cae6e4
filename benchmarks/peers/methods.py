"""The peers and this project's own settings: what each does to a ``Subject``, in its own documentation's words.

A method raises what its library raises; ``Refused`` is for one that would run but do nothing, or has nothing to run on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

import fmecompile
from benchmarks.peers.subjects import FAMILIES, Subject

EVERY = tuple(FAMILIES)
UNETS = ("SVD", "AnimateDiff")
VAES = ("SVD VAE", "AnimateDiff VAE")


class Refused(Exception):
    """Why a method has no figure here, in a line."""


@dataclass(frozen=True)
class Method:
    """``exact``: it promises the output of the model as it is. ``reuses``: it takes values from an earlier step.
    ``package`` is what it needs beyond this project's own dependencies, by the name that is imported."""

    name: str
    apply: Callable[[Subject], object]
    families: tuple[str, ...] = EVERY
    exact: bool = True
    reuses: bool = False
    package: str | None = None

    def enter(self, subject: Subject) -> None:
        """Apply it. Raises Refused with the command that installs it where it is not there."""
        if self.package is not None and find_spec(self.package) is None:
            raise Refused("not installed; next: pip install -e '.[peers]'")
        self.apply(subject)


def _as_it_is(subject: Subject) -> None:
    pass


def _forward_chunking(subject: Subject) -> None:
    subject.module.enable_forward_chunking()  # pyright: ignore[reportCallIssue]


def _split_inference(*, has_middle: bool = True, **sizes: int) -> Callable[[Subject], None]:
    """Without the middle block where not ``has_middle``: one without a motion module passes what is to be split by
    position, which the wrapper does not take."""

    def apply(subject: Subject) -> None:
        from diffusers.pipelines.free_noise_utils import AnimateDiffFreeNoiseMixin

        unet: Any = subject.module
        holder: Any = AnimateDiffFreeNoiseMixin()
        middle = unet.mid_block if has_middle else None
        holder.unet = SimpleNamespace(down_blocks=unet.down_blocks, mid_block=middle, up_blocks=unet.up_blocks)
        holder.enable_free_noise_split_inference(**sizes)

    return apply


def _slicing(subject: Subject) -> None:
    subject.module.enable_slicing()  # pyright: ignore[reportCallIssue]


def _tiling(subject: Subject) -> None:
    subject.module.enable_tiling()  # pyright: ignore[reportCallIssue]


def _decode_chunk_size(size: int) -> Callable[[Subject], None]:
    """As ``decode_latents`` of the diffusion pipelines does it."""

    def apply(subject: Subject) -> None:
        decode = subject.function

        def chunked(latents: torch.Tensor, *frames: int, **options: Any) -> Any:
            parts = [decode(part, *(len(part) for _ in frames), **options)[0] for part in latents.split(size)]
            return (torch.cat(parts),)

        subject.function = chunked

    return apply


def _torch_compile(**options: Any) -> Callable[[Subject], None]:
    def apply(subject: Subject) -> None:
        if options and not torch.cuda.is_available():
            raise Refused("records CUDA graphs: needs a GPU")
        subject.function = torch.compile(subject.function, **options)
        subject.compiles = True

    return apply


def _fmecompile(**options: Any) -> Callable[[Subject], None]:
    def apply(subject: Subject) -> None:
        fmecompile.optimize(subject.module, strict=True, **options)
        subject.compiles = True

    return apply


def _step_rehash(subject: Subject) -> None:
    full_steps = -(-len(subject.timesteps) // INTERVAL)
    _fmecompile(reuse=fmecompile.StepRehash(full_steps=full_steps))(subject)


def _inductor(subject: Subject) -> None:
    try:
        _fmecompile(backend="inductor")(subject)
    except fmecompile.OptionError as error:
        raise Refused(f"this version has no such backend: {error}") from None


def _budget(share_of_eager: float) -> Callable[[Subject], None]:
    """Activations may take ``share_of_eager`` of what eager holds; the fastest plan that meets that is taken."""

    def apply(subject: Subject) -> None:
        eager = fmecompile.measure(subject.call).peak_bytes
        tensors = [leaf for leaf in tree_leaves(subject.inputs) if isinstance(leaf, torch.Tensor)]
        given = (*subject.module.parameters(), *subject.module.buffers(), *tensors)
        held = sum(tensor.nbytes for tensor in given)
        _fmecompile(memory_budget=held + int(share_of_eager * eager))(subject)

    return apply


def _deep_cache(subject: Subject) -> None:
    from DeepCache import DeepCacheSDHelper  # pyright: ignore[reportMissingImports]

    if isinstance(subject.timesteps, FakeTensor):
        subject.shorten(len(subject.timesteps), as_numbers=True)

    helper = DeepCacheSDHelper(pipe=subject.pipeline)
    helper.set_params(cache_interval=INTERVAL, cache_branch_id=0)
    helper.enable()


def _cache_dit(subject: Subject) -> None:
    import cache_dit  # pyright: ignore[reportMissingImports]

    cache_dit.enable_cache(subject.module)


def _hooks(apply: str, config: str, **options: Any) -> Callable[[Subject], None]:
    """One of diffusers' caches, by its ``apply_`` function: UNets have no ``enable_cache``."""

    def enter(subject: Subject) -> None:
        from diffusers import hooks
        from diffusers.hooks.hooks import HookRegistry
        from diffusers.models.cache_utils import CacheMixin

        known = {name: (lambda: subject.progress) if value is _PROGRESS else value for name, value in options.items()}
        module: Any = subject.module
        getattr(hooks, apply)(module, getattr(hooks, config)(**known))
        registries = [inner._diffusers_hook for inner in module.modules() if hasattr(inner, "_diffusers_hook")]
        if not any(registry.hooks for registry in registries):
            raise Refused("hooks nothing: no module of this model has a name that it looks for")
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.invalidate_child_registries_cache()
        subject.reset = registry.reset_stateful_hooks
        subject.around = lambda: CacheMixin.cache_context(module, "both halves")

    return enter


_PROGRESS = object()
"""In the place of an option: a function that says how far a generation is, on the scale that these hooks expect."""
INTERVAL = 3
"""A full step, then two that reuse."""
_SKIPS = {"spatial_attention_block_skip_range": 2, "temporal_attention_block_skip_range": 4}
_SEER: dict[str, Any] = {
    "cache_interval": INTERVAL,
    "disable_cache_before_step": 1,
}

EXACT = (
    Method("diffusers eager", _as_it_is),
    Method("forward chunking", _forward_chunking, UNETS),
    Method("FreeNoise split inference", _split_inference(), ("AnimateDiff",)),
    Method("FreeNoise split inference, outer blocks, 256 and 16", _split_inference(has_middle=False), ("AnimateDiff",)),
    Method(
        "FreeNoise split inference, outer blocks, 64 and 1",
        _split_inference(has_middle=False, spatial_split_size=64, temporal_split_size=1),
        ("AnimateDiff",),
    ),
    Method("VAE slicing", _slicing, VAES),
    Method("VAE tiling", _tiling, VAES, exact=False),
    Method("decode_chunk_size=1", _decode_chunk_size(1), ("AnimateDiff VAE",)),
    Method("decode_chunk_size=2", _decode_chunk_size(2), ("SVD VAE",), exact=False),
    Method("torch.compile", _torch_compile()),
    Method("torch.compile, reduce-overhead", _torch_compile(mode="reduce-overhead")),
    Method("fmecompile", _fmecompile()),
    Method("fmecompile, backend inductor", _inductor),
    Method("fmecompile, budget: half of eager", _budget(0.5)),
)
"""One call, or one decoded clip; some are not exact."""
REUSE = (
    Method("DeepCache (PyPI), interval 3", _deep_cache, UNETS, False, True, "DeepCache"),
    Method(
        "diffusers PyramidAttentionBroadcast",
        _hooks(
            "apply_pyramid_attention_broadcast",
            "PyramidAttentionBroadcastConfig",
            current_timestep_callback=_PROGRESS,
            **_SKIPS,
        ),
        UNETS,
        False,
        True,
    ),
    Method(
        "diffusers FasterCache",
        _hooks("apply_faster_cache", "FasterCacheConfig", current_timestep_callback=_PROGRESS),
        UNETS,
        False,
        True,
    ),
    Method("diffusers FirstBlockCache", _hooks("apply_first_block_cache", "FirstBlockCacheConfig"), UNETS, False, True),
    Method(
        "diffusers MagCache",
        _hooks("apply_mag_cache", "MagCacheConfig", calibrate=True),
        UNETS,
        False,
        True,
    ),
    Method(
        "diffusers TaylorSeer",
        _hooks("apply_taylorseer_cache", "TaylorSeerCacheConfig", **_SEER),
        UNETS,
        False,
        True,
    ),
    Method(
        "diffusers TaylorSeer, attention named for it",
        _hooks("apply_taylorseer_cache", "TaylorSeerCacheConfig", cache_identifiers=[r".*\.attn\d"], **_SEER),
        UNETS,
        False,
        True,
    ),
    Method("cache-dit (PyPI)", _cache_dit, UNETS, False, True, "cache_dit"),
    Method(
        "fmecompile, DeepCache, interval 3",
        _fmecompile(reuse=fmecompile.DeepCache(interval=INTERVAL)),
        UNETS,
        False,
        True,
    ),
    Method("fmecompile, StepRehash, a third full", _step_rehash, UNETS, False, True),
)
METHODS: dict[str, Method] = {method.name: method for method in (*EXACT, *REUSE)}


def of_family(methods: Iterable[Method], family: str) -> list[Method]:
    return [method for method in methods if family in method.families]
