import dataclasses
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from engine.compute.attention import ATTENTION_NAME
from engine.compute.skeleton import build_skeleton
from engine.errors import EngineError, PackError
from engine.memory.checkpoint import open_checkpoint
from engine.memory.kinds import EXPERTS_NAME, Kind
from engine.memory.layout import lay_out
from engine.memory.manifest import PackGroup
from engine.memory.matrix import Matrix, Stack
from engine.memory.pack import ensure_pack, read_group
from engine.memory.placement import Parts, Piece, part, split_groups, whole_piece
from engine.memory.shapes import model_shape
from engine.memory.weights import StreamedWeights
from engine.planning.policy import Policy, Split, Tier
from engine.timeline import Timeline, Track
from tests.support.policies import split_tensors
from tests.support.tiny_models import NUM_LAYERS, write_tiny_model

CPU: Final = torch.device("cpu")
PATIENCE_S: Final = 10.0


class Tiny:
    """A tiny model's pack, and a skeleton for each time that its weights are placed."""

    def __init__(
        self, folder: Path, name: str, dtype: torch.dtype, *, experts: str | None = None
    ) -> None:
        self.checkpoint = open_checkpoint(write_tiny_model(folder / "source", name, dtype=dtype))
        self._experts = experts
        self.model: Any = self.skeleton()
        self.pack = ensure_pack(
            self.checkpoint, self.skeleton(), spill_dir=folder, disk_bytes=10**9
        )
        self.kinds = lay_out(self.model).kinds
        self.shape = model_shape(
            self.pack.groups, self.model, self.checkpoint.config, dtype=torch.float32
        )

    def skeleton(self) -> Any:
        model = build_skeleton(self.checkpoint.config, attention=ATTENTION_NAME)
        if self._experts is not None:
            model.config._experts_implementation_internal = self._experts
        return model

    def policy(
        self,
        resident: Sequence[float],
        *,
        head: float = 1.0,
        embedding: float = 1.0,
        num_slots: int = 2,
    ) -> Policy:
        """One fraction a layer."""
        shape = self.shape
        return Policy(
            compute=Tier.CPU,
            compute_dtype="float32",
            block_rows=1,
            sweep_tokens=1,
            micro_batch_tokens=1,
            kv=Split.on(Tier.CPU, 0),
            layer_splits=tuple(
                split_tensors(tensors, Tier.CPU, resident=fraction)
                for tensors, fraction in zip(shape.layers, resident, strict=True)
            ),
            head_split=split_tensors(shape.head_tensors, Tier.CPU, resident=head),
            embedding_split=split_tensors(shape.embedding_tensors, Tier.CPU, resident=embedding)
            if shape.embedding
            else None,
            num_slots=num_slots,
            reason="",
        )

    def stream(
        self, resident: Sequence[float], *, timeline: Timeline | None = None, **options: Any
    ) -> StreamedWeights:
        """Binds a fresh skeleton."""
        self.model = self.skeleton()
        policy = self.policy(resident, **options)
        return StreamedWeights(self.pack, self.model, policy, device=CPU, timeline=timeline)

    def require(self, group: str) -> None:
        for name, value in read_group(self.pack, group).items():
            found = weight_of(self.model, name)
            if isinstance(found, Matrix | Stack):
                assert found.dtype == torch.float32
                stored = torch.cat([part.stored for part in found.slices])
                assert torch.equal(stored, value), name
            elif isinstance(found, torch.Tensor):
                assert found.dtype == torch.float32
                assert torch.equal(found, value.float()), name
            else:
                everything = torch.arange(len(value))
                assert torch.equal(torch.nn.functional.embedding(everything, found), value.float())


def weight_of(model: Any, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def pieces_of(tiny: Tiny, group: PackGroup) -> list[Piece]:
    return [
        whole_piece(group, tensor, tiny.kinds[tensor.name])
        for tensor in group.tensors
        if tiny.kinds[tensor.name] is not Kind.FIXED
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("weights"), "llama", torch.bfloat16)


@pytest.fixture
def own_tiny(tmp_path: Path) -> Tiny:
    """For tests that damage it."""
    return Tiny(tmp_path, "llama", torch.float32)


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("freight")}


@pytest.fixture(autouse=True)
def all_threads_end() -> Iterator[None]:
    before = our_threads()
    yield
    assert our_threads() <= before


def finish_in_time(work: Callable[[], object]) -> None:
    """For work that must not hang: it is left behind when it does."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"


# -- cutting layers ----------------------------------------------------------------------------


def test_what_is_always_resident_leads_each_group_of_the_pack(tiny: Tiny) -> None:
    for group in split_groups(tiny.pack.groups)[0]:
        fixed = [tiny.kinds[tensor.name] is Kind.FIXED for tensor in group.tensors]
        assert fixed == sorted(fixed, reverse=True)
        assert 0 < sum(fixed) < len(fixed)


def lay_pieces(parts: Parts) -> dict[str, list[tuple[int, int]]]:
    """By tensor, the rows of its pieces in the order of the tiers."""
    rows: dict[str, list[tuple[int, int]]] = {}
    for piece in parts.resident + parts.hosted + parts.on_disk:
        rows.setdefault(piece.tensor.name, []).append((piece.first, piece.last))
    return rows


@pytest.mark.parametrize("compute", [Tier.CPU, Tier.GPU])
def test_a_layer_is_cut_at_the_rows_where_its_split_says(tiny: Tiny, compute: Tier) -> None:
    pieces = pieces_of(tiny, split_groups(tiny.pack.groups)[0][1])
    assert pieces[0].last >= 40
    total = sum(piece.num_bytes for piece in pieces)
    first = 17 * pieces[0].row_bytes
    second = 23 * pieces[0].row_bytes if compute is Tier.GPU else 0
    split = Split(
        gpu_bytes=first if compute is Tier.GPU else 0,
        cpu_bytes=second if compute is Tier.GPU else first,
        disk_bytes=total - first - second,
    )
    parts = part(pieces, split, compute)
    cuts = [0, 17, 40, pieces[0].last] if compute is Tier.GPU else [0, 17, pieces[0].last]
    if pieces[0].last == 40:
        cuts.pop()
    rows = lay_pieces(parts)
    assert rows[pieces[0].tensor.name] == list(itertools.pairwise(cuts))
    assert all(rows[piece.tensor.name] == [(0, piece.last)] for piece in pieces[1:])
    assert sum(piece.num_bytes for piece in parts.on_disk) == split.disk_bytes


@pytest.mark.parametrize("excess_bytes", [-1, 1])
def test_a_border_inside_a_row_is_refused_with_the_bytes(tiny: Tiny, excess_bytes: int) -> None:
    pieces = pieces_of(tiny, split_groups(tiny.pack.groups)[0][2])
    total = sum(piece.num_bytes for piece in pieces)
    kept = pieces[0].num_bytes + pieces[1].row_bytes * 5 + excess_bytes
    split = Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=total - kept)
    within = pieces[1].row_bytes * 5 + excess_bytes
    name = pieces[1].tensor.name
    with pytest.raises(
        EngineError,
        match=rf"split of layers\.2 has a border at byte {within:,} of {name}, whose rows are "
        rf"{pieces[1].row_bytes:,} bytes: the nearest border is at [\d,]+",
    ):
        part(pieces, split, Tier.CPU)


@pytest.mark.parametrize("excess_bytes", [-64, 64])
def test_a_split_of_another_size_than_the_layer_is_refused(tiny: Tiny, excess_bytes: int) -> None:
    pieces = pieces_of(tiny, split_groups(tiny.pack.groups)[0][0])
    total = sum(piece.num_bytes for piece in pieces)
    split = Split(gpu_bytes=0, cpu_bytes=total, disk_bytes=excess_bytes)
    with pytest.raises(EngineError, match=rf"places {total + excess_bytes:,} bytes .* {total:,} "):
        part(pieces, split, Tier.CPU)


def test_weights_that_refuse_their_splits_leave_no_file_open(tiny: Tiny) -> None:
    policy = tiny.policy([1] * NUM_LAYERS)
    wrong = Split(gpu_bytes=0, cpu_bytes=1, disk_bytes=0)
    with pytest.raises(EngineError):
        StreamedWeights(
            tiny.pack,
            tiny.skeleton(),
            dataclasses.replace(policy, layer_splits=(wrong,) * NUM_LAYERS),
            device=CPU,
        )
    links = [Path(f"/proc/self/fd/{link.name}") for link in Path("/proc/self/fd").iterdir()]
    assert tiny.pack.path.resolve() not in [link.resolve() for link in links]


def test_a_split_of_an_embedding_that_is_the_heads_is_refused(tmp_path: Path) -> None:
    tied = Tiny(tmp_path, "gemma2", torch.float32)
    policy = tied.policy([1] * NUM_LAYERS)
    policy = dataclasses.replace(policy, embedding_split=policy.head_split)
    with pytest.raises(EngineError, match="splits the embedding, and this model has none"):
        StreamedWeights(tied.pack, tied.skeleton(), policy, device=CPU)


def test_a_file_cut_short_before_loading_is_a_pack_error_and_leaves_no_thread(
    own_tiny: Tiny,
) -> None:
    os.truncate(own_tiny.pack.path, 4096)
    with pytest.raises(PackError, match=r"cannot be loaded: .* ended early"):
        own_tiny.stream([0] * NUM_LAYERS)


# -- streaming ---------------------------------------------------------------------------------

PLACEMENTS: Final[dict[str, list[float]]] = {
    "all_resident": [1, 1, 1, 1],
    "all_streamed": [0, 0, 0, 0],
    "row_cut": [0.37, 0.37, 0.37, 0.37],
    "three_streamed": [0, 1, 0.3, 0],
    "two_streamed": [1, 0, 1, 0.6],
    "one_streamed": [1, 1, 0, 1],
}
HEADS: Final = {"resident": (1.0, 1.0), "row_cut": (0.4, 0.3), "streamed": (0.0, 0.0)}


def visit_all(weights: StreamedWeights) -> None:
    for unit in range(weights.head_stages.stop):
        weights.acquire(unit)
        weights.release(unit)


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("resident", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_layer_has_exactly_its_packed_values_while_it_is_held(
    tiny: Tiny, resident: list[float], num_slots: int
) -> None:
    weights = tiny.stream(resident, num_slots=num_slots)
    try:
        for group in split_groups(tiny.pack.groups)[1]:
            tiny.require(group.name)
        for _sweep in range(3):
            for layer in range(NUM_LAYERS):
                weights.acquire(layer)
                tiny.require(f"layers.{layer}")
                time.sleep(0.002)  # a fetch into a slot in use would show now
                tiny.require(f"layers.{layer}")
                weights.release(layer)
    finally:
        weights.close()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("placement", HEADS)
def test_head_and_embedding_are_all_there_wherever_their_rows_lie(
    tmp_path: Path, name: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.memory.units.HEAD_TILE_BYTES", 4096)  # some tiles, not one
    tiny = Tiny(tmp_path, name, torch.bfloat16)
    head, embedding = HEADS[placement]
    weights = tiny.stream([1] * NUM_LAYERS, head=head, embedding=embedding)
    module, table = tiny.model.get_output_embeddings(), tiny.model.get_input_embeddings()
    tied = tiny.shape.tied
    expected = read_group(tiny.pack, "embed" if tied else "head")
    [matrix] = [value for value in expected.values() if value.shape == (256, 64)]
    for _sweep in range(2):
        for layer in range(NUM_LAYERS):
            weights.acquire(layer)
            weights.release(layer)
        streamed = 0
        for unit in weights.head_stages:
            weights.acquire(unit)
            for part_ in weights.slices_of(unit):
                assert torch.equal(part_.stored, matrix[part_.first : part_.last])
                streamed += part_.last - part_.first
            weights.release(unit)
        assert streamed == 256 - int(head * 256) // 16 * 16
        assert (len(weights.head_stages) > 1) == (head < 1)
    assert module.weight.shape == (256, 64)
    ids = torch.tensor([[3, 255, 3, 0, 77]])
    tables = read_group(tiny.pack, "embed")
    [values] = [value for value in tables.values() if value.shape == (256, 64)]
    found = torch.nn.functional.embedding(ids, table.weight)
    assert torch.equal(found, values[ids].float())
    weights.close()


def test_no_parameter_is_left_without_bytes(tmp_path: Path) -> None:
    for name in ("opt", "gpt2", "mixtral"):
        tiny = Tiny(tmp_path / name, name, torch.float32)
        weights = tiny.stream([0.5] * NUM_LAYERS)
        assert not [key for key, value in tiny.model.named_parameters() if value.is_meta]
        weights.close()


def test_any_slot_serves_any_layer(tiny: Tiny) -> None:
    """With an odd number of layers streamed the first does not wait for the last one's slot."""
    weights = tiny.stream([0, 0, 0, 1])
    first = weight_of(tiny.model, "model.layers.0.mlp.up_proj.weight")
    places = set()
    for _sweep in range(4):
        for layer in range(NUM_LAYERS):
            weights.acquire(layer)
            if layer == 0:
                places.add(first.slices[-1].stored.data_ptr())
            weights.release(layer)
    weights.close()
    assert len(places) == 2


@pytest.mark.parametrize("resident", PLACEMENTS.values(), ids=PLACEMENTS)
def test_streamed_bytes_are_the_policys_in_each_sweep_exactly(
    tiny: Tiny, resident: list[float]
) -> None:
    timeline = Timeline(keep_events=True)
    num_sweeps = 3
    weights = tiny.stream(resident, head=0.5, timeline=timeline)
    for _sweep in range(num_sweeps):
        visit_all(weights)
    weights.close()
    policy = tiny.policy(resident, head=0.5)
    assert weights.counters.streamed_bytes == num_sweeps * policy.streamed_bytes
    # Read beyond that: what lies ready in the slots, and nothing else.
    streamed = [split.disk_bytes for split in policy.layer_splits if split.disk_bytes]
    ahead_bytes = timeline.totals()[Track.DISK_READ].num_bytes - num_sweeps * policy.streamed_bytes
    assert 0 <= ahead_bytes <= sum((streamed * 2)[:2]) + 32768
    num_units = len(streamed) + len(weights.head_stages)
    assert timeline.totals()[Track.WAIT].num_spans == num_sweeps * num_units


def test_a_stack_is_cut_between_experts_and_gives_each_as_it_is_stored(tmp_path: Path) -> None:
    tiny = Tiny(tmp_path, "mixtral", torch.bfloat16, experts=EXPERTS_NAME)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert tiny.kinds[name] is Kind.STACK
    weights = tiny.stream([0.5] * NUM_LAYERS)
    stack = weight_of(tiny.model, name)
    assert isinstance(stack, Stack)
    expected = read_group(tiny.pack, "layers.1")[name]
    assert stack.shape == expected.shape
    assert len(stack.slices) == 2, "half of a layer is meant to end inside this stack"
    weights.acquire(0)
    weights.release(0)
    weights.acquire(1)
    for expert, matrix in enumerate(expected):
        assert torch.equal(stack[expert], matrix)
    with pytest.raises(IndexError, match="expert 4 of a stack of 4"):
        stack[4]
    weights.release(1)
    weights.close()


def test_a_slice_that_is_not_there_is_not_computed_with(tiny: Tiny) -> None:
    weights = tiny.stream([0] * NUM_LAYERS)
    matrix = weight_of(tiny.model, "model.layers.0.mlp.up_proj.weight")
    weights.acquire(0)
    assert matrix.slices[0].stored.shape == matrix.shape
    weights.release(0)
    with pytest.raises(AssertionError, match="between acquire and release"):
        _ = matrix.slices[0].stored
    weights.close()


# -- failing and ending ------------------------------------------------------------------------


def test_a_file_cut_short_while_streaming_is_an_engine_error_with_the_layer_and_the_bytes(
    own_tiny: Tiny,
) -> None:
    weights = own_tiny.stream([0] * NUM_LAYERS)
    os.truncate(own_tiny.pack.path, own_tiny.pack.group("layers.3").offset_bytes + 1)

    def sweep_until_it_fails() -> None:
        with pytest.raises(EngineError, match=r"weights of layers\.3 cannot be read.*ended early"):
            visit_all(weights)
        with pytest.raises(EngineError, match=r"weights of layers\.0 cannot be read"):
            weights.acquire(0)
        weights.close()

    finish_in_time(sweep_until_it_fails)


@pytest.mark.parametrize("num_visited", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("holding", [False, True])
def test_closing_ends_at_once_wherever_the_sweep_stands(
    tiny: Tiny, num_visited: int, *, holding: bool
) -> None:
    weights = tiny.stream([0] * NUM_LAYERS)
    for visit in range(num_visited):
        weights.acquire(visit % NUM_LAYERS)
        weights.release(visit % NUM_LAYERS)
    if holding:
        weights.acquire(num_visited % NUM_LAYERS)
    finish_in_time(weights.close)


def test_closing_twice_is_closing_once(tiny: Tiny) -> None:
    weights = tiny.stream([0.5] * NUM_LAYERS)
    weights.close()
    weights.close()


def test_a_layer_asked_for_after_closing_is_refused_and_not_waited_for(tiny: Tiny) -> None:
    weights = tiny.stream([0] * NUM_LAYERS)
    visit_all(weights)
    weights.close()

    def ask() -> None:
        with pytest.raises(EngineError, match="closed"):
            visit_all(weights)

    finish_in_time(ask)


@pytest.mark.parametrize("resident", [0.0, 0.37])
def test_a_byte_changed_in_any_part_of_a_cut_tensor_is_noticed_when_it_is_first_read(
    own_tiny: Tiny, resident: float
) -> None:
    group = own_tiny.pack.group("layers.2")
    damaged = bytearray(own_tiny.pack.path.read_bytes())
    damaged[group.offset_bytes + group.tensors[-1].offset_bytes + 5] ^= 1
    own_tiny.pack.path.write_bytes(damaged)
    weights = own_tiny.stream([resident] * NUM_LAYERS)
    with pytest.raises(EngineError, match=r"weights of layers\.2 cannot be read: .* is damaged"):
        visit_all(weights)
    weights.close()


def test_a_byte_changed_in_a_resident_part_is_noticed_with_the_rest_of_its_tensor(
    own_tiny: Tiny,
) -> None:
    policy = own_tiny.policy([0.37] * NUM_LAYERS)
    resident = policy.layer_splits[1].cpu_bytes
    pieces = pieces_of(own_tiny, own_tiny.pack.group("layers.1"))
    parts = part(pieces, policy.layer_splits[1], Tier.CPU)
    cut = parts.resident[-1]
    assert not cut.is_last, f"{resident} bytes are meant to end inside a tensor"
    damaged = bytearray(own_tiny.pack.path.read_bytes())
    damaged[cut.offset_bytes] ^= 1
    own_tiny.pack.path.write_bytes(damaged)
    weights = own_tiny.stream([0.37] * NUM_LAYERS)
    with pytest.raises(EngineError, match=rf"layers\.1 .* is damaged: {cut.tensor.name}"):
        visit_all(weights)
    weights.close()


def test_after_a_sweep_that_broke_off_the_next_finds_the_first_layer(tiny: Tiny) -> None:
    weights = tiny.stream([0.37] * NUM_LAYERS, head=0.5)
    for layer in range(2):
        weights.acquire(layer)
        weights.release(layer)
    weights.acquire(2)
    weights.rewind()
    weights.acquire(0)
    tiny.require("layers.0")
    weights.release(0)
    weights.close()
