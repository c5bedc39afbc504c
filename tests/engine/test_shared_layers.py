"""Layers that attend over an earlier layer's keys and values: kept once, on every tier, exactly."""

from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.memory.kv_cache import KVCache
from engine.memory.shapes import kv_shapes
from engine.planning.policy import Policy, Tier
from engine.planning.shape import ModelShape
from engine.timeline import Track
from tests.support.model_check import write_model
from tests.support.oracle import oracle_answer
from tests.support.policies import streaming
from tests.support.shrunk_models import VOCAB_SIZE, causal_types, shrink

# Six layers of which the last two have none of their own: one with a window, one without.
TYPES: Final[dict[str, dict[str, Any]]] = {
    "gemma3n_text": {"activation_sparsity_pattern": [0.5] * 6},
    "gemma4_text": {"global_head_dim": 32},
}
KINDS: Final = ["sliding_attention", "sliding_attention", "full_attention"] * 2
ROUTES: Final[dict[str, dict[str, Any]]] = {
    "here": {},
    "beside": {"kv_tier": Tier.DISK, "attends_beside": True},
    "fetched": {"kv_tier": Tier.DISK, "attends_beside": False},
}


def config_of(name: str) -> Any:
    changes = {"num_hidden_layers": 6, "layer_types": KINDS, "num_kv_shared_layers": 2}
    return shrink(causal_types()[name], **changes, **TYPES[name])


def prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(5)
    return [
        Prompt(
            key=str(index),
            token_ids=tuple(torch.randint(2, VOCAB_SIZE, (length,), generator=draw).tolist()),
            sampling=Sampling(max_tokens=limit, ignore_eos=True),
        )
        for index, (length, limit) in enumerate(((33, 8), (9, 12), (1, 20)))
    ]


@pytest.mark.parametrize("name", list(TYPES))
def test_a_layer_without_keys_of_its_own_takes_no_bytes(name: str) -> None:
    shapes = kv_shapes(config_of(name))
    assert [shape.owner for shape in shapes] == [None, None, None, None, 3, 2]
    own = sum(shape.token_bytes(torch.float32) for shape in shapes[:4])
    assert sum(shape.token_bytes(torch.float32) for shape in shapes) == own
    cache = KVCache(shapes, budget_bytes=64 * own, dtype=torch.float32)
    assert cache.num_tokens == 64
    assert sum(pool.nbytes for pool in cache.pools()) == 64 * own
    for layer, owner in ((4, 3), (5, 2)):
        assert cache.is_shared(layer)
        assert not cache.is_shared(owner)
        assert all(map(torch.Tensor.is_set_to, cache.layer(layer), cache.layer(owner)))


@pytest.fixture(scope="module", params=list(TYPES))
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[int, ...]]]:
    torch.set_num_threads(1)
    source = write_model(config_of(request.param), tmp_path_factory.mktemp("model"))
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return source, {prompt.key: oracle_answer(model, prompt)[0] for prompt in prompts()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", list(ROUTES))
def test_tokens_equal_the_oracle_and_what_is_stored_is_stored_once(
    tiny: tuple[Path, dict[str, tuple[int, ...]]],
    tmp_path: Path,
    route: str,
) -> None:
    source, expected = tiny
    shapes: list[ModelShape] = []

    def policy(shape: ModelShape, budgets: Budgets) -> Policy:
        shapes.append(shape)
        # Chunks beside decoding rows, in several micro-batches.
        options = {"block_rows": 3, "sweep_tokens": 20, "micro_batch_tokens": 11, **ROUTES[route]}
        return streaming(0.5, **options)(shape, budgets)

    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=tmp_path)
    with Engine.load(source, budgets=budgets, policy=policy) as engine:
        found = {done.key: done.token_ids for done in engine.generate(prompts())}
        report = engine.report()
    assert found == expected
    if route == "fetched":
        num_tokens = sum(len(p.token_ids) + p.sampling.max_tokens - 1 for p in prompts())
        written = report.totals[Track.DISK_WRITE]
        assert written.num_bytes == num_tokens * shapes[0].kv_bytes_per_token
