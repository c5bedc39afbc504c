import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers

from engine.compute import packing
from engine.config import Budgets, Completion, FinishReason, Prompt, Sampling
from engine.engine import Engine
from engine.errors import BudgetError, CheckpointError, EngineError, PromptError
from engine.memory.manifest import open_pack
from engine.memory.pack_plan import PackPlan
from engine.memory.retention import prune_packs
from engine.timeline import Event, Timeline, Track
from tests.support.policies import streaming
from tests.support.tiny_models import VOCAB_SIZE, write_tiny_model, write_tiny_tokenizer

EOS: Final = 1
CONTEXT: Final = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(write_tiny_model(tmp_path_factory.mktemp("engine"), "llama"))


def budgets_of(folder: Path, **changes: Any) -> Budgets:
    plenty = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=folder / "spill")
    return dataclasses.replace(plenty, **changes)


def load(folder: Path, *, resident: float = 0.5, **changes: Any) -> Engine:
    return Engine.load(folder, budgets=budgets_of(folder), policy=streaming(resident, **changes))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Engine]:
    """For tests that leave it without rows and look at no counters."""
    with load(folder) as engine:
        yield engine


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine


def prompt_of(
    key: str = "a", *, seed: int = 0, num_tokens: int = 6, max_tokens: int = 8, **settings: Any
) -> Prompt:
    token_ids = tuple(2 + (37 * seed + 11 * at) % (VOCAB_SIZE - 2) for at in range(num_tokens))
    sampling = Sampling(max_tokens=max_tokens, **({"ignore_eos": True} | settings))
    return Prompt(key=key, token_ids=token_ids, sampling=sampling)


def run(engine: Engine, *prompts: Prompt) -> dict[str, Completion]:
    completions = {completion.key: completion for completion in engine.generate(prompts)}
    assert completions.keys() == {prompt.key for prompt in prompts}
    assert engine.num_rows == 0
    return completions


def text_of(engine: Engine, prompt: Prompt) -> str:
    return run(engine, prompt)[prompt.key].text


# -- refusals ----------------------------------------------------------------------------------

REFUSED: Final = {
    "empty": (prompt_of(num_tokens=0), "invalid_value", "prompt", r"empty"),
    "as_long_as_the_context": (
        prompt_of(num_tokens=CONTEXT),
        "context_length_exceeded",
        "prompt",
        r"is 512 tokens.* 520 were asked for \(512 in the prompt",
    ),
    "beyond_the_vocabulary": (
        dataclasses.replace(prompt_of(), token_ids=(5, 256)),
        "invalid_value",
        "prompt",
        r"id 256 is not in the vocabulary of 256",
    ),
    "negative": (
        dataclasses.replace(prompt_of(), token_ids=(5, -1, 7)),
        "invalid_value",
        "prompt",
        r"id -1 is not",
    ),
    "fewer_tokens_than_none": (
        prompt_of(max_tokens=-1),
        "integer_below_min_value",
        "max_tokens",
        r"Expected a value >= 0, but got -1",
    ),
    "hot_as_the_sun": (
        prompt_of(temperature=math.inf),
        "invalid_value",
        "temperature",
        r"finite number, but got inf",
    ),
    "colder_than_cold": (
        prompt_of(temperature=-0.5),
        "decimal_below_min_value",
        "temperature",
        r">= 0, but got -0.5",
    ),
    "more_than_everything": (
        prompt_of(top_p=1.5),
        "decimal_above_max_value",
        "top_p",
        r"<= 1, but got 1.5",
    ),
    "not_a_number": (prompt_of(min_p=math.nan), "invalid_value", "min_p", r"finite .* nan"),
    "too_few_of_the_likeliest": (
        prompt_of(top_k=-1),
        "integer_below_min_value",
        "top_k",
        r">= 0, but got -1",
    ),
    "too_much_presence": (
        prompt_of(presence_penalty=2.5),
        "decimal_above_max_value",
        "presence_penalty",
        r"<= 2, but got 2.5",
    ),
    "too_little_frequency": (
        prompt_of(frequency_penalty=-3.0),
        "decimal_below_min_value",
        "frequency_penalty",
        r">= -2, but got -3.0",
    ),
    "repetition_forbidden_by_a_zero": (
        prompt_of(repetition_penalty=0.0),
        "decimal_below_min_value",
        "repetition_penalty",
        r">= 0.01, but got 0.0",
    ),
    "a_bias_beyond_a_ban": (
        prompt_of(logit_bias=((5, 1.0), (6, -101.0))),
        "decimal_below_min_value",
        "logit_bias",
        r">= -100, but got -101.0",
    ),
    "a_bias_for_no_token": (
        prompt_of(logit_bias=((256, 1.0),)),
        "invalid_value",
        "logit_bias",
        r"id 256 is not in the vocabulary of 256",
    ),
    "a_stop_token_that_is_none": (
        prompt_of(stop_token_ids=(5, -1)),
        "invalid_value",
        "stop_token_ids",
        r"id -1 is not",
    ),
    "an_empty_stop_string": (prompt_of(stop=("a", "")), "invalid_value", "stop", r"empty"),
    "nothing_to_say_before_the_end": (
        prompt_of(min_tokens=2, ignore_eos=False, stop_token_ids=(0, *range(2, 256))),
        "invalid_value",
        "stop_token_ids",
        r"'min_tokens' 2 .* 256 of 256",
    ),
    "longer_than_it_may_be": (
        prompt_of(min_tokens=9),
        "integer_above_max_value",
        "min_tokens",
        r"<= 8, but got 9",
    ),
    "no_completions": (prompt_of(n=0), "integer_below_min_value", "n", r">= 1, but got 0"),
    "a_crowd": (prompt_of(n=129), "integer_above_max_value", "n", r"<= 128, but got 129"),
    "too_many_logprobs": (
        prompt_of(logprobs=21),
        "integer_above_max_value",
        "top_logprobs",
        r"<= 20, but got 21",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_prompt_that_cannot_run_is_refused_with_its_numbers_and_leaves_no_row(
    shared: Engine, case: tuple[Prompt, str, str, str]
) -> None:
    prompt, code, param, message = case
    for refuse in (shared.check, shared.submit):
        with pytest.raises(PromptError, match=message) as refusal:
            refuse(prompt)
        assert (refusal.value.code, refusal.value.param) == (code, param)
    assert shared.num_rows == 0


def test_a_prompt_that_leaves_room_for_one_token_gets_one(shared: Engine) -> None:
    with pytest.raises(PromptError, match=r"513 were asked for \(511 in the prompt, 2 in"):
        shared.check(prompt_of(num_tokens=CONTEXT - 1, max_tokens=2))
    found = run(shared, prompt_of(num_tokens=CONTEXT - 1, max_tokens=1))["a"]
    assert (found.num_prompt_tokens, found.num_generated) == (CONTEXT - 1, 1)
    assert found.finish_reason is FinishReason.LENGTH


def test_a_cache_smaller_than_the_context_is_what_limits_a_row(folder: Path) -> None:
    with load(folder, kv_bytes=256 * 2 * 2 * 16 * 4 * 4) as engine:
        assert engine.max_context_tokens == 256
        with pytest.raises(PromptError, match="is 256 tokens"):
            engine.check(prompt_of(num_tokens=250, max_tokens=7))
        assert run(engine, prompt_of(num_tokens=250, max_tokens=6))["a"].num_generated == 6


def test_a_resident_tensor_that_was_damaged_on_disk_is_packed_anew(
    folder: Path, shared: Engine, tmp_path: Path
) -> None:
    expected = run(shared, prompt_of())
    budgets = budgets_of(folder, spill_dir=tmp_path)
    Engine.load(folder, budgets=budgets, policy=streaming(1.0)).close()
    damage_last_byte_but(next(tmp_path.glob("packs/*/weights.bin")), 5000)
    with Engine.load(folder, budgets=budgets, policy=streaming(1.0)) as engine:
        assert run(engine, prompt_of()) == expected


def test_rows_of_the_embedding_that_were_damaged_in_the_source_are_refused_where_they_are_read(
    tmp_path: Path,
) -> None:
    folder = write_tiny_tokenizer(write_tiny_model(tmp_path, "llama"))
    load = functools.partial(
        Engine.load, folder, budgets=budgets_of(folder), policy=streaming(1.0, embedding=0.0)
    )
    with load() as engine:
        expected = run(engine, prompt_of())
    path = folder / "model.safetensors"
    whole, dates = path.read_bytes(), path.stat()
    [start] = [
        group.offset_bytes + tensor.offset_bytes
        for group in open_pack(next(tmp_path.glob("spill/packs/*/"))).groups
        for tensor in group.tensors
        if group.path == path and "embed_tokens" in tensor.name
    ]
    damage_last_byte_but(path, len(whole) - start - 100)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    with load() as engine:
        engine.submit(prompt_of())
        with pytest.raises(CheckpointError, match=r"is damaged: .*embed_tokens.* first read"):
            engine.sweep()
    path.write_bytes(whole)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    with load() as engine:
        assert run(engine, prompt_of()) == expected


def test_a_streamed_layer_that_was_damaged_on_disk_is_noticed_and_packed_anew_at_the_next_start(
    tmp_path: Path,
) -> None:
    folder = write_tiny_tokenizer(write_tiny_model(tmp_path, "mixtral"))
    budgets = budgets_of(folder)
    with Engine.load(folder, budgets=budgets, policy=streaming(0.0)) as engine:
        expected = run(engine, prompt_of())
    [path] = tmp_path.glob("spill/packs/*/weights.bin")
    damage_last_byte_but(path, path.stat().st_size // 2)
    with (
        pytest.raises(EngineError, match=r"is damaged: .* it will be written anew"),
        Engine.load(folder, budgets=budgets, policy=streaming(0.0)) as engine,
    ):
        run(engine, prompt_of())
    with Engine.load(folder, budgets=budgets, policy=streaming(0.0)) as engine:
        assert run(engine, prompt_of()) == expected


def test_a_layer_that_was_damaged_in_the_source_is_refused_until_it_is_restored(
    tmp_path: Path,
) -> None:
    folder = write_tiny_tokenizer(write_tiny_model(tmp_path, "llama"))
    budgets = budgets_of(folder)
    with Engine.load(folder, budgets=budgets, policy=streaming(0.5)) as engine:
        expected = run(engine, prompt_of())
    path = folder / "model.safetensors"
    whole, dates = path.read_bytes(), path.stat()
    damage_last_byte_but(path, path.stat().st_size // 2)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    for _start in range(2):
        with (
            pytest.raises(EngineError, match=r"model\.safetensors is damaged: .* first read"),
            Engine.load(folder, budgets=budgets, policy=streaming(0.5)) as engine,
        ):
            run(engine, prompt_of())
    path.write_bytes(whole)
    os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    with Engine.load(folder, budgets=budgets, policy=streaming(0.5)) as engine:
        assert run(engine, prompt_of()) == expected


def test_layers_read_in_the_source_need_no_room_of_the_disk_budget(folder: Path) -> None:
    told: list[PackPlan] = []
    with Engine.load(
        folder,
        budgets=budgets_of(folder, disk_bytes=100_000, spill_dir=folder / "small"),
        policy=streaming(0.0),
        announce=told.append,
    ) as engine:
        run(engine, prompt_of())
    assert 0 < told[0].to_write_bytes < 100_000 < told[0].in_place_bytes


def test_an_engine_at_work_keeps_its_pack(folder: Path, tmp_path: Path) -> None:
    budgets = budgets_of(folder, spill_dir=tmp_path)
    with Engine.load(folder, budgets=budgets, policy=streaming(0.5)):
        assert prune_packs(tmp_path, ()) == 0
    assert prune_packs(tmp_path, ()) > 0


def damage_last_byte_but(path: Path, num_bytes: int) -> None:
    content = bytearray(path.read_bytes())
    content[-num_bytes] ^= 1
    path.write_bytes(content)


def test_a_policy_that_is_over_budget_writes_no_pack(folder: Path, tmp_path: Path) -> None:
    budgets = budgets_of(folder, host_bytes=100_000, spill_dir=tmp_path)
    with pytest.raises(BudgetError):
        Engine.load(folder, budgets=budgets, policy=streaming(1.0))
    assert not list(tmp_path.glob("packs/*/weights.bin"))


def test_a_policy_over_the_budget_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(BudgetError, match=r"cpu tier needs [\d,]+ bytes .* is 100,000 bytes"):
        Engine.load(folder, budgets=budgets_of(folder, host_bytes=100_000), policy=streaming(1.0))


def test_too_little_room_for_keys_and_values_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(BudgetError, match=r"keys and values 1,000 bytes .* needs 16,384"):
        load(folder, kv_bytes=1000)


# -- how rows end ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 17])
def test_a_row_ends_by_length_at_exactly_max_tokens(shared: Engine, max_tokens: int) -> None:
    found = run(shared, prompt_of(max_tokens=max_tokens))["a"]
    assert len(found.token_ids) == found.num_generated == max_tokens
    assert found.finish_reason is FinishReason.LENGTH


def test_a_row_ends_at_an_end_token_which_is_counted_and_not_given_back(shared: Engine) -> None:
    prompts = [
        prompt_of(str(seed), seed=seed, max_tokens=60, temperature=4.0) for seed in range(12)
    ]
    ignoring = run(shared, *prompts)
    ended = [key for key, found in ignoring.items() if EOS in found.token_ids]
    assert ended, "none of the prompts reaches the end token: choose others"
    heeding = [
        dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, ignore_eos=False))
        for each in prompts
    ]
    for key, found in run(shared, *heeding).items():
        whole = ignoring[key].token_ids
        if key in ended:
            whole = whole[: whole.index(EOS)]
            assert found.num_generated == len(whole) + 1
            assert found.finish_reason is FinishReason.STOP
        else:
            assert found.finish_reason is FinishReason.LENGTH
        assert found.token_ids == whole
        assert found.text == shared.tokenizer.decode(whole)


def legible(text: str, num_characters: int) -> str:
    """The first run of characters that are whole and do not begin the text."""
    starts = range(2, len(text) - num_characters)
    words = (text[start : start + num_characters] for start in starts)
    return next(word for word in words if "\ufffd" not in word)


@pytest.mark.parametrize("num_characters", [1, 2, 5])
def test_a_stop_string_ends_the_row_and_the_text_stops_before_it(
    shared: Engine, num_characters: int
) -> None:
    plain = prompt_of(seed=9, max_tokens=60)
    whole = run(shared, plain)["a"]
    word = legible(whole.text, num_characters)
    found = run(shared, prompt_of(seed=9, max_tokens=60, stop=("never there", word)))["a"]
    assert found.finish_reason is FinishReason.STOP
    assert found.text == whole.text[: whole.text.index(word)]
    assert found.token_ids == whole.token_ids[: found.num_generated]
    assert word in shared.tokenizer.decode(found.token_ids)
    assert word not in shared.tokenizer.decode(found.token_ids[:-1])


def test_a_character_of_several_tokens_is_a_stop_string_too(shared: Engine) -> None:
    hot: dict[str, Any] = {"seed": 4, "max_tokens": 60, "temperature": 4.0}
    prompt = prompt_of(**hot)
    text = text_of(shared, prompt)
    letter = next(each for each in text if ord(each) > 127 and each != "\ufffd")
    assert len(shared.tokenizer.encode(letter)) > 1
    stopped = prompt_of(**hot, stop=(letter,))
    assert text_of(shared, stopped) == text[: text.index(letter)]


def test_the_earliest_of_several_stop_strings_cuts_the_text(shared: Engine) -> None:
    text = text_of(shared, prompt_of(seed=9, max_tokens=60))
    late, early = legible(text, 9), legible(text, 2)
    stopped = prompt_of(seed=9, max_tokens=60, stop=(late, early))
    assert text_of(shared, stopped) == text[: text.index(early)]


@pytest.mark.parametrize("min_tokens", [0, 1, 7, 30])
def test_a_stop_string_that_was_whole_before_min_tokens_is_only_text(
    shared: Engine, min_tokens: int
) -> None:
    whole = run(shared, prompt_of(seed=9, max_tokens=60))["a"]
    word = legible(whole.text, 2)
    stopped = prompt_of(seed=9, max_tokens=60, stop=(word,), min_tokens=min_tokens)
    found = run(shared, stopped)["a"]
    texts = [shared.tokenizer.decode(whole.token_ids[:count]) for count in range(61)]
    ends = [count for count in range(1, 61) if texts[count].endswith(word)]
    assert ends[0] < 30 < ends[-1], "the word comes too seldom to tell"
    end = next(count for count in ends if count >= min_tokens)
    assert (found.num_generated, found.finish_reason) == (end, FinishReason.STOP)
    assert found.text == texts[end].removesuffix(word)


def test_a_row_that_ends_by_length_keeps_its_text(shared: Engine) -> None:
    found = run(shared, prompt_of(seed=9, max_tokens=9, stop=("never there",)))["a"]
    assert found.finish_reason is FinishReason.LENGTH
    assert found.text == shared.tokenizer.decode(found.token_ids)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_stop_token_ends_the_row_and_is_not_given_back(
    shared: Engine, *, ignore_eos: bool
) -> None:
    whole = run(shared, prompt_of(seed=9, max_tokens=30))["a"]
    stop_token = whole.token_ids[12]
    at = whole.token_ids.index(stop_token)
    asked: dict[str, Any] = {"seed": 9, "max_tokens": 30, "ignore_eos": ignore_eos, "logprobs": 1}
    found = run(shared, prompt_of(**asked, stop_token_ids=(stop_token,)))["a"]
    assert found.finish_reason is FinishReason.STOP
    assert found.token_ids == whole.token_ids[:at]
    assert found.text == shared.tokenizer.decode(whole.token_ids[:at])
    assert found.num_generated == at + 1
    assert found.logprobs is not None
    assert tuple(each.token_id for each in found.logprobs) == found.token_ids


def test_a_stop_token_is_not_sampled_before_min_tokens(shared: Engine) -> None:
    whole = run(shared, prompt_of(seed=9, max_tokens=30))["a"]
    asked: dict[str, Any] = {"seed": 9, "max_tokens": 30, "stop_token_ids": whole.token_ids[:1]}
    assert run(shared, prompt_of(**asked))["a"].num_generated == 1
    found = run(shared, prompt_of(**asked, min_tokens=5))["a"]
    assert found.num_generated > 5
    assert whole.token_ids[0] not in found.token_ids


# -- how likely tokens were --------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_the_librarys_own_for_each_token_given_back(
    folder: Path, shared: Engine, temperature: float
) -> None:
    prompt = prompt_of(seed=3, max_tokens=12, temperature=temperature, logprobs=3, min_p=0.01)
    plain = dataclasses.replace(
        prompt, sampling=dataclasses.replace(prompt.sampling, logprobs=None)
    )
    found = run(shared, prompt)["a"]
    assert dataclasses.replace(found, logprobs=None) == run(shared, plain)["a"]
    assert found.logprobs is not None
    assert tuple(each.token_id for each in found.logprobs) == found.token_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt.token_ids, *found.token_ids]])).logits[0]
    expected = logits[len(prompt.token_ids) - 1 : -1].log_softmax(dim=-1)
    for each, row in zip(found.logprobs, expected, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
        values, tokens = row.topk(3)
        assert [token for token, _ in each.top] == tokens.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_preempted_rows_logprobs_stay_with_their_tokens(folder: Path, shared: Engine) -> None:
    prompts = [
        prompt_of(str(seed), seed=seed, num_tokens=30, max_tokens=99, logprobs=2)
        for seed in range(4)
    ]
    token_bytes = 4 * 2 * 2 * 16 * 4
    with load(folder, kv_bytes=256 * token_bytes) as tight:
        found = run(tight, *prompts)
        assert tight.report().preempted_rows > 0
    for key, expected in run(shared, *prompts).items():
        assert found[key].token_ids == expected.token_ids
        assert values_of(found[key]) == pytest.approx(values_of(expected), abs=1e-4)


def values_of(completion: Completion) -> list[float]:
    assert completion.logprobs is not None
    assert tuple(each.token_id for each in completion.logprobs) == completion.token_ids
    return [value for each in completion.logprobs for value in (each.logprob, each.top[1][1])]


# -- several completions of one prompt ---------------------------------------------------------


def test_each_completion_of_a_prompt_is_its_own_and_the_first_is_the_only_ones(
    shared: Engine,
) -> None:
    hot: dict[str, Any] = {"seed": 2, "max_tokens": 9, "temperature": 2.0}
    prompts = [prompt_of("several", **hot, n=5), prompt_of("other", seed=1, max_tokens=3)]
    completions = list(shared.generate(prompts))
    found = {
        each.index: dataclasses.replace(each, key="one", index=0)
        for each in completions
        if each.key == "several"
    }
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert len(completions) == 6
    assert len({each.token_ids for each in found.values()}) == 5
    assert found[0] == run(shared, prompt_of("one", **hot))["one"]


def test_more_completions_than_the_block_has_places_wait_for_their_turn(engine: Engine) -> None:
    num = 3 * engine.block_rows + 1
    prompt = prompt_of(n=num, temperature=1.0, max_tokens=3)
    completions = list(engine.generate([prompt, prompt_of("b", max_tokens=2)]))
    assert sorted((each.key, each.index) for each in completions) == [
        *(("a", index) for index in range(num)),
        ("b", 0),
    ]
    assert engine.report().peak_rows == engine.block_rows
    assert engine.num_rows == 0


@pytest.mark.parametrize("num_sweeps", [0, 1])
def test_cancelling_a_prompt_drops_all_of_its_rows(shared: Engine, num_sweeps: int) -> None:
    num = shared.block_rows + 2  # some run, some wait
    shared.submit(prompt_of("a", n=num, max_tokens=4))
    shared.submit(prompt_of("b", max_tokens=1))
    for _ in range(num_sweeps):
        shared.sweep()
    assert shared.num_rows == num + 1
    shared.cancel("a")
    assert shared.num_rows == 1
    assert [each.key for each in shared.sweep()] == ["b"]
    assert shared.num_rows == 0


# -- company -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_rows_result_does_not_depend_on_its_neighbours(
    shared: Engine, temperature: float
) -> None:
    prompts = [
        prompt_of(
            str(seed),
            seed=seed,
            num_tokens=1 + 17 * seed % 90,
            max_tokens=5 + 3 * seed,
            temperature=temperature,
            top_p=0.9,
        )
        for seed in range(12)
    ]
    together = run(shared, *prompts)
    for prompt in prompts[::3]:
        assert run(shared, prompt)[prompt.key] == together[prompt.key]
    assert run(shared, *reversed(prompts)) == together


def test_placement_and_block_shape_change_no_row(folder: Path, shared: Engine) -> None:
    prompts = [prompt_of(str(seed), seed=seed, num_tokens=30, max_tokens=99) for seed in range(4)]
    expected = run(shared, *prompts)
    token_bytes = 4 * 2 * 2 * 16 * 4
    tight = {"kv_bytes": 256 * token_bytes, "sweep_tokens": 7, "micro_batch_tokens": 5}
    with load(folder, resident=0.0, **tight) as streamed:
        assert run(streamed, *prompts) == expected
        assert streamed.report().preempted_rows > 0


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0), (2, 3, 0, 1)])
def test_a_row_cancelled_waiting_or_running_never_completes_and_its_place_is_free(
    shared: Engine, order: tuple[int, ...]
) -> None:
    for key in range(4):
        shared.submit(prompt_of(str(key), seed=key, max_tokens=4))
    shared.cancel(str(order[0]))  # waiting
    assert shared.sweep() == []
    shared.cancel(str(order[1]))  # running
    shared.cancel("unknown")
    assert shared.num_rows == 2
    completions = [completion.key for _ in range(3) for completion in shared.sweep()]
    assert sorted(completions) == sorted(str(key) for key in order[2:])
    assert shared.num_rows == 0


def test_a_sweep_without_rows_does_nothing(engine: Engine) -> None:
    assert engine.sweep() == []
    assert engine.report().num_sweeps == 0


def test_generate_draws_prompts_only_as_the_block_has_room(shared: Engine) -> None:
    drawn = 0

    def prompts() -> Iterator[Prompt]:
        nonlocal drawn
        for number in range(40):
            drawn += 1
            yield prompt_of(str(number), seed=number, max_tokens=2)

    completions = shared.generate(prompts())
    assert drawn == 0
    for finished in range(1, 41):
        next(completions)
        assert drawn <= finished + 3 * shared.block_rows
    assert next(completions, None) is None
    assert drawn == 40


def test_generate_without_prompts_ends_at_once(shared: Engine) -> None:
    assert list(shared.generate([])) == []


# -- counting and closing ----------------------------------------------------------------------


def test_the_reports_counters_add_up(engine: Engine) -> None:
    prompts = [
        prompt_of(str(seed), seed=seed, num_tokens=num_tokens, max_tokens=1 + seed)
        for seed, num_tokens in enumerate([3, 4, 5, 6, 7, 8, 9, 10, 1, 150, 40])
    ]
    completions = run(engine, *prompts).values()
    report = engine.report()
    assert report.prompt_tokens == sum(each.num_prompt_tokens for each in completions)
    assert report.generated_tokens == sum(each.num_generated for each in completions)
    assert report.completions == len(prompts)
    assert report.peak_rows == engine.block_rows
    assert report.preempted_rows == 0
    assert report.weights_streamed_bytes >= report.num_sweeps * engine.policy.streamed_bytes > 0
    assert report.policy_reason == engine.policy.reason
    assert sum(report.sweeps_by_rows.values()) == report.num_sweeps
    assert report.generated_tokens / report.num_sweeps < report.mean_rows < engine.block_rows


def test_a_report_is_of_its_moment(engine: Engine) -> None:
    before = engine.report()
    run(engine, prompt_of())
    assert (before.num_sweeps, engine.report().num_sweeps) == (0, 8)


def test_after_a_sweep_that_raised_the_rows_go_on_as_if_it_had_not_been(
    folder: Path, shared: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_of(str(seed), seed=seed, max_tokens=9) for seed in range(3)]
    expected = run(shared, *prompts)
    write_and_attend = packing.write_and_attend
    calls = itertools.count()

    def raising(*arguments: Any, **options: Any) -> Any:
        # Inside the first, a middle and the last layer of a sweep, and in the one right after.
        if next(calls) in {0, 7, 8, 20, 31}:
            raise RuntimeError("out of luck")
        return write_and_attend(*arguments, **options)

    monkeypatch.setattr("engine.compute.routes.write_and_attend", raising)
    found: dict[str, Completion] = {}
    num_raised = 0
    with load(folder, resident=0.0) as engine:
        for prompt in prompts:
            engine.submit(prompt)
        while engine.num_rows:
            try:
                found |= {completion.key: completion for completion in engine.sweep()}
            except RuntimeError:
                num_raised += 1
    assert num_raised == 5
    assert found == expected


def test_who_is_interrupted_does_not_wait_for_the_rest_of_a_sweeps_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(num_tokens=20)
    write_and_attend = packing.write_and_attend
    calls = itertools.count()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return write_and_attend(*arguments, **options)

    with load(folder, resident=0.0) as engine:
        expected = run(engine, prompt)
        before = engine.report()
        monkeypatch.setattr("engine.compute.routes.write_and_attend", interrupted)
        engine.submit(prompt)
        with pytest.raises(KeyboardInterrupt):
            engine.sweep()
        streamed_bytes = engine.report().since(before).weights_streamed_bytes
        layers = engine.policy.layer_splits
        assert streamed_bytes == sum(split.disk_bytes for split in layers[:2])
        assert {done.key: done for done in engine.generate([])} == expected


@pytest.mark.parametrize("at", ["unused", "in the middle", "twice"])
def test_leaving_the_engine_ends_its_threads(folder: Path, at: str) -> None:
    def ours() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name.startswith("freight")}

    before = ours()
    with load(folder, resident=0.0) as engine:
        assert ours() > before
        if at == "in the middle":
            engine.submit(prompt_of())
            engine.sweep()
        elif at == "twice":
            engine.close()
    assert ours() == before


def test_a_closed_engine_says_so_and_does_not_hang(folder: Path) -> None:
    with load(folder, resident=0.0) as engine:
        engine.submit(prompt_of())
        engine.sweep()
    with pytest.raises(EngineError, match="closed"):
        engine.sweep()


def test_another_thread_can_tell_a_long_sweep_from_one_that_stands_still(folder: Path) -> None:
    class Watcher:
        """Asks as each layer of a micro-batch ends."""

        def span(self, event: Event) -> None:
            if event.track is Track.LAYERS:
                seen.append(engine.num_steps)

        def count(self, name: str, value: int, *, at_s: float) -> None:
            del name, value, at_s

        def flush(self) -> None:
            return

        def close(self) -> None:
            return

    seen: list[int] = []
    policy = streaming(0.5, micro_batch_tokens=4)
    engine = Engine.load(
        folder, budgets=budgets_of(folder), policy=policy, timeline=Timeline(sink=Watcher())
    )
    with engine:
        engine.submit(prompt_of(num_tokens=4, max_tokens=1))
        engine.submit(prompt_of("b", num_tokens=4, max_tokens=1))
        engine.sweep()
    assert len(seen) == 8
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
