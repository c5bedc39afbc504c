"""One model tried as users run it: a checkpoint on disk, the engine, the library as the oracle."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import transformers

from engine.config import Budgets, Completion, Prompt, Sampling, Scoring
from engine.engine import Engine
from tests.support.policies import streaming
from tests.support.shrunk_models import VOCAB_SIZE, randomise

TOLERANCE: Final = 1e-3
_GIB: Final = 2**30
_SAMPLE: Final = "engine.sweep.executor.sample"

# Three ragged prompts in one forward; then chunks beside decoding rows, micro-batches in lockstep.
_COMPOSITIONS: Final[tuple[dict[str, Any], ...]] = (
    {"block_rows": 3, "sweep_tokens": 64, "micro_batch_tokens": 64},
    {"block_rows": 3, "sweep_tokens": 7, "micro_batch_tokens": 5},
)
_PROMPT_TOKENS: Final = (13, 1, 30)
_NEW_TOKENS: Final = (9, 12, 5)


def write_model(config: Any, folder: Path) -> Path:
    """A seeded checkpoint of the config, as the library writes it; gives the folder."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if type(model.config) is not type(config):  # on disk is the whole, not its language model alone
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def largest_error(source: Path, spill_dir: Path) -> float:
    """By how much any sampled row's logits, or any prompt token's log-probability, differ from the
    library's, over all compositions.

    Greedy tokens are asserted to equal `generate`, which keeps a cache of its own. Raises whatever
    the engine raises.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None  # every row goes on to its limit
    tokens = {prompt.key: _generate(model, prompt) for prompt in _prompts()}
    expected = torch.cat([_logits(model, prompt, tokens[prompt.key]) for prompt in _prompts()])
    budgets = Budgets(gpu_bytes=0, host_bytes=_GIB, disk_bytes=_GIB, spill_dir=spill_dir)
    errors = []
    for composition in _COMPOSITIONS:
        policy = streaming(0.5, **composition)
        with (
            _recorded_logits() as recorded,
            Engine.load(source, budgets=budgets, policy=policy) as engine,
        ):
            found = {c.key: c for c in engine.generate(_prompts())}
        errors.append(_distance(expected, torch.cat(recorded)))
        assert {key: completion.token_ids for key, completion in found.items()} == tokens, (
            f"tokens differ, and logits by {errors[-1]}"
        )
        errors += [_error_of_scores(model, prompt, found[prompt.key]) for prompt in _prompts()]
    return max(errors)


def _prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(7)
    return [
        Prompt(
            key=str(index),
            token_ids=tuple(torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()),
            sampling=Sampling(max_tokens=_NEW_TOKENS[index], ignore_eos=True),
            reading=Scoring(),
        )
        for index, length in enumerate(_PROMPT_TOKENS)
    ]


def _generate(model: Any, prompt: Prompt) -> tuple[int, ...]:
    ids = torch.tensor([prompt.token_ids])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=prompt.sampling.max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tuple(answer[0, ids.shape[1] :].tolist())


def _logits(model: Any, prompt: Prompt, tokens: Sequence[int]) -> torch.Tensor:
    """(generated, vocabulary): what each of the tokens was chosen from, without any cache."""
    ids = torch.tensor([[*prompt.token_ids, *tokens[:-1]]])
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(prompt.token_ids) - 1 :]


def _error_of_scores(model: Any, prompt: Prompt, completion: Completion) -> float:
    """Of the prompt's tokens after the first."""
    ids = torch.tensor([prompt.token_ids])
    with torch.inference_mode():
        scores = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
    told = completion.prompt_logprobs
    assert told is not None
    assert len(told) == ids.shape[1] - 1
    pairs = enumerate(told)
    return max(
        (abs(each.logprob - float(scores[at, each.token_id])) for at, each in pairs), default=0.0
    )


@contextlib.contextmanager
def _recorded_logits() -> Iterator[list[torch.Tensor]]:
    """What every row was sampled from, (rows, vocabulary) for each call."""
    recorded: list[torch.Tensor] = []

    def record(logits: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        recorded.append(logits.detach().clone().float())
        return sample(logits, *arguments, **options)

    patch = mock.patch(_SAMPLE, record)
    sample, _ = patch.get_original()
    with patch:
        yield recorded


def _distance(expected: torch.Tensor, rows: torch.Tensor) -> float:
    """How far the worst expected row is from its like; `rows` come in the order of the sweeps."""
    assert len(rows) == len(expected)
    return float(torch.cdist(expected, rows, p=torch.inf).amin(dim=1).max())
