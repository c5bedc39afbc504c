import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest

from bench.schemas import SCHEMAS
from engine.config import Budgets, Completion, FinishReason, Grammar, GrammarKind, Prompt, Sampling
from engine.engine import Engine
from engine.errors import GrammarError, PromptError
from engine.grammar import check_grammar
from tests.support.policies import streaming
from tests.support.tiny_models import write_tiny_model, write_tiny_tokenizer

MAX_TOKENS: Final = 150


def budgets_of(folder: Path) -> Budgets:
    return Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=folder / "spill")


def schema_grammar(schema: Mapping[str, Any]) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("grammar"), "llama")
    return write_tiny_tokenizer(folder, without="\u00b8\u00b9")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, budgets=budgets_of(folder), policy=streaming(1.0)) as engine:
        yield engine


def prompt_of(key: str, grammar: Grammar | None, **settings: Any) -> Prompt:
    asked = Sampling(max_tokens=MAX_TOKENS, temperature=1.0, seed=5, grammar=grammar)
    return Prompt(
        key=key,
        token_ids=tuple(f"Answer as {key}: ".encode()),
        sampling=dataclasses.replace(asked, **settings),
    )


def require_fit(completion: Completion, schema: Mapping[str, Any]) -> None:
    assert completion.finish_reason is FinishReason.STOP, completion.text
    jsonschema.validate(json.loads(completion.text), schema)


def by_key(completions: Iterator[Completion]) -> dict[tuple[str, int], Completion]:
    return {(each.key, each.index): each for each in completions}


def test_a_model_that_says_anything_says_what_fits_its_schema(engine: Engine) -> None:
    prompts = [
        prompt_of(name, schema_grammar(schema), temperature=1.5, n=2)
        for name, schema in SCHEMAS.items()
    ]
    found = by_key(engine.generate(prompts))
    assert len(found) == 2 * len(SCHEMAS)
    for (name, _), completion in found.items():
        require_fit(completion, SCHEMAS[name])


def test_a_real_model_fits_every_schema(tmp_path: Path, demo_model: Path) -> None:
    budgets = Budgets(gpu_bytes=0, host_bytes=2 * 10**9, disk_bytes=10**9, spill_dir=tmp_path)
    policy = streaming(1.0, block_rows=16)
    with Engine.load(demo_model, budgets=budgets, policy=policy) as engine:
        text = "<|im_start|>user\nGive an example.<|im_end|>\n<|im_start|>assistant\n"
        token_ids = tuple(engine.tokenizer.encode(text))
        prompts = [
            dataclasses.replace(prompt_of(name, schema_grammar(schema)), token_ids=token_ids)
            for name, schema in SCHEMAS.items()
        ]
        found = by_key(engine.generate(prompts))
    assert len(found) == len(SCHEMAS)
    for (name, _), completion in found.items():
        require_fit(completion, SCHEMAS[name])


def test_an_object_of_any_kind_is_an_object(engine: Engine) -> None:
    grammar = schema_grammar({"type": "object"})
    found = by_key(engine.generate([prompt_of("object", grammar, n=16)]))
    whole = [each for each in found.values() if each.finish_reason is FinishReason.STOP]
    assert whole
    assert all(isinstance(json.loads(each.text), dict) for each in whole)
    cut = [each for each in found.values() if each not in whole]
    assert all(each.finish_reason is FinishReason.LENGTH for each in cut)
    assert all(each.text.startswith("{") for each in found.values())


def test_a_constrained_row_is_the_same_in_any_company_and_after_preemption(folder: Path) -> None:
    rows = [prompt_of(name, schema_grammar(schema)) for name, schema in SCHEMAS.items()]
    others = [prompt_of(f"free {index}", None, max_tokens=40) for index in range(6)]
    budgets = budgets_of(folder)
    with Engine.load(folder, budgets=budgets, policy=streaming(1.0)) as engine:
        alone = [next(iter(engine.generate([row]))) for row in rows]
    few = streaming(1.0, kv_bytes=2 * 192 * 2 * 4 * 2 * 16 * 4)
    with Engine.load(folder, budgets=budgets, policy=few) as engine:
        together = by_key(engine.generate([*others, *rows]))
        assert engine.report().preempted_rows
    for row, expected in zip(rows, alone, strict=True):
        found = together[row.key, 0]
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)


def test_logprobs_are_the_models_own_whatever_the_grammar_allows(engine: Engine) -> None:
    bound = prompt_of("x", schema_grammar(SCHEMAS["pattern"]), temperature=0.0, logprobs=2)
    free = prompt_of("x", None, temperature=0.0, logprobs=2, max_tokens=1)
    (held,) = engine.generate([bound])
    (loose,) = engine.generate([free])
    assert held.logprobs is not None
    assert loose.logprobs is not None
    assert held.logprobs[0].top == loose.logprobs[0].top
    assert held.token_ids[0] != loose.token_ids[0]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "nope"}, "nope"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(
    engine: Engine, schema: Mapping[str, Any], reason: str
) -> None:
    grammar = schema_grammar(schema)
    with pytest.raises(GrammarError, match=reason):
        check_grammar(grammar)
    with pytest.raises(PromptError, match=reason) as refusal:
        engine.check(prompt_of("x", grammar))
    assert refusal.value.param == "response_format"


def test_a_schema_too_deep_to_read_is_refused() -> None:
    text = '{"items":' * 5000 + "{}" + "}" * 5000
    with pytest.raises(GrammarError):
        check_grammar(Grammar(kind=GrammarKind.JSON_SCHEMA, text=text))


@pytest.mark.parametrize("settings", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_what_forbids_an_end_does_not_go_with_a_grammar(
    engine: Engine, settings: dict[str, Any]
) -> None:
    with pytest.raises(PromptError, match="ends where it is whole"):
        engine.check(prompt_of("x", schema_grammar(SCHEMAS["flat"]), **settings))


def test_a_checkpoint_without_a_tokenizer_has_no_grammars(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    with (
        Engine.load(folder, budgets=budgets_of(folder), policy=streaming(1.0)) as engine,
        pytest.raises(PromptError, match="no tokenizer"),
    ):
        engine.check(prompt_of("x", schema_grammar(SCHEMAS["flat"])))


def test_a_grammar_that_the_tokens_cannot_follow_fails_its_row_alone(engine: Engine) -> None:
    unsayable = Grammar(kind=GrammarKind.LARK, text='start: "a\u00b8"\n')
    held = prompt_of("bad", unsayable)
    good = prompt_of("good", schema_grammar(SCHEMAS["flat"]))
    found = by_key(engine.generate([held, good]))
    assert found["bad", 0].finish_reason is FinishReason.FAULT
    require_fit(found["good", 0], SCHEMAS["flat"])
