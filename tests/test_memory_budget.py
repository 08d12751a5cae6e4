"""memory_budget: everything on the device counts, the fewest trips that fit are taken, and refusals name the owners."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fmecompile
from fmecompile.backends import budgeted
from fmecompile.backends.budgeted import ASSUMED_WORKSPACE_BYTES, Budget, device_bytes, workspace_bytes
from fmecompile.budget import Allowance
from fmecompile.partition.tradeoffs import Limits
from fmecompile.pipeline import compile_module
from tests import pipelines
from tests.models import seeded
from tests.pipelines import frames, relative

MIB = 2**20


class Block(nn.Module):
    """A feed-forward whose middle is sixteen times its input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def block() -> nn.Module:
    return seeded(Block())


def batch(rows: int = 1024) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))


def weight_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


@pytest.fixture(autouse=True)
def no_grad(one_thread: None) -> Any:
    with torch.no_grad():
        yield


def only_record(module: nn.Module) -> Any:
    (record,) = fmecompile.explain(module).records
    return record


# ------------------------------------------------------------------------------------------------------------- modules


def test_a_budget_bounds_weights_inputs_and_activations() -> None:
    module, x = block(), batch()
    want = module(x)
    default = fmecompile.plan(module, x)
    rest = weight_bytes(module) + x.nbytes
    budget = rest + (default.floor_bytes + default.eager_peak_bytes) // 2
    fmecompile.optimize(module, memory_budget=budget, strict=True)
    measured = fmecompile.measure(module, x)
    assert relative(measured.output, want) < 1e-5
    record = only_record(module)
    assert record.allowance == Allowance(budget, weight_bytes(module), x.nbytes)
    assert rest + record.plan.projected_peak_bytes <= budget
    again = fmecompile.measure(module, x)
    assert again.peak_bytes <= record.plan.projected_peak_bytes <= record.plan.allowed_bytes
    assert record.plan.allowed_bytes == budget - rest
    assert 1 < record.plan.trips < default.trips  # the fewest that fit
    assert "left for activations" in str(fmecompile.explain(module))


def test_a_large_budget_needs_no_trips() -> None:
    module = fmecompile.optimize(block(), memory_budget="1GiB", strict=True)
    module(batch())
    assert only_record(module).plan.trips == 0


def test_a_budget_below_the_floor_is_refused_at_the_first_call() -> None:
    module, x = block(), batch()
    floor = fmecompile.plan(module, x).floor_bytes
    budget = weight_bytes(module) + x.nbytes + floor // 2
    fmecompile.optimize(module, memory_budget=budget)  # not strict: it is refused all the same
    for _ in range(2):
        with pytest.raises(fmecompile.BudgetInfeasible) as caught:
            module(x)
    error = caught.value
    assert error.allowed_bytes == budget
    assert error.floor_bytes == pytest.approx(weight_bytes(module) + x.nbytes + floor, rel=0.05)
    for word in ("Block needs", "weights", "inputs", "activations", "at their peak", "smaller"):
        assert word in str(error)
    fmecompile.optimize(module, memory_budget=int(error.floor_bytes * 1.05), strict=True)
    module(x)  # what the message asks for is enough


def test_plan_takes_a_budget() -> None:
    module, x = block(), batch()
    default = fmecompile.plan(module, x)
    rest = weight_bytes(module) + x.nbytes
    plan = fmecompile.plan(module, x, memory_budget=rest + 2 * default.floor_bytes)
    assert plan.projected_peak_bytes <= plan.allowed_bytes == 2 * default.floor_bytes
    assert plan.trips < default.trips
    with pytest.raises(fmecompile.BudgetInfeasible, match="Block needs"):
        fmecompile.plan(module, x, memory_budget=rest + default.floor_bytes // 2)


@pytest.mark.parametrize(
    "value", [-1, 0, -0.5, 0.0, 1.5, float("nan"), True, "", "-8GiB", "much", "8 apples", b"8GiB", [8]]
)
def test_what_is_no_budget(value: Any) -> None:
    module = block()
    for door in (lambda: fmecompile.optimize(module, memory_budget=value), lambda: Budget.of(value)):
        with pytest.raises(fmecompile.OptionError, match=r"memory_budget.*\n  next: "):
            door()
    assert not fmecompile.is_optimized(module)


def test_a_budget_below_the_weights_is_refused_at_once() -> None:
    module = block()
    with pytest.raises(fmecompile.BudgetInfeasible, match="weights alone") as caught:
        fmecompile.optimize(module, memory_budget=weight_bytes(module))
    assert caught.value.floor_bytes == weight_bytes(module)
    assert not fmecompile.is_optimized(module)


def test_a_fraction_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert Budget.of(0.5).bytes_on(cpu) == (device_bytes(cpu) or 0) // 2 > 0
    module = fmecompile.optimize(block(), memory_budget=1.0, strict=True)
    module(batch())
    assert only_record(module).allowance.budget_bytes == device_bytes(cpu)
    monkeypatch.setattr(budgeted, "_installed_bytes", lambda: 10 * MIB)
    monkeypatch.setattr(budgeted, "_CONTAINER_LIMITS", ())
    assert Budget.of(0.5).bytes_on(cpu) == 5 * MIB
    monkeypatch.setattr(budgeted, "_installed_bytes", lambda: None)
    with pytest.raises(fmecompile.OptionError, match="does not tell"):
        fmecompile.optimize(module, memory_budget=0.5)
    with pytest.raises(fmecompile.OptionError, match="does not tell"):
        Budget.of(0.5).bytes_on(torch.device("xpu"))


def test_workspaces() -> None:
    assert workspace_bytes(torch.device("cpu"), is_real=True) == 0
    assert workspace_bytes(torch.device("cuda"), is_real=False) == ASSUMED_WORKSPACE_BYTES


def test_an_infeasible_call_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), batch()
    fmecompile.optimize(module, memory_budget=weight_bytes(module) + 2 * x.nbytes)
    with pytest.raises(fmecompile.BudgetInfeasible) as first:
        module(x)
    monkeypatch.setattr(budgeted, "compile_module", lambda *_, **__: pytest.fail("searched again"))
    with pytest.raises(fmecompile.BudgetInfeasible) as second:
        module(x)
    assert str(first.value) == str(second.value)
    assert first.value.floor_bytes == second.value.floor_bytes


def test_torch_compile_takes_a_budget() -> None:
    module, x = block(), batch()
    want = module(x)
    rest, floor = weight_bytes(module) + x.nbytes, fmecompile.plan(module, x).floor_bytes
    try:
        for budget, fits in ((rest + 2 * floor, True), (rest + floor // 2, False)):
            torch._dynamo.reset()
            compiled = torch.compile(module, backend="fmecompile", options={"memory_budget": budget})
            if fits:
                assert relative(compiled(x), want) < 1e-5
            else:
                with pytest.raises(fmecompile.BudgetInfeasible):
                    compiled(x)
    finally:
        torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------------- pipelines


def test_the_other_components_count() -> None:
    pipe = pipelines.animatediff()
    want = frames(pipe)
    fmecompile.optimize(pipe, memory_budget="64MiB", strict=True)
    assert relative(frames(pipe), want) < 1e-4
    unet, decoder = only_record(pipe.unet).allowance, only_record(pipe.vae.decoder).allowance
    assert unet.weight_bytes == weight_bytes(pipe.unet)
    others = {
        name: weight_bytes(getattr(pipe, name)) for name in ("vae", "text_encoder", "image_encoder", "motion_adapter")
    }
    assert dict(unet.residents) == others
    rest = {"unet": unet.weight_bytes, "vae": others["vae"] - weight_bytes(pipe.vae.decoder)}
    assert dict(decoder.residents) == others | rest
    assert "text_encoder" in str(fmecompile.explain(pipe))


def test_a_pipeline_that_does_not_fit_is_told_what_to_do() -> None:
    pipe = pipelines.animatediff()
    total = sum(weight_bytes(c) for c in pipe.components.values() if isinstance(c, nn.Module))
    fmecompile.optimize(pipe, memory_budget=total)
    with pytest.raises(fmecompile.BudgetInfeasible, match="enable_model_cpu_offload") as caught:
        frames(pipe)
    for name in ("UNetMotionModel", "image_encoder", "text_encoder", "vae"):
        assert name in str(caught.value)
    assert caught.value.floor_bytes > total
    pipe.image_encoder = None
    assert torch.isfinite(frames(pipe)).all()


def test_a_vae_counts_its_other_half() -> None:
    vae = fmecompile.optimize(pipelines.vae(), memory_budget="64MiB", strict=True)
    vae.decode(torch.zeros(1, 4, 8, 8))
    allowance = only_record(vae.decoder).allowance
    assert sum(size for _, size in allowance.residents) + allowance.weight_bytes == weight_bytes(vae)


def test_what_lies_elsewhere_does_not_count() -> None:
    """As an offload leaves it: only what is on the device of the running component."""
    pipe = pipelines.animatediff()
    budget = Budget.of("1GiB", pipe)
    here = budget.situation()
    pipe.image_encoder.to("meta")
    assert budget.situation() != here  # a plan of before is not taken
    residents = dict(budget.allowance(pipe.unet, (torch.zeros(1),)).residents)
    assert "image_encoder" not in residents and "text_encoder" in residents


def test_weights_count_in_the_precision_of_the_call() -> None:
    """Stable Video Diffusion encodes in float32 with a VAE that is kept in half precision."""
    vae = fmecompile.optimize(pipelines.vae().half(), memory_budget="1GiB", strict=True)
    vae.float().encode(torch.zeros(1, 3, 16, 16))
    wide = only_record(vae.encoder).allowance
    vae.half().encode(torch.zeros(1, 3, 16, 16).half())
    assert only_record(vae.encoder).allowance.taken_bytes * 2 == wide.taken_bytes


def test_shared_weights_count_once() -> None:
    pipe = pipelines.animatediff()
    pipe.text_encoder.shared = pipe.unet.conv_in
    budget = Budget.of("1GiB", pipe)
    residents = dict(budget.allowance(pipe.unet, (torch.zeros(1),)).residents)
    assert residents["text_encoder"] == weight_bytes(pipe.text_encoder) - weight_bytes(pipe.unet.conv_in)


def test_a_copied_pipeline_counts_its_own_components() -> None:
    pipe = fmecompile.optimize(pipelines.animatediff(), memory_budget="1GiB")
    twin = copy.deepcopy(pipe)
    for budget in (twin.unet.forward._compiler.eager.budget, twin.vae.decoder.forward._compiler.budget):
        assert budget.whole() is twin
        assert budget.amount == 2**30


def test_the_whole_clip_gives_way_to_the_budget() -> None:
    """The decoder takes the caller's chunk size where the whole clip does not fit."""
    pipe = pipelines.svd()
    latents = torch.randn(1, 8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    want = pipe.decode_latents(latents, 8, 2)
    rest = Budget.of("1GiB", pipe).allowance(pipe.vae.decoder, (latents[0],)).taken_bytes

    def least(n: int) -> int:
        with torch.no_grad(), pytest.raises(fmecompile.BudgetInfeasible) as refused:
            compile_module(pipe.vae.decoder, (latents[0, :n], torch.zeros(1, n), n), {}, limits=Limits(1))
        return refused.value.floor_bytes

    small, whole = least(2), least(8)
    assert small < whole
    fmecompile.optimize(pipe, memory_budget=rest + (small + whole) // 2)
    assert relative(pipe.decode_latents(latents, 8, 2), want) < 1e-4
    assert "because" in str(fmecompile.explain(pipe))
    fmecompile.optimize(pipe, memory_budget=rest + small // 2)
    with pytest.raises(fmecompile.BudgetInfeasible):
        pipe.decode_latents(latents, 8, 2)


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(fmecompile.BudgetInfeasible(2 << 30, 1 << 30, place="unet", next_step="less")))
    assert (error.floor_bytes, error.allowed_bytes, error.place, error.next_step) == (2 << 30, 1 << 30, "unet", "less")
    assert "1.000 GiB are allowed" in str(error)
