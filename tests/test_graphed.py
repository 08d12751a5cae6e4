"""CUDA graphs, on a CPU: a recorder that remembers what was recorded, and does it again on the same memory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

import fmecompile
from fmecompile.capture.export import capture
from fmecompile.errors import BudgetInfeasible, OptionError
from fmecompile.partition.tradeoffs import Limits
from fmecompile.pipeline import Compilation, lower_within, normalise
from fmecompile.runtime.executable import Compiled, Executable, Slot
from fmecompile.runtime.graphed import FREE_CAPTURES, LEAST_REPLAYS, Graphs, never
from fmecompile.runtime.host import to_host
from tests.models import small_svd, svd_call


class Tape:
    """A recorder whose records are the calls themselves."""

    def __init__(self) -> None:
        self.records = self.drains = self.inside = 0
        self.fails: BaseException | None = None

    def takes(self, tensor: torch.Tensor) -> bool:
        return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        assert not self.inside
        self.inside += 1
        yield
        self.inside -= 1

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        assert self.inside
        if self.fails is not None:
            raise self.fails
        self.records += 1
        run()

        def replay() -> None:
            assert self.inside
            run()

        return replay

    def drain(self) -> None:
        self.drains += 1


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        y = F.silu(self.layer(x))
        return (y if shift is None else y + shift), None


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """``optimize(cuda_graphs=True)`` records on this."""
    made = Tape()
    monkeypatch.setattr(Graphs.__init__, "__defaults__", (lambda device: made,))
    return made


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Affine().double().eval().requires_grad_(False)


def rows(count: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def graphed_twin(module: nn.Module, **options: Any) -> nn.Module:
    return fmecompile.optimize(copy.deepcopy(module), cuda_graphs=True, strict=True, **options)


def test_the_second_call_records_and_later_ones_replay(module: nn.Module, tape: Tape) -> None:
    twin = graphed_twin(module)
    outputs = []
    for seed in range(5):
        outputs.append(twin(rows(seed=seed))[0])
        assert tape.records == (seed > 0)
    for seed, output in enumerate(outputs):  # each call's own: none was written over by a later one
        assert torch.equal(output, module(rows(seed=seed))[0])
    assert "CUDA graphs: 1 records, replayed 4 times" in str(fmecompile.explain(twin))
    assert twin(rows())[1] is None


def test_inputs_are_left_alone_and_may_be_anywhere(module: nn.Module, tape: Tape) -> None:
    twin, x = graphed_twin(module), rows()
    before = x.clone()
    for _ in range(4):
        assert torch.equal(twin(x.clone())[0], module(x)[0])
    assert torch.equal(x, before) and tape.records == 1


def test_two_inputs_of_one_layout_have_a_buffer_each(module: nn.Module, tape: Tape) -> None:
    twin = graphed_twin(module)
    for seed in range(4):
        x, shift = rows(seed=seed), rows(seed=10 + seed)
        torch.testing.assert_close(twin(x, shift)[0], module(x, shift)[0], rtol=1e-12, atol=1e-12)
    assert tape.records == 1


def test_weights_changed_in_place_are_seen(module: nn.Module, tape: Tape) -> None:
    twin = graphed_twin(module)
    for _ in range(3):
        twin(rows())
    for each in (module, twin):
        each.layer.weight.data.mul_(2)
    assert torch.equal(twin(rows())[0], module(rows())[0])
    assert tape.records == 1


def test_weights_moved_elsewhere_are_recorded_again(module: nn.Module, tape: Tape) -> None:
    """As offloads move them; and the old record is let go of only when nothing runs it."""
    twin = graphed_twin(module)
    for _ in range(3):
        twin(rows())
    old = twin.layer.weight.data
    twin.layer.weight.data = old.clone() * 3
    module.layer.weight.data.mul_(3)
    for _ in range(3):
        assert torch.equal(twin(rows())[0], module(rows())[0])
    assert (tape.records, tape.drains) == (2, 1)


def test_shapes_that_change_all_the_time_switch_it_off(module: nn.Module, tape: Tape) -> None:
    twin = graphed_twin(module)
    with pytest.warns(UserWarning, match="shapes or weights change too often") as caught:
        for count in range(1, FREE_CAPTURES + 4):
            for _ in range(2):  # recorded at the second, replayed once; a product of fewer rows may round differently
                torch.testing.assert_close(twin(rows(count))[0], module(rows(count))[0], rtol=1e-12, atol=1e-12)
    assert len(caught) == 1 and tape.records == FREE_CAPTURES
    assert torch.equal(twin(rows(2))[0], module(rows(2))[0])
    assert "off, because shapes or weights change too often" in str(fmecompile.explain(twin))


def test_records_that_pay_are_made_without_end() -> None:
    graphs = Graphs()
    for _ in range(10 * FREE_CAPTURES):
        assert graphs.may_capture()
        graphs.captures += 1
        graphs.replays += LEAST_REPLAYS
    assert not graphs.off


def test_a_record_that_fails_is_one_warning(module: nn.Module, tape: Tape) -> None:
    tape.fails = RuntimeError("operation not permitted when stream is capturing")
    twin = graphed_twin(module)
    with pytest.warns(UserWarning, match="recording failed: RuntimeError: operation not permitted") as caught:
        for count in (4, 5):
            for _ in range(3):
                assert torch.equal(twin(rows(count))[0], module(rows(count))[0])
    assert len(caught) == 1 and tape.records == 0


def test_an_interrupt_is_not_swallowed(module: nn.Module, tape: Tape) -> None:
    tape.fails = KeyboardInterrupt()
    twin = graphed_twin(module)
    twin(rows())
    with pytest.raises(KeyboardInterrupt):
        twin(rows())


def test_without_a_gpu_it_runs_plainly_with_one_warning(module: nn.Module) -> None:
    twin = graphed_twin(module)
    with pytest.warns(UserWarning, match="they need a CUDA device, and the module runs on cpu") as caught:
        for _ in range(3):
            assert torch.equal(twin(rows())[0], module(rows())[0])
    assert len(caught) == 1


@pytest.mark.parametrize("value", [None, False])
def test_it_is_off_unless_asked_for(module: nn.Module, tape: Tape, value: bool | None) -> None:
    twin = fmecompile.optimize(module, cuda_graphs=value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            twin(rows())
    assert tape.records == 0 and "CUDA graphs" not in str(fmecompile.explain(twin))


@pytest.mark.parametrize("value", ["yes", 1, 0.5])
def test_other_values_are_refused(module: nn.Module, value: Any) -> None:
    with pytest.raises(OptionError, match=r"cuda_graphs=.* is neither True nor False"):
        fmecompile.optimize(module, cuda_graphs=value)


def test_expanded_inputs_run_plainly(module: nn.Module, tape: Tape) -> None:
    twin, x = graphed_twin(module), rows(1).expand(4, 6)
    for _ in range(3):
        assert torch.equal(twin(x)[0], module(x)[0])
    assert tape.records == 0


def test_a_program_with_values_in_host_memory_is_never_recorded() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(to_host, (graph.placeholder("x"),)),))
    program = fx.GraphModule(nn.Module(), graph)
    assert never(program) == "values wait in host memory"
    assert Graphs(lambda _: Tape()).graphed(program, ["input"]) == program.forward


def test_a_copy_records_for_itself(module: nn.Module, tape: Tape) -> None:
    twin = graphed_twin(module)
    for _ in range(3):
        twin(rows())
    other = copy.deepcopy(twin)
    other.layer.weight.data.zero_()
    for _ in range(3):
        assert torch.equal(twin(rows())[0], module(rows())[0])
        assert torch.equal(other(rows())[0], F.silu(module.layer.bias).expand(4, 6))


# --------------------------------------------------------------------------------------- several programs, and a budget


def test_programs_that_hand_over_kept_values_are_replayed(tape: Tape) -> None:
    """A full step keeps h = 2 x and returns h + 1, a shallow one returns h + x: one buffer serves both."""

    def program(slots: tuple[Slot, ...], keeps: tuple[str, ...], body: Callable[..., Any]) -> Executable:
        graph = fx.Graph()
        graph.output(body(*(graph.placeholder(f"p{k}") for k in range(len(slots)))))
        module = fx.GraphModule(nn.Module(), graph)
        spec = tree_flatten([0])[1]
        return Executable(Compiled(module, slots, None, (), spec, keeps), nn.Module(), graphs)

    def full_step(x: fx.Node) -> tuple[fx.Node, ...]:
        h = x.graph.call_function(torch.mul, (x, 2))
        return x.graph.call_function(torch.add, (h, 1)), h

    def shallow_step(x: fx.Node, h: fx.Node) -> tuple[fx.Node, ...]:
        return (x.graph.call_function(torch.add, (h, x)),)

    graphs = Graphs()
    full = program((("input", 0),), ("h",), full_step)
    shallow = program((("input", 0), ("kept", ("h", 0))), (), shallow_step)
    for seed in range(5):
        x, y = rows(seed=seed), rows(seed=seed + 10)
        (first,), kept = full.run([x])
        (second,), _ = shallow.run([y], {("h", 0): kept["h"]})
        assert torch.equal(first, x * 2 + 1) and torch.equal(kept["h"], x * 2) and torch.equal(second, x * 2 + y)
    assert (graphs.captures, graphs.replays) == (2, 8)
    assert len(graphs._buffers) == 3, "x, and two results; what is kept comes in where a result went out"


@pytest.mark.slow
def test_the_steps_of_a_policy_are_replayed_bitwise(tape: Tape) -> None:
    """One record for each kind of step."""
    model, (sample, _, *rest) = small_svd().double(), svd_call(1, 3, 8, 8, torch.float64)
    policy = fmecompile.DeepCache(interval=2)

    def run(module: nn.Module) -> list[torch.Tensor]:
        found = []
        for _ in range(3):
            with fmecompile.generation(steps=4):
                found += [module(sample + 0.1 * k, 900 - 100 * k, *rest)[0] for k in range(4)]
        return found

    with torch.no_grad():
        twin = copy.deepcopy(model)
        want = run(fmecompile.optimize(model, reuse=policy, strict=True))
        got = run(fmecompile.optimize(twin, reuse=policy, strict=True, cuda_graphs=True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert "2 records, replayed 10 times" in str(fmecompile.explain(twin))


def test_buffers_count_in_the_plan(module: nn.Module) -> None:
    compilation = Compilation(capture(module, (rows(),), {}))
    normalise(compilation)
    _, plain = lower_within(compilation)
    _, beside = lower_within(compilation, limits=Limits(is_graphed=True))
    buffers = 3 * rows().nbytes  # one of the input, one of the output, and the caller's own
    assert beside.projected_peak_bytes == plain.projected_peak_bytes + buffers
    limit = beside.projected_peak_bytes
    _, fitting = lower_within(compilation, limits=Limits(limit, is_graphed=True))
    assert fitting.projected_peak_bytes <= fitting.allowed_bytes == limit
    with pytest.raises(BudgetInfeasible) as caught:
        lower_within(compilation, limits=Limits(buffers, is_graphed=True))
    assert caught.value.floor_bytes > caught.value.allowed_bytes == buffers


def test_programs_share_buffers_by_layout() -> None:
    graphs = Graphs()
    first = graphs.buffers([rows(2), rows(2), rows(3)])
    second = graphs.buffers([rows(3), rows(2)])
    assert first[0] is not first[1]
    assert second[0] is first[2] and second[1] is first[0]
    del first, second
    assert not graphs._buffers, "they go with the last record that uses them"
