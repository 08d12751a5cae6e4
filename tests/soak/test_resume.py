"""Calibration and training that are interrupted, and go on."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import fmecompile
from fmecompile.calibrate import calibrate
from tests.soak.checks import compare
from tests.soak.failures import ERRORS, Failing, live_bytes
from tests.soak.test_calls import net

STEPS = 4


def generation_of(module: Any) -> None:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with fmecompile.generation(steps=STEPS):
        for step in range(STEPS):
            x = x - 0.1 * module(x, float(STEPS - step))


def calibrated(module: Any) -> fmecompile.Calibration:
    return calibrate(module, lambda: generation_of(module), cuts=["mixed"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("is_optimized", [False, True], ids=["plain", "optimized"])
def test_an_interrupted_calibration_leaves_nothing_and_runs_again(is_optimized: bool) -> None:
    module = net()
    x = torch.ones(1, 4, 8, 8, dtype=torch.float64)
    if is_optimized:
        fmecompile.optimize(module)
    with torch.no_grad():
        wanted = module(x)
    want = calibrated(module)
    before, state = live_bytes(), vars(module).copy()
    rng = Random(3)
    for at in (0, 9, 60, 140, 300):
        try:
            with Failing(at, rng.choice(ERRORS)):
                calibrated(module)
        except BaseException as error:
            assert "injected" in str(error), error
        assert live_bytes() == before
        assert vars(module) == state
        assert fmecompile.is_optimized(module) == is_optimized
    assert calibrated(module) == want
    with torch.no_grad():
        compare(module(x), wanted, 1e-10)


@pytest.mark.timeout(600)
def test_training_survives_a_checkpoint_that_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before is still there, and what goes on from it is the run that was never interrupted."""
    from benchmarks.quality.train import Recipe, Trainer

    recipe, path = Recipe("svd", 3, batch=1), tmp_path / "svd.checkpoint"
    trainer = Trainer(recipe)
    trainer.advance()
    trainer.checkpoint(path)
    trainer.advance()
    plain = torch.save

    def half(state: Any, to: Path) -> None:
        plain(state, to)
        Path(to).write_bytes(Path(to).read_bytes()[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            trainer.checkpoint(path)
    resumed = Trainer.resumed(path)
    assert resumed.step == 1
    resumed.advance()
    for name, value in trainer.unet.state_dict().items():
        assert torch.equal(value, resumed.unet.state_dict()[name]), name
