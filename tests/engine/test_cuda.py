"""The same engine on a GPU: greedy tokens equal the oracle's wherever weights and KV lie.

`make gpu` runs these; without a GPU they fail, so that nobody takes silence for success.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.compute.draws import Draw
from engine.compute.sampling import Sampled, sample
from engine.config import Budgets, Embedding, Sampling, Scoring
from engine.engine import Engine
from engine.planning.policy import Tier
from tests.support.oracle import Answer, oracle_answer, ragged_prompts
from tests.support.policies import streaming
from tests.support.readings import prompts, require_embedding, require_scores
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


# Where rows live, and whether they attend beside their keys and values.
HOMES: dict[str, dict[str, Any]] = {
    "GPU": {"kv_tier": Tier.GPU},
    "beside, on the CPU": {"kv_tier": Tier.CPU},
    "fetched from the CPU": {"kv_tier": Tier.CPU, "attends_beside": False},
    "fetched from disk": {"kv_tier": Tier.DISK, "attends_beside": False, "fetch_tokens": 50},
}


@pytest.mark.parametrize("home", list(HOMES))
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_greedy_tokens_on_a_gpu_equal_generate(
    tiny: tuple[Path, dict[str, Answer]], tmp_path: Path, placement: str, home: str
) -> None:
    folder, expected = tiny
    resident, hosted = PLACEMENTS[placement]
    budgets = Budgets(gpu_bytes=GIB, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    policy = streaming(
        resident,
        hosted=hosted,
        embedding=resident,
        **HOMES[home],
        block_rows=5,
        sweep_tokens=24,
        micro_batch_tokens=16,
    )
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        found = {completion.key: completion for completion in engine.generate(ragged_prompts())}
    assert {key: completion.token_ids for key, completion in found.items()} == {
        key: tokens for key, (tokens, _) in expected.items()
    }


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("placement", ["all on the GPU", "all three tiers"])
def test_prompts_are_read_on_a_gpu_as_the_library_does(
    tmp_path: Path, name: str, placement: str
) -> None:
    folder = write_tiny_model(tmp_path / "model", name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    bare = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    resident, hosted = PLACEMENTS[placement]
    budgets = Budgets(gpu_bytes=GIB, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    policy = streaming(resident, hosted=hosted, sweep_tokens=48, micro_batch_tokens=16)
    with Engine.load(folder, budgets=budgets, policy=policy, compute_dtype="float32") as engine:
        found = {completion.key: completion for completion in engine.generate(prompts())}
    for prompt in prompts():
        if isinstance(prompt.reading, Scoring):
            require_scores(model, prompt, found[prompt.key].prompt_logprobs)
        elif isinstance(prompt.reading, Embedding):
            require_embedding(bare, prompt, found[prompt.key].embedding)


SAMPLINGS = (
    Sampling(max_tokens=9, logprobs=5),
    Sampling(max_tokens=9, seed=1, temperature=1.0, logprobs=0),
    Sampling(max_tokens=9, seed=2, temperature=1.3, top_p=0.95),
    Sampling(max_tokens=9, seed=3, temperature=1.5, top_k=40, min_p=0.01, logprobs=20),
    Sampling(max_tokens=9, repetition_penalty=1.3, presence_penalty=0.5, min_tokens=8),
    Sampling(max_tokens=9, seed=4, temperature=0.8, logit_bias=((9, 3.0),), stop_token_ids=(4,)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [50_257, 128_256])
def test_a_row_is_sampled_alike_on_either_device_and_the_same_in_any_company(
    dtype: torch.dtype, vocab_size: int
) -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA device"
    logits = 3 * torch.randn(48, vocab_size, generator=torch.Generator().manual_seed(7))
    logits = logits.to(dtype)
    draws = [
        Draw(sampling=SAMPLINGS[row % 6], index=row // 6, prompt=range(20), generated=(5, 5, 7))
        for row in range(48)
    ]

    def sampled(rows: list[int], device: str) -> list[Sampled]:
        return sample(logits[rows].to(device), [draws[row] for row in rows], eos_token_ids=[1])

    every = list(range(48))
    found = sampled(every, "cuda")
    assert [sampled([row], "cuda")[0] for row in every] == found
    assert sampled(every[::-5], "cuda") == found[::-5]
    for here, there in zip(sampled(every, "cpu"), found, strict=True):
        assert here.token_id == there.token_id
        assert (here.logprobs is None) == (there.logprobs is None)
        if here.logprobs and there.logprobs:
            assert here.logprobs.logprob == pytest.approx(there.logprobs.logprob, abs=1e-5)
            assert [token for token, _ in here.logprobs.top] == [
                token for token, _ in there.logprobs.top
            ]
