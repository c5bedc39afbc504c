"""The same engine on a GPU: greedy tokens equal the oracle's wherever weights and KV lie.

`make gpu` runs these; without a GPU they fail, so that nobody takes silence for success.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import Budgets
from engine.engine import Engine
from engine.planning.policy import Tier
from tests.support.oracle import Answer, oracle_answer, ragged_prompts
from tests.support.policies import streaming
from tests.support.tiny_models import TINY_MODELS, write_tiny_model

pytestmark = pytest.mark.gpu

GIB = 2**30

# Fractions of every layer, head and embedding on the GPU and in host memory; the rest is on disk.
PLACEMENTS = {
    "all on the GPU": (1.0, 0.0),
    "GPU and host": (0.5, 0.5),
    "host": (0.0, 1.0),
    "all three tiers": (0.3, 0.4),
    "disk": (0.0, 0.0),
}


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, {prompt.key: oracle_answer(model, prompt) for prompt in ragged_prompts()}


@pytest.mark.parametrize("kv_tier", [Tier.GPU, Tier.CPU])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_greedy_tokens_on_a_gpu_equal_generate(
    tiny: tuple[Path, dict[str, Answer]], tmp_path: Path, placement: str, kv_tier: Tier
) -> None:
    folder, expected = tiny
    resident, hosted = PLACEMENTS[placement]
    budgets = Budgets(gpu_bytes=GIB, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    policy = streaming(
        resident,
        hosted=hosted,
        embedding=resident,
        kv_tier=kv_tier,
        block_rows=5,
        sweep_tokens=24,
        micro_batch_tokens=16,
    )
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        found = {completion.key: completion for completion in engine.generate(ragged_prompts())}
    assert {key: completion.token_ids for key, completion in found.items()} == {
        key: tokens for key, (tokens, _) in expected.items()
    }
