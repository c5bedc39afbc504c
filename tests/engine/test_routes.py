"""Attention away from the compute tier: a failure of its thread is one clear error, never a hang, and
the rows go on afterwards as if it had not been.
"""

import itertools
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.compute import routes
from engine.compute.fetched import Fetched
from engine.config import Budgets, Completion, Prompt, Sampling
from engine.engine import Engine
from engine.errors import BudgetError
from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.spill import SpillFile
from engine.planning.cost import KV_PAGE_TOKENS
from engine.planning.policy import Tier
from tests.support.model_check import write_model
from tests.support.oracle import oracle_answer
from tests.support.policies import streaming
from tests.support.shrunk_models import causal_types, shrink
from tests.support.tiny_models import VOCAB_SIZE, write_tiny_model

# Where a thread's work can break, and under which policy it does that work.
FAULTS: Final[dict[str, tuple[Any, str, dict[str, bool]]]] = {
    "attention": (routes, "write_and_attend", {"attends_beside": True}),
    "fetching": (KVCache, "read_ahead", {"attends_beside": False}),
    "storing": (Fetched, "_store", {"attends_beside": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama")


def prompts() -> list[Prompt]:
    return [
        Prompt(
            key=str(at),
            token_ids=tuple(2 + (31 * at + 7 * i) % (VOCAB_SIZE - 2) for i in range(5 + 9 * at)),
            sampling=Sampling(max_tokens=7, ignore_eos=True),
        )
        for at in range(4)
    ]


def load(folder: Path, tmp_path: Path, **changes: Any) -> Engine:
    budgets = Budgets(gpu_bytes=0, host_bytes=2**30, disk_bytes=2**30, spill_dir=tmp_path)
    policy = streaming(0.5, kv_tier=Tier.DISK, micro_batch_tokens=9, **changes)
    return Engine.load(folder, budgets=budgets, policy=policy)


def run(engine: Engine) -> tuple[dict[str, Completion], list[Exception]]:
    """What came out, and what was raised on the way."""
    found: dict[str, Completion] = {}
    raised: list[Exception] = []
    for prompt in prompts():
        engine.submit(prompt)
    while engine.num_rows:
        try:
            found |= {completion.key: completion for completion in engine.sweep()}
        except OSError as error:
            raised.append(error)
    return found, raised


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_thread_that_fails_is_heard_and_the_next_sweep_is_as_if_it_had_not_failed(
    folder: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, policy = FAULTS[fault]
    with load(folder, tmp_path, **policy) as engine:
        expected, raised = run(engine)
    assert not raised
    whole = getattr(owner, name)
    calls = itertools.count()

    def failing(*arguments: Any, **options: Any) -> Any:
        if next(calls) in {0, 5, 11, 40}:
            raise OSError("the disk is on fire")
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    with load(folder, tmp_path, **policy) as engine:
        found, raised = run(engine)
    assert found == expected
    assert 1 <= len(raised) <= 4
    assert {str(error) for error in raised} == {"the disk is on fire"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attends_beside", [True, False])
def test_a_layer_may_attend_twice(tmp_path: Path, attends_beside: bool) -> None:  # noqa: FBT001
    config = shrink(causal_types()["longcat_flash"])
    source = write_model(config, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    expected = {prompt.key: oracle_answer(model, prompt)[0] for prompt in prompts()}
    with load(source, tmp_path, attends_beside=attends_beside) as engine:
        found, raised = run(engine)
    assert not raised
    assert {key: done.token_ids for key, done in found.items()} == expected


def test_keys_and_values_on_disk_take_their_room_at_once_and_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    shape = KVShape(num_heads=2, key_size=8, value_size=4)
    page_bytes = KV_PAGE_TOKENS * 3 * shape.token_bytes(torch.float32)
    cache = KVCache(
        [shape] * 3,
        budget_bytes=10 * page_bytes + 1,
        dtype=torch.float32,
        tier=Tier.DISK,
        spill_dir=tmp_path,
    )
    assert cache.num_tokens == 10 * KV_PAGE_TOKENS
    for number, pool in enumerate(cache.pools()):
        pool.fill_(number)
    assert [bool((pool == at).all()) for at, pool in enumerate(cache.pools())] == [True] * 6
    assert list(tmp_path.iterdir()) == []


def test_a_spill_folder_without_room_is_refused_with_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="no room for 1,152,921,504,606,846,976 bytes of keys"):
        SpillFile(tmp_path, 2**60)
