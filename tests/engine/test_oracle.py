"""The oracle: greedy tokens equal the library's own `generate`, one prompt at a time, unpadded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import Budgets, Completion, Prompt, Sampling
from engine.engine import Engine
from engine.planning.planners.base import Wishes
from engine.planning.planners.fixed import plan_fixed
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from tests.support.oracle import Answer, oracle_answer, ragged_prompts
from tests.support.policies import streaming
from tests.support.tiny_models import TINY_MODELS, write_tiny_model

GIB = 2**30

# Each composition forces another part of the schedule.
COMPOSITIONS = {
    "one block": {},
    "refill and chunked prefill": {"block_rows": 3, "sweep_tokens": 7, "micro_batch_tokens": 5},
    "pages run short": {"block_rows": 6, "sweep_tokens": 40, "micro_batch_tokens": 16},
}
SHORT_OF_PAGES = 144  # tokens of KV in the last composition: about two of the rows below

# Fractions of every layer, of the head and of an untied embedding that are resident.
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"resident": 1.0},
    "cut between rows": {"resident": 0.37, "head": 0.6, "embedding": 0.3},
    "layers streamed": {"resident": 0.0, "head": 1.0},
    "streamed": {"resident": 0.0, "embedding": 0.0},
}


@pytest.fixture(scope="module", params=list(TINY_MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny checkpoint of each type, with the oracle's answers to the ragged prompts."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = {prompt.key: oracle_answer(model, prompt) for prompt in ragged_prompts()}
    return folder, expected


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize("composition", list(COMPOSITIONS))
def test_greedy_tokens_equal_generate(
    tiny: tuple[Path, dict[str, Answer]],
    tmp_path: Path,
    placement: str,
    composition: str,
) -> None:
    folder, expected = tiny
    torch.set_num_threads(1)  # tensors this small only wait for one another

    def policy(shape: ModelShape, budgets: Budgets) -> Policy:
        changes: dict[str, Any] = dict(COMPOSITIONS[composition])
        if composition == "pages run short":
            changes["kv_bytes"] = SHORT_OF_PAGES * shape.kv_bytes_per_token
        return streaming(**PLACEMENTS[placement], **changes)(shape, budgets)

    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        found = {completion.key: completion for completion in engine.generate(ragged_prompts())}
        report = engine.report()
    assert found.keys() == expected.keys()
    for key, (tokens, ended) in expected.items():
        assert found[key].token_ids == tokens, key
        assert found[key].finish_reason == ("stop" if ended else "length"), key
    if composition == "pages run short":
        assert report.preempted_rows > 0, "the pool was meant to be too small"
    most_bytes = report.num_sweeps * engine.policy.streamed_bytes
    if "mixtral" in (folder / "config.json").read_text():  # few tokens are sent to few experts
        assert report.weights_streamed_bytes <= most_bytes
    else:
        assert report.weights_streamed_bytes == most_bytes
    assert (engine.policy.streamed_bytes > 0) == (placement != "resident")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("placement", ["resident", "cut between rows"])
def test_a_16_bit_checkpoint_computed_in_float32_equals_generate_in_float32(
    tmp_path: Path, name: str, placement: str
) -> None:
    folder = write_tiny_model(tmp_path / "model", name, dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    policy = streaming(**PLACEMENTS[placement])
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        found = {completion.key: completion for completion in engine.generate(ragged_prompts())}
    for prompt in ragged_prompts():
        tokens, _ended = oracle_answer(model, prompt)
        assert found[prompt.key].token_ids == tokens, prompt.key


@pytest.mark.parametrize("num_micro_batches", [1, 3, 7])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bytes_streamed_do_not_grow_with_the_number_of_micro_batches(
    tmp_path: Path, name: str, num_micro_batches: int
) -> None:
    folder = write_tiny_model(tmp_path / "model", name)
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    policy = streaming(0.37, head=0.2, sweep_tokens=84, micro_batch_tokens=84 // num_micro_batches)
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        prompts = [
            Prompt(key=key, token_ids=tuple(range(2, 14)), sampling=Sampling(max_tokens=3))
            for key in "abcdefg"
        ]
        list(engine.generate(prompts))
        report = engine.report()
    assert report.num_sweeps == 3
    assert report.weights_streamed_bytes == 3 * engine.policy.streamed_bytes > 0


REAL_PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Explain in two sentences why ships use containers.",
    "Write a haiku about a freight train.",
    "Summarise: The quick brown fox jumps over the lazy dog. The dog does not mind. The fox is gone.",
    "What is 17 + 25?",
    "List the days of the week.",
    "Translate to French: good morning.",
)


def _real_answers(
    source: Path, tmp_path: Path, *, host_bytes: int
) -> tuple[dict[str, Completion], list[Prompt], int]:
    budgets = Budgets(gpu_bytes=0, host_bytes=host_bytes, disk_bytes=4 * GIB, spill_dir=tmp_path)

    def policy(shape: ModelShape, budgets: Budgets) -> Policy:
        return plan_fixed(shape, budgets, Wishes(block_rows=6, sweep_tokens=64))

    with Engine.load(source, budgets=budgets, policy=policy) as engine:
        prompts = [
            Prompt(
                key=text,
                token_ids=tuple(engine.tokenizer.render_chat([{"role": "user", "content": text}])),
                sampling=Sampling(max_tokens=12 + 5 * index),
            )
            for index, text in enumerate(REAL_PROMPTS)
        ]
        found = {completion.key: completion for completion in engine.generate(prompts)}
        return found, prompts, engine.policy.streamed_bytes


@pytest.fixture(scope="module")
def real_oracle(demo_model: Path) -> Callable[[Prompt], Answer]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        demo_model.parent, gguf_file=demo_model.name, dtype=torch.float32
    )
    return lambda prompt: oracle_answer(model, prompt)


@pytest.mark.parametrize("host_bytes", [4 * GIB, GIB // 2], ids=["in memory", "streamed"])
def test_the_real_model_answers_as_generate_does(
    demo_model: Path,
    real_oracle: Callable[[Prompt], Answer],
    tmp_path: Path,
    host_bytes: int,
) -> None:
    found, prompts, streamed_bytes = _real_answers(demo_model, tmp_path, host_bytes=host_bytes)
    assert (streamed_bytes > 0) == (host_bytes < GIB), "the small budget is to force streaming"
    for prompt in prompts:
        tokens, ended = real_oracle(prompt)
        assert found[prompt.key].token_ids == tokens, prompt.key
        assert found[prompt.key].finish_reason == ("stop" if ended else "length")
