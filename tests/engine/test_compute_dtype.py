"""Another computing dtype: as far from float32 as the library's own forward in it, and no farther."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.compute.dtypes import compute_dtype_of
from engine.config import Budgets, Prompt, TokenLogprobs
from engine.engine import Engine
from engine.errors import ComputeDtypeError
from tests.support.model_check import write_model
from tests.support.oracle import ragged_prompts
from tests.support.policies import streaming
from tests.support.shrunk_models import causal_types, shrink
from tests.support.tiny_models import TINY_MODELS, write_tiny_model

GIB: Final = 2**30
NUM_TOP: Final = 20
TOLERANCE: Final = 1.5
"""Our error over the library's own: of the middle one, and of the one that a tenth is above."""
WORST: Final = 2.0
"""The same of the worst of all: one value each, which may lie apart by chance."""

# Soft-capping and windows, experts, slices of input features, sinks: each its own way to multiply
# or to attend. Of a model with experts the worst error says nothing: a router's choice has turned.
MODELS: Final = {"llama": False, "gemma2": False, "mixtral": True, "gpt2": False, "gpt_oss": True}

RUNS: Final[Mapping[str, tuple[float, dict[str, Any]]]] = {
    "resident": (1.0, {}),
    "cut between rows": (0.37, {"head": 0.6, "embedding": 0.3}),
    "streamed, refilled, prefilled in chunks": (
        0.0,
        {"block_rows": 3, "sweep_tokens": 7, "micro_batch_tokens": 5},
    ),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the engine answered in bfloat16, and how far from float32 it and the library were.

    `ours` and `theirs` are the absolute errors of the log-probabilities of the likeliest tokens of
    every step, each forward given the tokens that the engine had chosen.
    """

    answers: Mapping[str, Sequence[TokenLogprobs]]
    ours: torch.Tensor
    theirs: torch.Tensor


@pytest.fixture(scope="module", params=list(MODELS))
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, Run]]:
    """Whether the model has experts, and its runs."""
    torch.set_num_threads(1)  # tensors this small only wait for one another
    folder = tmp_path_factory.mktemp("model")
    source = folder / "bfloat16"
    if request.param in TINY_MODELS:
        write_tiny_model(source, request.param, dtype=torch.bfloat16)
    else:
        write_model(shrink(causal_types()[request.param]), source)
    load = transformers.AutoModelForCausalLM.from_pretrained
    exact, rounded = (
        load(source, dtype=dtype, attn_implementation="eager")
        for dtype in (torch.float32, torch.bfloat16)
    )
    return MODELS[request.param], {
        name: scored(answers(source, folder, *RUNS[name]), exact, rounded) for name in RUNS
    }


def answers(
    source: Path, spill_dir: Path, resident: float, changes: Mapping[str, Any]
) -> dict[str, Sequence[TokenLogprobs]]:
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=spill_dir)
    policy = streaming(resident, **changes)
    with Engine.load(source, budgets=budgets, policy=policy, compute_dtype="bfloat16") as engine:
        assert engine.policy.compute_dtype == "bfloat16"
        found = {each.key: each.logprobs for each in engine.generate(prompts())}
    return {key: steps for key, steps in found.items() if steps is not None}


def prompts() -> list[Prompt]:
    return [
        dataclasses.replace(
            prompt, sampling=dataclasses.replace(prompt.sampling, logprobs=NUM_TOP, ignore_eos=True)
        )
        for prompt in ragged_prompts()[:5]
    ]


def scored(found: Mapping[str, Sequence[TokenLogprobs]], exact: Any, rounded: Any) -> Run:
    ours, theirs = [], []
    for prompt in prompts():
        steps = found[prompt.key]
        assert len(steps) == prompt.sampling.max_tokens
        ids = torch.tensor([[*prompt.token_ids, *(step.token_id for step in steps[:-1])]])
        top = torch.tensor([[token for token, _ in step.top] for step in steps])
        expected, other = (
            logprobs_of(model, ids)[-len(steps) :].gather(1, top) for model in (exact, rounded)
        )
        given = torch.tensor([[logprob for _, logprob in step.top] for step in steps])
        ours.append((given - expected).abs().flatten())
        theirs.append((other - expected).abs().flatten())
    return Run(answers=found, ours=torch.cat(ours), theirs=torch.cat(theirs))


def logprobs_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) after each of the (1, tokens), without any cache."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float().log_softmax(dim=-1)


@pytest.mark.parametrize("name", list(RUNS))
def test_bfloat16_errs_no_more_than_the_library_does_in_it(
    runs: tuple[bool, dict[str, Run]], name: str
) -> None:
    has_experts, run = runs[0], runs[1][name]
    assert run.theirs.max() > 1e-3, "nothing was rounded"
    for share in (0.5, 0.9):
        assert run.ours.quantile(share) < TOLERANCE * run.theirs.quantile(share)
    if not has_experts:
        assert run.ours.max() < WORST * run.theirs.max()


@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_answers_part_only_where_two_tokens_were_closer_than_rounding(
    runs: tuple[bool, dict[str, Run]], name: str
) -> None:
    """Kernels round by how many rows there are, so the same row may round otherwise elsewhere."""
    first, other = runs[1]["resident"], runs[1][name]
    largest = float(torch.cat([first.ours, other.ours]).max())
    for key, steps in first.answers.items():
        pairs = zip(steps, other.answers[key], strict=True)
        parted = next((pair for pair in pairs if pair[0].token_id != pair[1].token_id), None)
        if parted is not None:
            chosen = dict(parted[0].top)
            gap = chosen[parted[0].token_id] - chosen[parted[1].token_id]
            assert gap <= 2 * largest, (key, parted)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_what_is_stored_otherwise_is_rounded_once(tmp_path: Path, stored: torch.dtype) -> None:
    """Where weights stay and where they stream, as if they had been stored in bfloat16; but for the
    head, whose values are multiplied by as they are.
    """
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(write_tiny_model(tmp_path / "model", "llama"), dtype=torch.float32)
    model.lm_head.bfloat16().float()
    model.to(stored).save_pretrained(tmp_path / "stored")
    load(tmp_path / "stored", dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    for resident in (1.0, 0.37):
        found = answers(tmp_path / "stored", tmp_path, resident, {})
        for key, steps in answers(tmp_path / "rounded", tmp_path, resident, {}).items():
            assert [step.token_id for step in found[key]] == [step.token_id for step in steps]
            # The head's kernel, in float32, may be another.
            given, expected = ([step.logprob for step in each] for each in (found[key], steps))
            assert given == pytest.approx(expected, abs=1e-4)


# -- which dtype ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "on_gpu", "found"),
    [
        (None, False, torch.float32),
        (None, True, torch.float16),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
        ("float16", True, torch.float16),
    ],
)
def test_what_was_asked_for_is_computed_in_or_what_suits_the_device(
    asked: str | None, found: torch.dtype, *, on_gpu: bool
) -> None:
    assert compute_dtype_of(asked, stored=torch.float16, on_gpu=on_gpu) == found


@pytest.mark.parametrize(("asked", "reason"), [("float16", "GPU only"), ("int3", "'int3'")])
def test_what_is_of_no_use_is_refused_by_name(tmp_path: Path, asked: str, reason: str) -> None:
    source = write_tiny_model(tmp_path / "model", "llama")
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    with pytest.raises(ComputeDtypeError, match=reason):
        Engine.load(source, budgets=budgets, policy=streaming(1.0), compute_dtype=asked)


def test_a_policy_for_another_dtype_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model", "llama")
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    policy = streaming(1.0, compute_dtype="float32")
    with pytest.raises(ComputeDtypeError, match="in float32, the model in bfloat16"):
        Engine.load(source, budgets=budgets, policy=policy, compute_dtype="bfloat16")
