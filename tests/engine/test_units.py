"""Layers streamed in several units: cut where they should be, there when asked for in any order, and
never waited for in vain.
"""

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from engine.compute.attention import ATTENTION_NAME
from engine.compute.skeleton import build_skeleton
from engine.config import Budgets
from engine.engine import Engine
from engine.errors import BudgetError, EngineError
from engine.memory.binding import Binder
from engine.memory.checkpoint import open_checkpoint
from engine.memory.kinds import EXPERTS_NAME
from engine.memory.manifest import Pack
from engine.memory.matrix import Matrix, Stack
from engine.memory.pack import ensure_pack, read_group
from engine.memory.shapes import model_shape
from engine.memory.units import Placement
from engine.memory.uses import Uses
from engine.memory.weights import StreamedWeights
from engine.planning.cost import check_budgets, held_units, slot_bytes
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from engine.planning.units import units_of
from engine.timeline import Timeline, Track
from tests.support.oracle import oracle_answer, ragged_prompts
from tests.support.policies import streaming
from tests.support.tiny_models import NUM_LAYERS, TINY_MODELS, write_tiny_model

CPU: Final = torch.device("cpu")
PATIENCE_S: Final = 20.0
UNIT_BYTES: Final = 5000
"""Some rows of a tiny model's matrices; a tiny layer is many units of it."""


@dataclasses.dataclass
class Tiny:
    pack: Pack
    shape: ModelShape
    make: Callable[[], Any]
    values: list[dict[str, torch.Tensor]]
    """Of each layer, as packed."""

    def policy(self, resident: float, **changes: Any) -> Policy:
        budgets = Budgets(gpu_bytes=0, host_bytes=0, disk_bytes=0, spill_dir=Path())
        changes = {"unit_bytes": UNIT_BYTES, "num_slots": 3} | changes
        return streaming(resident, **changes)(self.shape, budgets)

    def open(self, resident: float, **changes: Any) -> tuple[StreamedWeights, Any, Timeline]:
        model, timeline = self.make(), Timeline(keep_events=True)
        weights = StreamedWeights(
            self.pack, model, self.policy(resident, **changes), device=CPU, timeline=timeline
        )
        return weights, model, timeline


def load(folder: Path, name: str) -> Tiny:
    checkpoint = open_checkpoint(write_tiny_model(folder / "source", name))

    def make() -> Any:
        return build_skeleton(checkpoint.config, attention=ATTENTION_NAME, experts=EXPERTS_NAME)

    pack = ensure_pack(checkpoint, make(), spill_dir=folder, disk_bytes=10**9)
    shape = model_shape(pack.groups, make(), checkpoint.config, dtype=torch.float32)
    values = [read_group(pack, f"layers.{layer}") for layer in range(NUM_LAYERS)]
    return Tiny(pack, shape, make, values)


@pytest.fixture(scope="module", params=["llama", "mixtral", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(autouse=True)
def all_threads_end() -> Iterator[None]:
    def ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("freight")}

    before = ours()
    yield
    assert ours() <= before


def finish_in_time(work: Callable[[], object]) -> None:
    """For work that must not hang: it is left behind when it does, and what it raises is raised."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # raised below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"
    if failures:
        raise failures[0]


def weights_in(model: Any, layer: int) -> list[tuple[Any, str, Matrix | Stack]]:
    """Module, full name and weight, in the order of definition."""
    prefix = next(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == NUM_LAYERS
    )
    return [
        (module, f"{name}.{attribute}", value)
        for name, module in model.named_modules()
        if name.startswith(f"{prefix}.{layer}.")
        for attribute, value in vars(module).items()
        if isinstance(value, Matrix | Stack)
    ]


def use(tiny: Tiny, layer: int, module: Any, names: Sequence[tuple[str, Matrix | Stack]]) -> None:
    """A call of the module: stacks expert by expert, matrices slice by slice; values compared."""
    expected = tiny.values[layer]
    stacks = [(name, value) for name, value in names if isinstance(value, Stack)]
    for name, value in names:
        if isinstance(value, Matrix):
            for part in value.slices:
                assert torch.equal(part.stored, expected[name][part.first : part.last]), name
    for expert in range(stacks[0][1].shape[0] if stacks else 0):
        for name, value in stacks:
            assert torch.equal(value[expert], expected[name][expert]), name
    for hook in module._forward_hooks.values():
        hook(module, (), None)


Order = Callable[[list[Any]], list[Any]]
ORDERS: Final[dict[str, Order]] = {
    "as defined": lambda modules: modules,
    "backwards": lambda modules: modules[::-1],
    "inside out": lambda modules: modules[1::2] + modules[::2],
    "one twice": lambda modules: [*modules, modules[0]],
    "one left out": lambda modules: modules[1:],
    "none": lambda modules: [],
}


def sweep(
    tiny: Tiny, weights: StreamedWeights, model: Any, order: Order, *, num_forwards: int = 1
) -> None:
    for layer in range(NUM_LAYERS):
        weights.acquire(layer, num_forwards=num_forwards)
        for _forward in range(num_forwards):
            held = weights_in(model, layer)
            by_module = [
                (module, [(name, value) for _, name, value in group])
                for module, group in itertools.groupby(held, key=lambda each: each[0])
            ]
            for module, names in order(by_module):
                use(tiny, layer, module, names)
        weights.release(layer)
    for stage in weights.head_stages:
        weights.acquire(stage)
        weights.release(stage)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("num_forwards", "overlap"), [(1, True), (3, True), (1, False)])
def test_whatever_the_order_each_slice_has_its_values_and_nothing_hangs(
    tiny: Tiny, order: Order, num_forwards: int, *, overlap: bool
) -> None:
    weights, model, _ = tiny.open(0.2, overlap=overlap)

    def run() -> None:
        for _sweep in range(2):
            sweep(tiny, weights, model, order, num_forwards=num_forwards)

    try:
        finish_in_time(run)
    finally:
        weights.close()


@pytest.mark.parametrize("order", ["as defined", "backwards", "inside out"])
def test_once_the_order_is_known_each_byte_is_read_once_a_sweep(tiny: Tiny, order: str) -> None:
    weights, model, _ = tiny.open(0.0)
    streamed = tiny.policy(0.0).streamed_bytes
    read = []
    for _sweep in range(6):
        before = weights.counters.streamed_bytes
        sweep(tiny, weights, model, ORDERS[order])
        read.append(weights.counters.streamed_bytes - before)
    weights.close()
    assert read[-1] == streamed
    if order == "as defined":
        assert read == [streamed] * len(read)
    else:
        assert read[0] > streamed, "the order was meant to be a hostile one"


def test_several_forwards_share_what_is_read_where_there_are_slots_for_the_layer(
    tiny: Tiny,
) -> None:
    num_slots = 100
    weights, model, _ = tiny.open(0.0, num_slots=num_slots)
    assert max(len(stage.units) for stage in weights._stages) < num_slots
    for _sweep in range(2):
        sweep(tiny, weights, model, ORDERS["as defined"], num_forwards=3)
    weights.close()
    assert weights.counters.streamed_bytes == 2 * tiny.policy(0.0).streamed_bytes


@pytest.mark.parametrize("resident", [0.0, 0.37])
@pytest.mark.parametrize("unit_bytes", [1, 700, 5000, 10**9])
def test_no_unit_is_larger_than_the_plan_has_it_and_few_are_needed(
    tiny: Tiny, resident: float, unit_bytes: int
) -> None:
    policy = tiny.policy(resident, head=0.0, unit_bytes=unit_bytes)
    weights, _, _ = tiny.open(resident, head=0.0, unit_bytes=unit_bytes)
    units = weights._units
    weights.close()
    assert max(unit.streamed.buffer_bytes for unit in units) <= slot_bytes(tiny.shape, policy)
    assert sum(unit.streamed.stored_bytes for unit in units) == policy.streamed_bytes
    if unit_bytes == 10**9:
        names = [stage.name for stage in weights._stages if stage.name.startswith("layers")]
        assert len(units) == len(names) + 1  # and the head


def test_a_unit_goes_as_soon_as_its_module_is_through_and_the_next_is_read_behind_it(
    tiny: Tiny,
) -> None:
    weights, model, timeline = tiny.open(0.0)
    weights.acquire(0, num_forwards=1)
    num_units = len(weights._stages[0].units)
    module, group = next(itertools.groupby(weights_in(model, 0), key=lambda each: each[0]))
    use(tiny, 0, module, [(name, value) for _, name, value in group])
    held = {slot.unit for slot in weights._held}
    assert 0 not in held
    weights.close()
    assert len(held) <= 2 < num_units
    assert timeline.totals()[Track.WAIT].num_spans >= 1


def test_a_file_cut_short_within_a_layer_is_an_error_where_the_unit_is_asked_for(
    tmp_path: Path,
) -> None:
    tiny = load(tmp_path, "llama")
    weights, model, _ = tiny.open(0.0)
    group = tiny.pack.group("layers.2")
    os.truncate(tiny.pack.path, group.offset_bytes + group.num_bytes // 2)

    def run() -> None:
        with pytest.raises(EngineError, match=r"weights of layers\.2 cannot be read.*ended early"):
            sweep(tiny, weights, model, ORDERS["as defined"])
        weights.rewind()
        with pytest.raises(EngineError, match=r"weights of layers\.0 cannot be read"):
            weights.acquire(0)
        weights.close()

    finish_in_time(run)


@pytest.mark.parametrize("num_modules", [0, 1, 4])
def test_after_a_layer_that_broke_off_the_next_sweep_finds_the_first(
    tiny: Tiny, num_modules: int
) -> None:
    weights, model, _ = tiny.open(0.2)

    def run() -> None:
        weights.acquire(0)
        weights.release(0)
        weights.acquire(1)
        held = itertools.groupby(weights_in(model, 1), key=lambda each: each[0])
        for module, group in itertools.islice(held, num_modules):
            use(tiny, 1, module, [(name, value) for _, name, value in group])
        weights.rewind()
        sweep(tiny, weights, model, ORDERS["as defined"])

    finish_in_time(run)
    weights.close()


@pytest.mark.parametrize(("resident", "hosted"), [(0.0, 0.0), (0.37, 0.0), (0.2, 0.33)])
@pytest.mark.parametrize("unit_bytes", [300, 700, 5000, 20_000, 10**9])
def test_a_plan_knows_in_how_many_units_each_layer_comes(
    tiny: Tiny, resident: float, hosted: float, unit_bytes: int
) -> None:
    budgets = Budgets(gpu_bytes=1 if hosted else 0, host_bytes=0, disk_bytes=0, spill_dir=Path())
    policy = streaming(resident, hosted=hosted, unit_bytes=unit_bytes, num_slots=3)(
        tiny.shape, budgets
    )
    placement = Placement(tiny.pack, Binder(tiny.make(), CPU), policy, CPU)
    pairs = zip(tiny.shape.layers, policy.layer_splits, strict=True)
    told = [units_of(tensors, split, policy) for tensors, split in pairs]
    for stage, units in zip(placement.stages, told, strict=False):
        found = [placement.units[index] for index in stage.units]
        assert len(found) == units.count
        assert sum(1 for unit in found if unit.on_disk.pieces) == units.on_disk


def test_several_micro_batches_take_slots_for_all_of_a_layers_units(tiny: Tiny) -> None:
    """With one fewer, what no slot holds is read again by each of them: such a plan is refused."""
    budgets = Budgets(gpu_bytes=0, host_bytes=10**12, disk_bytes=10**12, spill_dir=Path())
    most = held_units(tiny.shape, tiny.policy(0.0))
    assert most > 3
    for num_slots, is_enough in ((most + 1, True), (most, False)):
        weights, model, _ = tiny.open(0.0, num_slots=num_slots)
        for _sweep in range(3):
            sweep(tiny, weights, model, ORDERS["as defined"], num_forwards=3)
        weights.close()
        once_bytes = 3 * tiny.policy(0.0).streamed_bytes
        assert (weights.counters.streamed_bytes == once_bytes) == is_enough
        several = tiny.policy(0.0, num_slots=num_slots, micro_batch_tokens=71)
        if is_enough:
            check_budgets(tiny.shape, several, budgets)
            continue
        needed = rf"{most} units of at most 5,000 bytes.* {most + 1} slots.* the policy has {most}"
        with pytest.raises(BudgetError, match=needed):
            check_budgets(tiny.shape, several, budgets)
        one = dataclasses.replace(several, micro_batch_tokens=72, num_slots=3)
        check_budgets(tiny.shape, one, budgets)
        on_disk = dataclasses.replace(one.kv, disk_bytes=one.kv.cpu_bytes)
        with pytest.raises(BudgetError, match="rows of one tier"):
            check_budgets(tiny.shape, dataclasses.replace(one, kv=on_disk), budgets)


def test_an_engine_refuses_too_few_slots_before_anything_is_packed(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "mixtral")
    spill_dir = tmp_path / "spill"
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=spill_dir)
    policy = streaming(0.0, unit_bytes=UNIT_BYTES, num_slots=3)
    with pytest.raises(BudgetError, match="held while several micro-batches pass"):
        Engine.load(folder, budgets=budgets, policy=policy)
    assert not [path for path in spill_dir.rglob("*") if path.is_file()]


def test_layers_in_several_units_need_a_slot_to_spare() -> None:
    with pytest.raises(BudgetError, match="num_slots is at least 3, not 2"):
        streaming(0.0, unit_bytes=4096, num_slots=2)(_no_shape(), _no_budgets())


def _no_shape() -> Any:
    return ModelShape(
        layers=(),
        fixed_bytes=0,
        embedding=None,
        head=None,
        tied=False,
        scales_logits=False,
        compute_dtype="float32",
        compute_itemsize=4,
        kv_bytes_per_token=1,
        hidden_size=1,
        intermediate_size=1,
        vocab_size=1,
        max_context_tokens=1,
    )


def _no_budgets() -> Budgets:
    return Budgets(gpu_bytes=0, host_bytes=0, disk_bytes=0, spill_dir=Path())


# -- whole models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TINY_MODELS))
def test_greedy_tokens_equal_generate_and_every_byte_is_read_once_a_sweep(
    tmp_path: Path, name: str
) -> None:
    """Of every type, in its own order, in one micro-batch."""
    torch.set_num_threads(1)
    folder = write_tiny_model(tmp_path / "model", name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=tmp_path)
    policy = streaming(0.2, head=0.3, micro_batch_tokens=100, unit_bytes=UNIT_BYTES, num_slots=4)
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        found = {done.key: done.token_ids for done in engine.generate(ragged_prompts())}
        report = engine.report()
    for prompt in ragged_prompts():
        assert found[prompt.key] == oracle_answer(model, prompt)[0], prompt.key
    streamed_bytes = report.num_sweeps * engine.policy.streamed_bytes
    assert report.weights_streamed_bytes <= 1.1 * streamed_bytes
    assert report.compute_s + report.totals[Track.WAIT].covered_s <= report.sweep_s


# -- uses --------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    num_forwards=st.integers(1, 3),
    draw=st.data(),
)
def test_a_unit_is_over_when_every_forward_has_used_every_slice_of_it_and_no_sooner(
    weights: list[int], num_forwards: int, draw: st.DataObject
) -> None:
    numbered = itertools.count()
    units_of = {
        f"m{index}.weight": [next(numbered) // 2 for _ in range(size)]
        for index, size in enumerate(weights)
    }
    uses = Uses(units_of)
    for _visit in range(2):
        uses.begin(num_forwards)
        left = {unit: 0 for units in units_of.values() for unit in units}
        for units in units_of.values():
            for unit in units:
                left[unit] += num_forwards
        for _ in range(num_forwards):
            for weight in draw.draw(st.permutations(list(units_of))):
                for index, unit in enumerate(units_of[weight]):
                    assert uses.ask(weight, index) == unit
                    assert not uses.is_over(unit)
                uses.end(weight)
                for unit in units_of[weight]:
                    left[unit] -= 1
                assert {unit for unit in left if uses.is_over(unit)} == {
                    unit for unit, count in left.items() if count == 0
                }
