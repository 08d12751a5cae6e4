"""Optimized pipelines that are moved, offloaded, saved, copied, shared and called with other sizes."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from torch import nn

import fmecompile
from fmecompile.runtime.dispatch import MAX_PROGRAMS, Dispatcher, find
from tests import pipelines
from tests.models import seeded
from tests.pipelines import TOLERANCE, assert_same, changes, frames, plans, relative, state, twins

pytestmark = pytest.mark.usefixtures("one_thread")

# --------------------------------------------------------------------------------------------- hooks around a forward


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 128), nn.Linear(128, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.down(self.up(x).relu()) * scale


class Counting(ModelHook):
    """Of accelerate: adds one to the input."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return (args[0] + 1, *args[1:]), kwargs


class Doubling(diffusers.hooks.ModelHook):
    """Of diffusers: doubles the result."""

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output * 2


class Halving(diffusers.hooks.ModelHook):
    """Of diffusers, and in the place of ``forward``."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.fn_ref.original_forward(*args, **kwargs) / 2


def add_accelerate(module: nn.Module) -> Any:
    add_hook_to_module(module, Counting())
    return lambda: remove_hook_from_module(module)


def add_diffusers(module: nn.Module, kind: type = Doubling) -> Any:
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(kind(), kind.__name__)
    return lambda: registry.remove_hook(kind.__name__)


def add_both(module: nn.Module) -> Any:
    removals = [add_diffusers(module), add_accelerate(module)]
    return lambda: [remove() for remove in reversed(removals)]


def add_two(module: nn.Module) -> Any:
    removals = [add_diffusers(module), add_diffusers(module, Halving)]
    return lambda: [remove() for remove in reversed(removals)]


HOOKS = {
    "accelerate": add_accelerate,
    "diffusers": add_diffusers,
    "in-place-of-forward": functools.partial(add_diffusers, kind=Halving),
    "both": add_both,
    "two-of-diffusers": add_two,
}


@pytest.mark.parametrize("add", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("first", ["optimize", "hook"])
@torch.no_grad()
def test_a_hook_around_an_optimized_module(add: Any, first: str) -> None:
    plain, x = seeded(Small()), torch.ones(64, 8)
    module = copy.deepcopy(plain)
    add(plain)
    want = plain(x)
    if first == "hook":
        remove = add(module)
        before = dict(vars(module))
        fmecompile.optimize(module, strict=True)
    else:
        fmecompile.optimize(module, strict=True)
        remove = add(module)
    assert fmecompile.is_optimized(module)
    assert relative(module(x), want) < TOLERANCE
    assert plans(module)[0].weight_bytes > 0
    assert "scale" in inspect.signature(module.forward).parameters
    fmecompile.restore(module)
    assert not fmecompile.is_optimized(module)
    assert relative(module(x), want) < TOLERANCE
    if first == "hook":
        assert {n: v for n, v in vars(module).items() if n != "_modules"} == {
            n: v for n, v in before.items() if n != "_modules"
        }
    assert _reachable_dispatchers(module) == []
    remove()
    assert relative(module(x), Small.forward(module, x)) == 0


def _reachable_dispatchers(module: nn.Module) -> list[Any]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is Dispatcher and o.module is module]


@torch.no_grad()
def test_a_hook_that_is_removed_leaves_the_module_optimized() -> None:
    module = fmecompile.optimize(seeded(Small()), strict=True)
    remove = add_accelerate(module)
    remove()
    assert fmecompile.is_optimized(module)
    module(torch.ones(64, 8))
    fmecompile.restore(module)
    assert "forward" not in vars(module)


@torch.no_grad()
def test_hooks_come_before_the_weights_are_read() -> None:
    """The weights lie elsewhere until the hook of the whole module brings them."""
    module, x = seeded(Small()), torch.ones(64, 8)
    want = module(x)
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    add_hook_to_module(module, AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True))
    assert module.up.weight.device.type == "meta"
    fmecompile.optimize(module, strict=True)
    for _ in range(2):
        assert relative(module(x), want) < TOLERANCE
        assert module.up.weight.device.type == "meta"
    assert len(plans(module)) == 1


INNER = {
    "accelerate": lambda module: add_hook_to_module(module.up, Counting()),
    "diffusers": lambda module: add_diffusers(module.up),
    "forward hook": lambda module: module.up.register_forward_hook(lambda m, args, out: out * 2),
    "forward pre-hook": lambda module: module.up.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
}


@pytest.mark.parametrize("add", INNER.values(), ids=INNER)
@torch.no_grad()
def test_hooks_inside_make_a_module_eager(add: Any) -> None:
    module, x = seeded(Small()), torch.ones(64, 8)
    without = fmecompile.optimize(module)(x)
    add(module)
    with pytest.warns(UserWarning, match=r"up has .*hook") as caught:
        got = module(x)
    assert "next:" in str(caught[0].message)
    assert torch.equal(got, Small.forward(module, x))
    assert relative(got, without) > 1e-3
    assert "hook" in fmecompile.explain(module).refused[0]
    fmecompile.optimize(module, strict=True)
    with pytest.raises(fmecompile.CaptureError, match="up has"):
        module(x)


# ------------------------------------------------------------------------------------------------------------ offload


@pytest.mark.parametrize("first", ["optimize", "offload"])
def test_model_cpu_offload(first: str) -> None:
    plain = pipelines.animatediff()
    fast = copy.deepcopy(plain)
    if first == "optimize":
        fmecompile.optimize(fast, strict=True)
    fast.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        fmecompile.optimize(fast, strict=True)
    assert fmecompile.is_optimized(fast)
    want = frames(plain)
    assert relative(frames(fast), want) < TOLERANCE
    assert all(fmecompile.explain(fast).parts[path].records for path in ("unet", "vae.decoder"))
    fmecompile.restore(fast)
    assert not fmecompile.is_optimized(fast)
    assert relative(frames(fast), want) < TOLERANCE


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_runs_eagerly_and_says_so(kind: str) -> None:
    plain = pipelines.animatediff()
    fast = fmecompile.optimize(copy.deepcopy(plain))
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    fast.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    with pytest.warns(UserWarning, match="group_offloading"):
        got = frames(fast, output_type="latent")
    assert relative(got, frames(plain, output_type="latent")) < TOLERANCE
    fmecompile.restore(fast)
    assert relative(frames(fast, output_type="latent"), got) == 0


@pytest.mark.slow
def test_precision_changes() -> None:
    fast, plain = twins()
    assert_same(fast, plain)
    for pipe in (fast, plain):
        pipe.to(torch.float64)
    got, want = frames(fast, output_type="latent"), frames(plain, output_type="latent")
    assert got.dtype == torch.float64
    assert relative(got, want) < 1e-9
    assert len(plans(fast.unet)) == 1
    for pipe in (fast, plain):
        pipe.to(torch.float32).to("cpu")
    assert_same(fast, plain)


# ------------------------------------------------------------------------------------------------ save, copy, pickle


def test_saved_as_if_it_were_not_optimized(tmp_path: Path) -> None:
    fast, plain = twins()
    want = frames(plain, output_type="latent")
    fast.save_pretrained(tmp_path)
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(fast.unet.state_dict()[name], weight)
    loaded = diffusers.UNetMotionModel.from_pretrained(tmp_path / "unet")
    assert not fmecompile.is_optimized(loaded)
    plain.unet = loaded
    assert relative(frames(plain, output_type="latent"), want) < TOLERANCE


def test_a_copied_pipeline_is_its_own() -> None:
    fast, plain = twins()
    want = frames(plain)
    twin = copy.deepcopy(fast)
    assert fmecompile.is_optimized(twin)
    assert find(twin.unet) is not find(fast.unet)
    assert vars(twin)["decode_latents"] is not vars(fast)["decode_latents"]
    twin.vae.decoder.conv_out.bias.data.add_(1)
    assert relative(frames(twin), want) > 1e-3
    fmecompile.restore(twin)
    assert "decode_latents" not in vars(twin)
    assert fmecompile.is_optimized(fast)


def test_an_optimized_pipeline_refuses_to_be_pickled() -> None:
    pipe = fmecompile.optimize(pipelines.animatediff())
    for thing in (pipe.unet, pipe.vae, pipe):
        with pytest.raises(TypeError, match="restore"):
            pickle.dumps(thing)
    assert pickle.loads(pickle.dumps(fmecompile.restore(pipe).vae)) is not None


# -------------------------------------------------------------------------------------------- calls that differ


@pytest.mark.slow
def test_guidance_frames_and_size_change_between_calls() -> None:
    fast, plain = twins()
    for call in ({}, {"guidance_scale": 1.0}, {"num_frames": 2}, {"height": 8}, {}):
        assert_same(fast, plain, **call)
    assert len(plans(fast.unet)) == 4


@torch.no_grad()
def test_old_plans_go_and_nothing_grows() -> None:
    module = fmecompile.optimize(seeded(Small()), strict=True)
    dispatcher = find(module)
    assert dispatcher is not None
    programs = []
    for rows in range(2, 2 * MAX_PROGRAMS):
        module(torch.ones(rows, 8))
        programs.append(weakref.ref(next(reversed(dispatcher._programs.values()))))
    gc.collect()
    assert sum(program() is not None for program in programs) == MAX_PROGRAMS == len(dispatcher.records)
    module.up.register_forward_hook(lambda *_: None)
    fmecompile.optimize(module)
    with pytest.warns(UserWarning):
        for rows in range(2, 2 * MAX_PROGRAMS):
            module(torch.ones(rows, 8))
    assert len(fmecompile.explain(module).refused) == MAX_PROGRAMS
    assert sum(program() is not None for program in programs) == 0


@torch.no_grad()
def test_a_refused_call_keeps_no_tensors() -> None:
    module = fmecompile.optimize(seeded(Small()))
    module.up.register_forward_hook(lambda *_: None)
    x = torch.ones(4, 8)
    seen = weakref.ref(x)
    with pytest.warns(UserWarning, match="forward hook"):
        module(x)
    assert fmecompile.explain(module).refused
    del x
    gc.collect()
    assert seen() is None


def test_an_exchanged_vae_keeps_its_chunk_size() -> None:
    pipe = fmecompile.optimize(pipelines.animatediff(), strict=True)
    pipe.vae = pipelines.vae()
    with mock.patch.object(pipe.vae, "decode", wraps=pipe.vae.decode) as decode:
        pipe.decode_latents(torch.zeros(1, 4, 4, 8, 8), 2)
    assert [len(call.args[0]) for call in decode.call_args_list] == [2, 2]


def test_two_pipelines_share_a_denoiser() -> None:
    first = pipelines.animatediff()
    want = frames(first)
    second = diffusers.AnimateDiffVideoToVideoPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    other = frames(second)
    fmecompile.optimize(first, strict=True)
    fmecompile.optimize(second, strict=True)
    assert second.unet is first.unet
    assert relative(frames(first), want) < TOLERANCE
    assert relative(frames(second), other) < TOLERANCE
    assert len(plans(first.unet)) == 1
    fmecompile.restore(second)
    assert not fmecompile.is_optimized(first)
    assert torch.equal(frames(first), want)
    fmecompile.restore(first)
    assert "decode_latents" not in vars(first)


@torch.no_grad()
def test_two_threads_call_one_denoiser() -> None:
    pipe = pipelines.animatediff()
    unet = pipe.unet
    generator = torch.Generator().manual_seed(0)
    calls = [
        (torch.randn(1, 4, n, 8, 8, generator=generator), 7, torch.randn(n, 8, 32, generator=generator)) for n in (2, 3)
    ]
    want = [unet(*call).sample for call in calls]
    fmecompile.optimize(pipe, strict=True)
    start = threading.Barrier(2)

    def work(k: int) -> float:
        start.wait()
        with torch.no_grad():
            return max(relative(unet(*calls[k]).sample, want[k]) for _ in range(3))

    with ThreadPoolExecutor(2) as pool:
        assert max(pool.map(work, range(2))) < TOLERANCE
    assert len(plans(unet)) == 2


# ---------------------------------------------------------------------------------------------------------- bad input


class Nothing:
    """Looks like a pipeline; every component is missing."""

    unet = vae = None


def test_missing_components() -> None:
    with pytest.raises(fmecompile.TargetError, match="nothing to optimize"):
        fmecompile.optimize(Nothing())
    pipe = pipelines.animatediff()
    pipe.vae.decoder, decoder = nn.Identity(), pipe.vae.decoder
    pipe.vae.decoder = decoder
    pipe.image_encoder = pipe.feature_extractor = None
    want = frames(pipe, output_type="latent")
    pipe.vae, vae = None, pipe.vae
    fmecompile.optimize(pipe, strict=True)
    assert fmecompile.is_optimized(pipe)
    assert "decode_latents" not in vars(pipe)
    pipe.vae = vae
    assert not fmecompile.is_optimized(pipe)  # a part came that is not
    assert relative(frames(pipe, output_type="latent"), want) < TOLERANCE
    fmecompile.restore(pipe)


def test_a_compiled_component_is_refused_before_anything_is_patched() -> None:
    pipe = pipelines.animatediff()
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend="eager")
    with pytest.raises(fmecompile.TargetError, match=r"vae\.decoder was given to torch\.compile"):
        fmecompile.optimize(pipe)
    assert find(pipe.unet) is None and find(pipe.vae.encoder) is None


def test_twice_optimized_and_partly_restored() -> None:
    pipe = pipelines.animatediff()
    frames(pipe)
    before = state(pipe)
    fmecompile.optimize(pipe)
    fmecompile.optimize(pipe, strict=True)
    fmecompile.restore(pipe.unet)
    assert not fmecompile.is_optimized(pipe)
    assert not fmecompile.is_optimized(pipe.unet)
    assert fmecompile.is_optimized(pipe.vae)
    assert "unet: not optimized" in str(fmecompile.explain(pipe))
    fmecompile.restore(pipe)
    fmecompile.restore(pipe)
    assert changes(before, state(pipe)) == []
    with pytest.raises(fmecompile.TargetError, match="not optimized"):
        fmecompile.explain(pipe)


def test_when_one_part_cannot_be_patched_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.animatediff()
    fmecompile.optimize(pipe.unet)
    earlier, before = find(pipe.unet), state(pipe)
    patch = Dispatcher.patch

    def fails_at_the_decoder(self: Dispatcher) -> None:
        if self.module is pipe.vae.decoder:
            raise RuntimeError("no")
        patch(self)

    monkeypatch.setattr(Dispatcher, "patch", fails_at_the_decoder)
    with pytest.raises(RuntimeError, match="no"):
        fmecompile.optimize(pipe)
    assert find(pipe.unet) is earlier
    assert changes(before, state(pipe)) == []


@pytest.mark.parametrize("door", [fmecompile.plan, fmecompile.stages])
def test_doors_for_one_module_name_it(door: Any) -> None:
    with pytest.raises(fmecompile.TargetError, match=r"pipe\.unet"):
        door(fmecompile.optimize(pipelines.animatediff()))
