"""``fmecompile.compat``: the paper's interface on whole pipelines, with the output of the plain one."""

from __future__ import annotations

import copy
import inspect
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fmecompile
from fmecompile.compat import FMEWrapper
from fmecompile.errors import OptionError, TargetError
from tests import pipelines
from tests.pipelines import TOLERANCE, changes, frames, relative, state

pytestmark = pytest.mark.usefixtures("one_thread")


def trips(pipe: Any) -> list[int]:
    """Chunk trips of every group of every plan."""
    return [group.trips for record in fmecompile.explain(pipe).records for group in record.plan.groups]


def test_arguments_are_those_of_the_released_wrapper() -> None:
    defaults = {name: p.default for name, p in inspect.signature(FMEWrapper).parameters.items()}
    empty = inspect.Parameter.empty
    assert defaults == {
        "num_temporal_chunk": empty,
        "num_spatial_chunk": None,
        "num_frames": None,
        "verbose": False,
    }
    assert FMEWrapper(3).num_spatial_chunk == 3
    assert FMEWrapper(3, 5).max_chunks == FMEWrapper(5, 3).max_chunks == 5


@pytest.mark.parametrize("build", [pipelines.svd, pipelines.animatediff], ids=["svd", "animatediff"])
def test_a_wrapped_pipeline_gives_the_same_frames_in_so_many_chunks(build: Callable[[], Any]) -> None:
    pipe = build()
    want, before = frames(pipe), state(pipe)
    wrapper = FMEWrapper(num_temporal_chunk=3, num_spatial_chunk=2, num_frames=4)
    assert wrapper.wrap(pipe) is pipe
    assert relative(frames(pipe), want) < TOLERANCE
    assert fmecompile.is_optimized(pipe) and not fmecompile.explain(pipe).refused
    assert 1 < max(trips(pipe)) <= 3
    assert wrapper.unwrap(pipe) is pipe
    assert changes(before, state(pipe)) == []
    assert torch.equal(frames(pipe), want)


def test_another_number_of_frames_is_planned_anew() -> None:
    plain = pipelines.animatediff()
    pipe = FMEWrapper(2, 2, num_frames=5).wrap(copy.deepcopy(plain))
    for count in (4, 3):
        call = {"num_frames": count, "num_inference_steps": 1}
        assert relative(frames(pipe, **call), frames(plain, **call)) < TOLERANCE
    assert len(fmecompile.explain(pipe.unet).records) == 2
    assert max(trips(pipe)) == 2


def test_fewer_chunks_hold_no_less() -> None:
    """Wrapping again replaces the numbers, and drops what was compiled."""
    pipe, peaks = pipelines.animatediff(), []
    for count in (4, 2, 1):
        FMEWrapper(count).wrap(pipe)
        frames(pipe, num_inference_steps=1, output_type="latent")
        (record,) = fmecompile.explain(pipe.unet).records
        assert max((group.trips for group in record.plan.groups), default=1) <= count
        peaks.append(record.plan.projected_peak_bytes)
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]


def test_a_module_is_wrapped_too(caplog: pytest.LogCaptureFixture) -> None:
    vae = pipelines.vae()
    with caplog.at_level(logging.INFO, logger="fmecompile"):
        assert FMEWrapper(2, verbose=True).wrap(vae) is vae
    assert [record.message for record in caplog.records] == [
        "decoder (Decoder): at most 2 chunks",
        "encoder (Encoder): at most 2 chunks",
    ]
    assert FMEWrapper(9).unwrap(vae) is vae and not fmecompile.is_optimized(vae)


# Refusals


@pytest.mark.parametrize("name", ["num_temporal_chunk", "num_spatial_chunk", "num_frames"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "7"])
def test_what_is_no_count_is_refused(name: str, value: object) -> None:
    arguments: Any = {"num_temporal_chunk": 7, name: value}
    with pytest.raises(OptionError, match=f"{name}={value!r}"):
        FMEWrapper(**arguments)


@pytest.mark.parametrize("target", [None, "pipe", [nn.Linear(2, 2)]])
def test_what_is_no_pipeline_is_refused(target: Any) -> None:
    for act in (FMEWrapper(7).wrap, FMEWrapper(7).unwrap):
        with pytest.raises(TargetError, match="diffusion pipeline"):
            act(target)


def test_what_was_never_wrapped_is_not_unwrapped() -> None:
    module, wrapper = nn.Linear(2, 2), FMEWrapper(7)
    with pytest.raises(TargetError, match="is not wrapped"):
        wrapper.unwrap(module)
    wrapper.unwrap(wrapper.wrap(module))
    with pytest.raises(TargetError, match="is not wrapped"):
        wrapper.unwrap(module)


def test_the_package_does_not_import_it() -> None:
    code = "import sys, fmecompile; assert 'fmecompile.compat' not in sys.modules; import fmecompile.compat"
    subprocess.run([sys.executable, "-c", code], check=True)
