"""Prompts that are scored or embedded: what the library's own forward says of them, in any company."""

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.compute.logprobs import score
from engine.compute.scores import RunningScores
from engine.config import (
    Budgets,
    Completion,
    Embedding,
    Pooling,
    Prompt,
    Sampling,
    Scoring,
)
from engine.engine import Engine, PolicyMaker
from engine.errors import PromptError
from engine.planning.policy import Policy
from engine.planning.shape import ModelShape
from tests.support.model_check import write_model
from tests.support.oracle import oracle_answer
from tests.support.policies import streaming
from tests.support.readings import prompts, require_embedding, require_scores
from tests.support.shrunk_models import causal_types, shrink
from tests.support.tiny_models import VOCAB_SIZE, write_tiny_model

GIB: Final = 2**30

# Tied and untied heads, soft caps, scales of either kind, a head with a bias, one of several tiles.
TINY: Final = ("opt", "gemma2", "gpt2", "mixtral")
SHRUNK: Final[Mapping[str, Mapping[str, Any]]] = {
    "cohere2": {},
    "granite": {"logits_scaling": 8.0},
    "phi": {"vocab_size": 2600},
}
RUNS: Final[Mapping[str, tuple[float, dict[str, Any]]]] = {
    "resident, in one block": (1.0, {"sweep_tokens": 512, "micro_batch_tokens": 512}),
    "cut between rows, prefilled in chunks": (
        0.37,
        {"head": 0.6, "block_rows": 3, "sweep_tokens": 7, "micro_batch_tokens": 5},
    ),
    "streamed, in several micro-batches": (0.0, {"sweep_tokens": 96, "micro_batch_tokens": 33}),
}


@pytest.fixture(scope="module", params=[*TINY, *SHRUNK])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint, the library's model of it, and that without its head."""
    torch.set_num_threads(1)  # tensors this small only wait for one another
    folder = tmp_path_factory.mktemp("model")
    if request.param in SHRUNK:
        config = shrink(causal_types()[request.param], **SHRUNK[request.param])
        write_model(config, folder)
    else:
        write_tiny_model(folder, request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    bare = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return folder, model.eval(), bare.eval()


def run(
    folder: Path, spill_dir: Path, policy: PolicyMaker, asked: Sequence[Prompt], **options: Any
) -> tuple[dict[str, Completion], Any]:
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=spill_dir)
    with Engine.load(folder, budgets=budgets, policy=policy, **options) as engine:
        found = {each.key: each for each in engine.generate(asked)}
        assert engine.num_rows == 0
        return found, engine.report()


@pytest.mark.parametrize("name", list(RUNS))
def test_what_is_read_of_prompts_is_what_the_library_says(
    tiny: tuple[Path, Any, Any], tmp_path: Path, name: str
) -> None:
    folder, model, bare = tiny
    resident, changes = RUNS[name]
    asked = prompts()
    found, report = run(folder, tmp_path, streaming(resident, **changes), asked)
    assert found.keys() == {prompt.key for prompt in asked}
    for prompt in asked:
        completion = found[prompt.key]
        if prompt.sampling.max_tokens:
            assert completion.token_ids == oracle_answer(model, prompt)[0], prompt.key
        else:
            assert (completion.token_ids, completion.num_generated) == ((), 0)
            assert completion.finish_reason == "length"
        if isinstance(prompt.reading, Scoring):
            require_scores(model, prompt, completion.prompt_logprobs)
            assert completion.num_cached_tokens == 0
        elif isinstance(prompt.reading, Embedding):
            require_embedding(bare, prompt, completion.embedding)
        else:
            assert (completion.prompt_logprobs, completion.embedding) == (None, None)
    assert found["plain again"].num_cached_tokens == 32
    assert found["the last"].num_cached_tokens == 32
    assert found["all of them"].num_cached_tokens == 0
    if name.startswith("streamed") and "mixtral" not in (folder / "config.json").read_text():
        assert report.weights_streamed_bytes % report.num_sweeps == 0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


def library_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_texts_are_scored_in_one_sweep(llama: Path, tmp_path: Path) -> None:
    texts = [
        Prompt(
            key=str(at),
            token_ids=tuple(2 + (31 * at + place) % 250 for place in range(20 + at)),
            sampling=Sampling(max_tokens=0),
            reading=Scoring(num_top=1),
        )
        for at in range(4)
    ]
    found, report = run(llama, tmp_path, streaming(0.0, sweep_tokens=256), texts)
    assert (report.num_sweeps, report.completions, report.generated_tokens) == (1, 4, 0)
    model = library_of(llama)
    for prompt in texts:
        require_scores(model, prompt, found[prompt.key].prompt_logprobs)


def test_a_row_that_starts_over_is_read_once(llama: Path, tmp_path: Path) -> None:
    """The older row outgrows its pages while the younger ones' prompts are still on their way."""
    draw = random.Random(3)
    older = Prompt(
        key="older",
        token_ids=tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(40)),
        sampling=Sampling(max_tokens=60, ignore_eos=True),
    )
    text = tuple(draw.randrange(2, VOCAB_SIZE) for _ in range(60))
    scored = Prompt(
        key="scored", token_ids=text, sampling=Sampling(max_tokens=3), reading=Scoring(num_top=2)
    )
    mean = Prompt(
        key="mean",
        token_ids=text,
        sampling=Sampling(max_tokens=0),
        reading=Embedding(pooling=Pooling.MEAN),
    )

    def policy(shape: ModelShape, budgets: Budgets) -> Policy:
        return streaming(
            1.0, sweep_tokens=1, block_rows=2, kv_bytes=144 * shape.kv_bytes_per_token
        )(shape, budgets)

    model = library_of(llama)
    bare = transformers.AutoModel.from_pretrained(llama, dtype=torch.float32)
    for read in (scored, mean):
        log = tmp_path / f"{read.key}.jsonl"
        found, _ = run(llama, tmp_path, policy, [older, read], call_log=log)
        lines = map(json.loads, log.read_text().splitlines())
        lost = [line["tokens"] for line in lines if line["event"] == "preempt"]
        assert lost
        assert 0 < lost[0] < len(text), "it was to be halfway"
        if read is scored:
            require_scores(model, scored, found["scored"].prompt_logprobs)
            assert found["scored"].token_ids == oracle_answer(model, scored)[0]
        else:
            require_embedding(bare, mean, found["mean"].embedding)


def test_of_several_completions_the_first_tells_of_the_prompt(llama: Path, tmp_path: Path) -> None:
    (prompt,) = (each for each in prompts() if each.key == "scored and gone on")
    sampling = dataclasses.replace(prompt.sampling, n=3, temperature=1.0)
    asked = dataclasses.replace(prompt, sampling=sampling)
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    with Engine.load(llama, budgets=budgets, policy=streaming(1.0)) as engine:
        found = {each.index: each for each in engine.generate([asked])}
    require_scores(library_of(llama), prompt, found[0].prompt_logprobs)
    assert [found[index].prompt_logprobs for index in (1, 2)] == [None, None]


def test_16_bit_scores_are_near(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "gemma2", dtype=torch.bfloat16)
    model = library_of(folder)
    asked = [each for each in prompts() if each.key.startswith("scored")]
    found, _ = run(folder, tmp_path, streaming(0.3), asked, compute_dtype="bfloat16")
    for prompt in asked:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt.token_ids])).logits[0]
        expected = logits.double().log_softmax(dim=-1)
        told = found[prompt.key].prompt_logprobs
        assert told is not None
        errors = [
            abs(each.logprob - float(expected[at, each.token_id])) for at, each in enumerate(told)
        ]
        assert sum(errors) / len(errors) < 0.1


@pytest.fixture
def engine(llama: Path, tmp_path: Path) -> Iterator[Engine]:
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    with Engine.load(llama, budgets=budgets, policy=streaming(1.0)) as engine:
        yield engine


@pytest.mark.parametrize(
    ("reading", "code", "param"),
    [
        (Scoring(num_top=21), "integer_above_max_value", "logprobs"),
        (Scoring(num_top=-1), "integer_below_min_value", "logprobs"),
        (Embedding(dimensions=0), "integer_below_min_value", "dimensions"),
        (Embedding(dimensions=65), "integer_above_max_value", "dimensions"),
    ],
)
def test_what_cannot_be_read_is_refused(
    engine: Engine, reading: Scoring | Embedding, code: str, param: str
) -> None:
    asked = Prompt(key="a", token_ids=(5, 6), sampling=Sampling(max_tokens=0), reading=reading)
    with pytest.raises(PromptError) as refusal:
        engine.submit(asked)
    assert (refusal.value.code, refusal.value.param) == (code, param)


def test_a_model_whose_logits_cannot_be_made_in_parts_scores_no_prompts(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = transformers.LlamaForCausalLM.forward

    def normed(*arguments: Any, **options: Any) -> Any:
        answer = forward(*arguments, **options)
        answer.logits = answer.logits.log_softmax(dim=-1)
        return answer

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", normed)
    plain, scored, *_, embedded = prompts()[:4]
    budgets = Budgets(gpu_bytes=0, host_bytes=GIB, disk_bytes=GIB, spill_dir=tmp_path)
    with Engine.load(llama, budgets=budgets, policy=streaming(1.0)) as engine:
        with pytest.raises(PromptError, match="log_softmax") as refusal:
            engine.submit(scored)
        assert refusal.value.param == "model"
        found = {each.key: each for each in engine.generate([plain, embedded])}
    assert found.keys() == {plain.key, embedded.key}


@pytest.mark.parametrize("num_top", [0, 5])
def test_scores_by_tiles_are_those_of_all_logits_at_once(num_top: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 4 * torch.randn(7, 3000, generator=generator)
    logits[2, 500:1500] = 3.0  # equals, in several tiles
    logits[4, :1024] = -torch.inf
    token_ids = [0, 2999, 700, 1024, 2000, 1023, 5]
    running = RunningScores(torch.zeros(7, 4), token_ids, num_top=num_top)
    for first in range(0, 3000, 1024):
        for rows in (slice(0, 3), slice(3, 7)):
            running.add(rows, logits[rows, first : first + 1024].clone(), first_id=first)
    expected = score(logits, torch.tensor(token_ids), num_top=num_top)
    torch.testing.assert_close(running.table(), expected, atol=1e-6, rtol=0)
