"""The oracle over homes of keys and values, ways to attend to them, shared prefixes and places of
hidden states: greedy tokens equal `generate`, whatever the policy says.
"""

import random
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.planning.policy import Policy, Split, Tier
from engine.planning.shape import ModelShape
from engine.sweep.report import Report
from tests.support.oracle import Answer, oracle_answer, ragged_prompts
from tests.support.policies import streaming
from tests.support.tiny_models import VOCAB_SIZE, write_tiny_model

MODELS: Final = ("llama", "gemma2", "gpt2")
SMALL: Final = {"block_rows": 6, "sweep_tokens": 40, "micro_batch_tokens": 16}

# Tokens of keys and values on the CPU and on disk, and how rows on disk attend.
HOMES: Final[dict[str, tuple[int, int, dict[str, Any]]]] = {
    "disk, beside": (0, 4096, {"attends_beside": True}),
    "disk, fetched": (0, 4096, {"attends_beside": False}),
    "disk, fetched a few at a time": (0, 4096, {"attends_beside": False, "fetch_tokens": 50}),
    "both, beside": (160, 4096, {"attends_beside": True}),
    "both, fetched": (160, 4096, {"attends_beside": False}),
    "both short": (160, 160, {"attends_beside": False}),
}


def sharing_prompts() -> list[Prompt]:
    """Rows that begin alike at several depths, some the same from end to end, and loners."""
    draw = random.Random(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(count))

    job, first, second = tokens(53), tokens(40), tokens(35)
    bodies = [job + first + tokens(3 + 7 * i) for i in range(4)]
    bodies += [job + second + tokens(9 * i) for i in range(3)]
    bodies += [job + tokens(5), job, job[:48], job + first, tokens(4), tokens(70)]
    bodies += [bodies[0], bodies[0], bodies[5]]
    return [
        Prompt(key=str(at), token_ids=body, sampling=Sampling(max_tokens=draw.choice((1, 6, 40))))
        for at, body in enumerate(bodies)
    ]


PROMPTS: Final = {"ragged": ragged_prompts(), "sharing": sharing_prompts()}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny checkpoint, with the oracle's answers to each list of prompts."""
    torch.set_num_threads(1)  # tensors this small only wait for one another
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, {
        name: {prompt.key: oracle_answer(model, prompt) for prompt in prompts}
        for name, prompts in PROMPTS.items()
    }


Tiny = tuple[Path, dict[str, dict[str, Answer]]]


def answers_under(
    tiny: Tiny, prompts: str, tmp_path: Path, *, resident: float = 1.0, **changes: Any
) -> Report:
    """Run the prompts under the policy, compare with the oracle; the report."""
    folder, expected = tiny
    cpu, disk = changes.pop("kv_tokens", (4096, 0))

    def policy(shape: ModelShape, budgets: Budgets) -> Policy:
        kv = Split(
            gpu_bytes=0,
            cpu_bytes=cpu * shape.kv_bytes_per_token,
            disk_bytes=disk * shape.kv_bytes_per_token,
        )
        return streaming(resident, kv=kv, **changes)(shape, budgets)

    budgets = Budgets(gpu_bytes=0, host_bytes=2**30, disk_bytes=2**30, spill_dir=tmp_path)
    with Engine.load(folder, budgets=budgets, policy=policy) as engine:
        found = {each.key: each for each in engine.generate(PROMPTS[prompts])}
        assert {key: each.token_ids for key, each in found.items()} == {
            key: tokens for key, (tokens, _) in expected[prompts].items()
        }
        return engine.report()


@pytest.mark.parametrize("prompts", list(PROMPTS))
@pytest.mark.parametrize("home", list(HOMES))
def test_wherever_rows_live_and_however_they_attend_greedy_tokens_equal_generate(
    tiny: Tiny, tmp_path: Path, home: str, prompts: str
) -> None:
    cpu, disk, how = HOMES[home]
    answers_under(tiny, prompts, tmp_path, kv_tokens=(cpu, disk), **SMALL, **how)


@pytest.mark.parametrize("kv_tokens", [4096, 330, 160])
@pytest.mark.parametrize("shape", [{}, SMALL])
def test_a_shared_prefix_is_computed_once_and_changes_no_token(
    tiny: Tiny, tmp_path: Path, shape: dict[str, int], kv_tokens: int
) -> None:
    report = answers_under(tiny, "sharing", tmp_path, kv_tokens=(kv_tokens, 0), **shape)
    prompt_tokens = sum(len(prompt.token_ids) for prompt in PROMPTS["sharing"])
    assert report.shared_tokens > 0
    if kv_tokens == 4096:
        assert report.preempted_rows == 0
        assert report.shared_tokens > 0.4 * prompt_tokens
        assert report.prompt_tokens < 0.6 * prompt_tokens


@pytest.mark.parametrize("hidden_tier", [None, Tier.DISK])
@pytest.mark.parametrize("resident", [0.0, 1.0])
def test_hidden_states_may_wait_on_disk_between_layers(
    tiny: Tiny, tmp_path: Path, hidden_tier: Tier | None, resident: float
) -> None:
    answers_under(tiny, "ragged", tmp_path, resident=resident, hidden_tier=hidden_tier, **SMALL)
