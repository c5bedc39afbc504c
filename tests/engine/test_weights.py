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
from engine.memory.manifest import Pack, PackGroup
from engine.memory.pack import ensure_pack, read_group
from engine.memory.placement import part_layer, split_groups
from engine.memory.weights import StreamedWeights
from engine.planning.cost import NUM_SLOTS
from engine.planning.policy import Split, Tier
from tests.support.policies import split_layer
from tests.support.tiny_models import NUM_LAYERS, write_tiny_model

CPU: Final = torch.device("cpu")
PATIENCE_S: Final = 10.0


class Tiny:
    """A tiny model's pack, and one skeleton that its weights can be bound to."""

    def __init__(self, folder: Path, name: str, dtype: torch.dtype) -> None:
        checkpoint = open_checkpoint(write_tiny_model(folder / "source", name, dtype=dtype))
        self.model: Any = build_skeleton(checkpoint.config, attention=ATTENTION_NAME)
        self.pack = ensure_pack(checkpoint, self.model, spill_dir=folder, disk_bytes=10**9)

    def splits(self, resident: Sequence[float]) -> list[Split]:
        """One fraction a layer."""
        layers, _ = split_groups(self.pack.groups)
        return [
            split_layer(tensor_bytes(group), Tier.CPU, resident=fraction)
            for group, fraction in zip(layers, resident, strict=True)
        ]

    def stream(self, resident: Sequence[float]) -> StreamedWeights:
        return StreamedWeights(
            self.pack, self.model, splits=self.splits(resident), compute=Tier.CPU, device=CPU
        )

    def require_layer(self, layer: int) -> None:
        require_values(self.pack, f"layers.{layer}", self.model)


def tensor_bytes(group: PackGroup) -> tuple[int, ...]:
    return tuple(tensor.num_bytes for tensor in group.tensors)


def require_values(pack: Pack, group: str, model: Any) -> None:
    for name, value in read_group(pack, group).items():
        found = model.get_parameter(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, value.float()), name


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


@pytest.mark.parametrize("compute", [Tier.CPU, Tier.GPU])
def test_a_layer_is_cut_where_its_split_says_in_the_packs_order(tiny: Tiny, compute: Tier) -> None:
    group = split_groups(tiny.pack.groups)[0][1]
    sizes = tensor_bytes(group)
    first, second = sum(sizes[:2]), sum(sizes[2:5])
    if compute is Tier.GPU:
        split = Split(gpu_bytes=first, cpu_bytes=second, disk_bytes=sum(sizes[5:]))
    else:
        split = Split(gpu_bytes=0, cpu_bytes=first, disk_bytes=sum(sizes[2:]))
    parts = part_layer(group, split, compute)
    assert parts.resident == group.tensors[:2]
    assert parts.hosted == (group.tensors[2:5] if compute is Tier.GPU else ())
    assert parts.streamed == group.tensors[2:]


@pytest.mark.parametrize("excess_bytes", [-1, 1])
def test_a_border_inside_a_tensor_is_refused_with_the_bytes(tiny: Tiny, excess_bytes: int) -> None:
    group = split_groups(tiny.pack.groups)[0][2]
    sizes = tensor_bytes(group)
    kept = sum(sizes[:3]) + excess_bytes
    split = Split(gpu_bytes=0, cpu_bytes=kept, disk_bytes=sum(sizes) - kept)
    with pytest.raises(EngineError, match=rf"split of layers\.2 asks for {kept:,} bytes"):
        part_layer(group, split, Tier.CPU)


def test_a_split_of_more_than_the_layer_is_refused(tiny: Tiny) -> None:
    group = split_groups(tiny.pack.groups)[0][0]
    total = sum(tensor_bytes(group))
    split = Split(gpu_bytes=0, cpu_bytes=total, disk_bytes=1)
    with pytest.raises(EngineError, match=r"nearest 0"):
        part_layer(group, split, Tier.CPU)


def test_a_split_that_forgets_part_of_the_layer_is_refused(tiny: Tiny) -> None:
    group = split_groups(tiny.pack.groups)[0][0]
    sizes = tensor_bytes(group)
    split = Split(gpu_bytes=0, cpu_bytes=sum(sizes[:2]), disk_bytes=sum(sizes[2:-1]))
    with pytest.raises(EngineError, match=r"layers\.0"):
        part_layer(group, split, Tier.CPU)


def test_weights_that_refuse_their_splits_leave_no_file_open(tiny: Tiny) -> None:
    splits = [Split(gpu_bytes=0, cpu_bytes=1, disk_bytes=0)] * NUM_LAYERS
    with pytest.raises(EngineError):
        StreamedWeights(tiny.pack, tiny.model, splits=splits, compute=Tier.CPU, device=CPU)
    links = [Path(f"/proc/self/fd/{link.name}") for link in Path("/proc/self/fd").iterdir()]
    assert tiny.pack.path.resolve() not in [link.resolve() for link in links]


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
    "half_of_each": [0.5, 0.5, 0.5, 0.5],
    "three_streamed": [0, 1, 0.3, 0],
    "two_streamed": [1, 0, 1, 0.6],
    "one_streamed": [1, 1, 0, 1],
}


@pytest.mark.parametrize("resident", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_layer_has_exactly_its_packed_values_while_it_is_held(
    tiny: Tiny, resident: list[float]
) -> None:
    weights = tiny.stream(resident)
    try:
        for group in split_groups(tiny.pack.groups)[1]:
            require_values(tiny.pack, group.name, tiny.model)
        for _sweep in range(3):
            for layer in range(NUM_LAYERS):
                weights.acquire(layer)
                tiny.require_layer(layer)
                time.sleep(0.002)  # a fetch into a slot in use would show now
                tiny.require_layer(layer)
                weights.release(layer)
    finally:
        weights.close()


def test_a_parameter_is_the_same_object_in_every_sweep(tiny: Tiny) -> None:
    weights = tiny.stream([0] * NUM_LAYERS)
    name = "model.layers.2.mlp.up_proj.weight"
    bound = tiny.model.get_parameter(name)
    for _sweep in range(2):
        for layer in range(NUM_LAYERS):
            weights.acquire(layer)
            assert tiny.model.get_parameter(name) is bound
            weights.release(layer)
    weights.close()


@pytest.mark.parametrize("resident", PLACEMENTS.values(), ids=PLACEMENTS)
def test_streamed_bytes_are_the_splits_of_each_sweep_and_of_what_was_fetched_ahead(
    tiny: Tiny, resident: list[float]
) -> None:
    num_sweeps = 3
    weights = tiny.stream(resident)
    for _sweep in range(num_sweeps):
        for layer in range(NUM_LAYERS):
            weights.acquire(layer)
            weights.release(layer)
    weights.close()
    streamed = [split.disk_bytes for split in tiny.splits(resident) if split.disk_bytes]
    ahead = [sum((streamed * NUM_SLOTS)[:count]) for count in range(NUM_SLOTS + 1)]
    fetched_ahead = weights.counters.streamed_bytes - num_sweeps * sum(streamed)
    assert fetched_ahead in ahead


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2"])
def test_tied_weights_are_one_tensor_in_both_places(tmp_path: Path, name: str) -> None:
    tied = Tiny(tmp_path, name, torch.float32)
    weights = tied.stream([0.5] * NUM_LAYERS)
    head = tied.model.get_output_embeddings().weight
    table = tied.model.get_input_embeddings().weight
    assert head.data_ptr() == table.data_ptr()
    assert not head.is_meta
    assert not [key for key, value in tied.model.named_parameters() if value.is_meta]
    weights.close()


# -- failing and ending ------------------------------------------------------------------------


def test_a_file_cut_short_while_streaming_is_an_engine_error_with_the_layer_and_the_bytes(
    own_tiny: Tiny,
) -> None:
    weights = own_tiny.stream([0] * NUM_LAYERS)
    os.truncate(own_tiny.pack.path, own_tiny.pack.group("layers.3").offset_bytes + 1)

    def sweep_until_it_fails() -> None:
        with pytest.raises(EngineError, match=r"weights of layer 3 cannot be read.*ended early"):
            visit_all(weights)
        with pytest.raises(EngineError, match="weights of layer 0 cannot be read"):
            weights.acquire(0)
        weights.close()

    finish_in_time(sweep_until_it_fails)


def visit_all(weights: StreamedWeights) -> None:
    for layer in range(NUM_LAYERS):
        weights.acquire(layer)
        weights.release(layer)


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
