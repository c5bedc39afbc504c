"""Sweeps of few tokens fetch of streamed stacks only the experts that were chosen, and count so."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.errors import EngineError
from engine.memory.checksums import CHUNK_BYTES
from engine.memory.chosen import ChosenExperts
from engine.memory.manifest import open_pack
from engine.memory.matrix import Stack
from engine.memory.weights import StreamedWeights
from engine.planning.routing import expected_experts, fetches_chosen
from tests.support.model_check import write_model
from tests.support.oracle import oracle_answer
from tests.support.policies import streaming
from tests.support.shrunk_models import VOCAB_SIZE, causal_types, shrink

NUM_EXPERTS: Final = 16
NUM_SLOTS: Final = 2

Tiny = tuple[Path, dict[str, tuple[int, ...]]]

# A token is sent to two experts of sixteen; in the last two types to one that all share as well.
TYPES: Final[Mapping[str, dict[str, Any]]] = {
    "mixtral": {"num_local_experts": NUM_EXPERTS},
    "qwen2_moe": {"num_experts": NUM_EXPERTS},
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS, "n_group": 1, "topk_group": 1},
}


def test_expected_experts_are_those_of_independent_choices() -> None:
    assert expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(8, 2, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert expected_experts(8, 2, 10**6) == pytest.approx(8)
    assert expected_experts(4, 6, 1) == 4
    assert fetches_chosen(64, 8, 4)
    assert not fetches_chosen(64, 8, 64)


def prompts() -> list[Prompt]:
    """Together many tokens, then a tail of one row."""
    draw = torch.Generator().manual_seed(5)
    return [
        Prompt(
            key=str(index),
            token_ids=tuple(torch.randint(2, VOCAB_SIZE, (length,), generator=draw).tolist()),
            sampling=Sampling(max_tokens=limit, ignore_eos=True),
        )
        for index, (length, limit) in enumerate(((25, 4), (9, 16), (1, 2)))
    ]


@pytest.fixture(scope="module", params=list(TYPES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A checkpoint of each type, and the oracle's answers."""
    torch.set_num_threads(1)
    config = shrink(causal_types()[request.param], num_hidden_layers=4, **TYPES[request.param])
    folder = write_model(config, tmp_path_factory.mktemp("model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return folder, {prompt.key: oracle_answer(model, prompt)[0] for prompt in prompts()}


@dataclasses.dataclass
class Witness:
    """What was asked of stacks and weights, sweep by sweep."""

    num_tokens: list[int] = dataclasses.field(default_factory=list)
    asked: list[dict[int, set[int]]] = dataclasses.field(default_factory=list)
    """Experts by the identity of their stack."""
    granules: dict[int, int] = dataclasses.field(default_factory=dict)


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    seen = Witness()
    begin, getitem = StreamedWeights.begin, Stack.__getitem__

    def noted_begin(self: StreamedWeights, num_tokens: int) -> None:
        seen.num_tokens.append(num_tokens)
        seen.asked.append({})
        begin(self, num_tokens)

    def noted_getitem(self: Stack, expert: int) -> torch.Tensor:
        found = getitem(self, expert)
        seen.asked[-1].setdefault(id(self), set()).add(expert)
        seen.granules[id(self)] = found.nbytes
        return found

    monkeypatch.setattr(StreamedWeights, "begin", noted_begin)
    monkeypatch.setattr(Stack, "__getitem__", noted_getitem)
    return seen


def open_engine(source: Path, spill_dir: Path, **changes: Any) -> Engine:
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=spill_dir)
    policy = streaming(0.0, head=1.0, num_slots=NUM_SLOTS, **changes)
    return Engine.load(source, budgets=budgets, policy=policy)


def stacks_of(engine: Engine) -> list[list[int]]:
    """By layer the identities of its stacks, none where it has no experts."""
    assert engine._executor is not None
    layers = engine._executor._model.model.layers
    return [
        [
            id(value)
            for module in layer.modules()
            for value in vars(module).values()
            if isinstance(value, Stack)
        ]
        for layer in layers
    ]


def expected_bytes(
    witness: Witness, layer_bytes: Sequence[int], stacks: Sequence[Sequence[int]]
) -> int:
    """All of a layer, or what is left without the experts that nobody asked for. The first layers
    of a sweep, one for each slot, come as the sweep before wanted them.
    """
    total = 0
    before = False
    for num_tokens, asked in zip(witness.num_tokens, witness.asked, strict=True):
        wants = fetches_chosen(NUM_EXPERTS, 2, num_tokens)
        for layer, num_bytes in enumerate(layer_bytes):
            total += num_bytes
            if before if layer < NUM_SLOTS else wants:
                total -= sum(
                    (NUM_EXPERTS - len(asked[stack])) * witness.granules[stack]
                    for stack in stacks[layer]
                )
        before = wants
    return total


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True, "micro_batch_tokens": 64},
        {"overlap": False, "micro_batch_tokens": 1},
    ],
)
def test_the_tail_equals_the_oracle_and_reads_the_chosen_experts_once(
    tiny: Tiny, tmp_path: Path, witness: Witness, options: Mapping[str, Any]
) -> None:
    source, expected = tiny
    with open_engine(source, tmp_path, **options) as engine:
        found = {done.key: done.token_ids for done in engine.generate(prompts())}
        report = engine.report()
        stacks = stacks_of(engine)
        layer_bytes = [split.total_bytes for split in engine.policy.layer_splits]
    assert found == expected
    assert sum(map(len, stacks)) >= 2 * (len(stacks) - 1)
    assert report.weights_streamed_bytes == expected_bytes(witness, layer_bytes, stacks)
    assert report.weights_streamed_bytes < report.num_sweeps * engine.policy.streamed_bytes


def test_an_expert_that_cannot_be_read_is_named_and_the_rows_can_go_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = tiny
    fetch = ChosenExperts._fetch
    faults = [OSError(5, "Input/output error")]

    def fail_once(self: ChosenExperts, *arguments: Any, **options: Any) -> None:
        if faults:
            raise faults.pop()
        fetch(self, *arguments, **options)

    monkeypatch.setattr(ChosenExperts, "_fetch", fail_once)
    with open_engine(source, tmp_path) as engine:
        with pytest.raises(
            EngineError, match=r"expert \d+ of layers\.\d+ cannot be read: .*output"
        ):
            list(engine.generate([dataclasses.replace(prompts()[0], key="broken")]))
        engine.cancel("broken")
        found = {done.key: done.token_ids for done in engine.generate(prompts())}
    assert not faults
    assert found == expected


def test_damage_is_found_in_the_first_expert_that_is_read_of_its_mebibyte(tmp_path: Path) -> None:
    """Small experts share a mebibyte, which no single one of them fills."""
    config = shrink(causal_types()["mixtral"], num_hidden_layers=4, **TYPES["mixtral"])
    source = write_model(config, tmp_path / "model")
    prompt = dataclasses.replace(prompts()[2], sampling=prompts()[1].sampling)
    with open_engine(source, tmp_path) as engine:
        list(engine.generate([prompt]))
    [path] = tmp_path.glob("packs/*/weights.bin")
    group = open_pack(path.parent).group("layers.3")  # its slot is filled after the sweep began
    [stack] = [tensor for tensor in group.tensors if tensor.name.endswith("down_proj")]
    assert stack.num_bytes < CHUNK_BYTES
    with path.open("r+b") as file:
        file.seek(group.offset_bytes + stack.offset_bytes)
        file.write(b"\xff\xff\xff\xff")
    with (
        open_engine(source, tmp_path) as engine,
        pytest.raises(EngineError, match=r"expert \d+ of layers\.3 .*down_proj.* written anew"),
    ):
        list(engine.generate([prompt]))
