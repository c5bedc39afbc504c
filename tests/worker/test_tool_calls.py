"""Calls of functions: each family's grammar makes what its reader reads, and readers read real text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import numpy as np
import pytest

from bench.schemas import SCHEMAS
from engine.config import Budgets, FinishReason, Grammar, GrammarKind, Prompt, Sampling
from engine.engine import Engine
from engine.grammar import Grammars
from engine.tokenizer import Tokenizer
from jobs.batch import Endpoint
from jobs.bodies import parse_body
from jobs.errors import InvalidRequestError
from jobs.tools import ToolUse
from tests.support.fake_engine import FakeTokenizer
from tests.support.policies import streaming
from tests.support.tiny_models import write_tiny_model, write_tiny_tokenizer
from tests.worker.test_answering import answer, batch_of
from worker.render import Renderer
from worker.tool_calls import FAMILIES
from worker.tool_calls.base import Family, grammar

CHAT: Final = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
BEGIN: Final = "<｜tool▁calls▁begin｜>"  # noqa: RUF001 - the model's own marks
END: Final = "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL: Final = "<｜tool▁call▁begin｜>"  # noqa: RUF001
END_CALL: Final = "<｜tool▁call▁end｜>"  # noqa: RUF001
SEP: Final = "<｜tool▁sep｜>"  # noqa: RUF001
TEMPLATES: Final = {
    "Hermes": "{{ tools }} <tool_call> {{ arguments }}",
    "Llama": "<|python_tag|> {{ tools }}",
    "Mistral": "[AVAILABLE_TOOLS] [TOOL_CALLS]",
    "Mistral named": "[TOOL_CALLS] [ARGS]",
    "DeepSeek": f"{BEGIN} ```json",
    "DeepSeek bare": BEGIN,
}


def tool(name: str, schema: str | None = None, *, strict: bool = False) -> dict[str, Any]:
    function: dict[str, Any] = {"name": name, "strict": strict}
    if schema:
        function["parameters"] = SCHEMAS[schema]
    return {"type": "function", "function": function}


def use_of(**changes: Any) -> ToolUse:
    tools = [tool("book", "flat"), tool("ping", "const"), tool("stop")]
    asked = CHAT | {"tools": tools, "tool_choice": "required"} | changes
    use = parse_body(asked, Endpoint.CHAT_COMPLETIONS).tool_use
    assert use is not None
    return use


def family_of(template: str) -> Family:
    return next(family for family in FAMILIES if family.fits(template))


def no_special(text: str) -> int | None:
    return None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_tiny_model(tmp_path_factory.mktemp("tools"), "llama")
    write_tiny_tokenizer(folder, without="\u00b8\u00b9")
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=folder / "spill")
    with Engine.load(folder, budgets=budgets, policy=streaming(1.0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.load(demo_model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=[2])


@pytest.mark.parametrize("parallel", [True, False])
def test_what_a_model_is_held_to_is_what_is_read(engine: Engine, *, parallel: bool) -> None:
    use = use_of(parallel_tool_calls=parallel)
    prompts = []
    for name, template in TEMPLATES.items():
        form = family_of(template).form(use, template, no_special)
        held = Grammar(kind=GrammarKind.LARK, text=grammar(form, use, no_special))
        sampling = Sampling(max_tokens=200, temperature=1.0, seed=3, n=2, grammar=held)
        prompts.append(Prompt(key=name, token_ids=(40, 41, 42), sampling=sampling))
    whole = 0
    for completion in engine.generate(prompts):
        assert completion.finish_reason is not FinishReason.FAULT
        said = family_of(TEMPLATES[completion.key]).read(completion.text)
        if completion.finish_reason is FinishReason.STOP:
            whole += 1
            assert (said.calls, said.text) != ((), ""), completion.text
            assert said.text == ""
            assert parallel or len(said.calls) == 1
        schemas = {each.name: each.parameters for each in use.callable}
        for call in said.calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert whole >= len(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES.values())
def test_a_mark_that_is_a_token_is_asked_for_as_one(
    template: str, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    start = tokenizer.special_token_id("<|im_start|>")
    assert start is not None
    use, family = use_of(), family_of(template)
    head = family.form(use, template, no_special).head or "none"
    text = grammar(family.form(use, template, {head: start}.get), use, {head: start}.get)
    mask = np.zeros(tokenizer.vocab_size // 32, np.int32)
    matcher = grammars.matcher(Grammar(kind=GrammarKind.LARK, text=text))
    matcher.fill(mask)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert matcher.fault is None
    assert allowed.tolist() == [start] if head != "none" else start not in allowed


@pytest.mark.parametrize("template", TEMPLATES.values())
@pytest.mark.parametrize("special", [True, False])
def test_strict_tools_that_may_be_called_leave_room_for_text(
    template: str, tokenizer: Tokenizer, grammars: Grammars, *, special: bool
) -> None:
    family = family_of(template)
    use = use_of(tools=[tool("stop", strict=True)], tool_choice="auto")
    head = family.form(use, template, no_special).head
    asked = {head: 1}.get if special else no_special
    text = grammar(family.form(use, template, asked), use, asked)

    def follows(*token_ids: int) -> bool:
        matcher = grammars.matcher(Grammar(kind=GrammarKind.LARK, text=text))
        matcher.follow(token_ids)
        return matcher.fault is None

    assert follows(*tokenizer.encode("I would rather talk.\nAbout this."), 2)
    mark = [1] if special and head else tokenizer.encode(head)
    before = tokenizer.encode("Well: ") if head else []
    assert not follows(*before, *mark, *tokenizer.encode('{"name": "other"'))


READ: Final = [
    (
        "Hermes",
        (
            'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "\u00e9"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
        ),
        "Let me see.",
        [("f", {"a": "\u00e9"}), ("g", {})],
    ),
    ("Hermes", "<tool_call>\n{oops\n</tool_call>", "<tool_call>\n{oops\n</tool_call>", []),
    ("Llama", '{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    (
        "Llama",
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}<|eom_id|>',
        "",
        [("f", {}), ("g", {})],
    ),
    ("Llama", '{"a": 1}', '{"a": 1}', []),
    ("Llama", '{"name": "f"} is how', '{"name": "f"} is how', []),
    ("Mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}]', "", [("f", {"a": [1]})]),
    (
        "Mistral",
        'Sure.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}',
        "Sure.",
        [("f", {"a": 1}), ("g", {})],
    ),
    (
        "DeepSeek",
        f'{BEGIN}{CALL}function{SEP}f\n```json\n{{"a": 1}}\n```{END_CALL}{END}',
        "",
        [("f", {"a": 1})],
    ),
    ("DeepSeek", f"Yes{BEGIN}{CALL}f{SEP}{{}}{END_CALL}{END}", "Yes", [("f", {})]),
]


@pytest.mark.parametrize(("name", "text", "rest", "calls"), READ)
def test_real_answers_are_read(
    name: str, text: str, rest: str, calls: list[tuple[str, object]]
) -> None:
    said = family_of(TEMPLATES[name]).read(text)
    assert said.text == rest
    assert [(call.name, json.loads(call.arguments)) for call in said.calls] == calls


def test_templates_of_unknown_forms_have_no_family() -> None:
    for template in ("", "{{ tools }}", "<tool_call><function=f>", "<tool_call>f<arg_key>"):
        assert not any(family.fits(template) for family in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("a")], "tool_choice": "any"}, "tool_choice"),
        (
            {
                "tools": [tool("a")],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tool_choice.function.name",
        ),
        (
            {"tools": [tool("a")], "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_tools_are_refused_for(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body(CHAT | changes, Endpoint.CHAT_COMPLETIONS)
    assert refusal.value.param == param


def test_a_chosen_function_is_the_only_one_and_nothing_chosen_is_none() -> None:
    named = use_of(tool_choice={"type": "function", "function": {"name": "ping"}})
    assert [each.name for each in named.callable] == ["ping"]
    assert len(named.offered) == 3
    assert (named.must_call, named.is_parallel) == (True, False)
    asked = CHAT | {"tools": [tool("a")], "tool_choice": "none"}
    assert parse_body(asked, Endpoint.CHAT_COMPLETIONS).tool_use is None
    assert not use_of(tool_choice="auto").is_constrained
    assert use_of(tool_choice="auto", tools=[tool("a", strict=True)]).is_constrained


def test_tools_are_rendered_and_a_schema_that_cannot_be_kept_is_refused() -> None:
    renderer = Renderer(tokenizer=FakeTokenizer(TEMPLATES["Hermes"]), max_context_tokens=100)
    batch = batch_of(Endpoint.CHAT_COMPLETIONS)
    rendered = renderer.render(batch, 0, CHAT | {"tools": [tool("book", "flat")]})
    assert bytes(rendered.prompts[0].token_ids) == b"[book]uhi"
    assert rendered.prompts[0].sampling.grammar is None
    bad = tool("book")
    bad["function"]["parameters"] = {"type": "object", "not": {}}
    renderer.render(batch, 0, CHAT | {"tools": [bad]})
    with pytest.raises(InvalidRequestError, match="not"):
        renderer.render(batch, 0, CHAT | {"tools": [bad], "tool_choice": "required"})


def test_ids_of_calls_have_the_length_that_a_template_asks_for() -> None:
    seen: list[Any] = []

    class Watching(FakeTokenizer):
        def render_chat(self, messages: Any, *, tools: Any = ()) -> list[int]:
            seen.extend(messages)
            return [1]

    call = {"id": "call_123", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_123", "content": "1"},
    ]
    renderer = Renderer(tokenizer=Watching(TEMPLATES["Mistral"]), max_context_tokens=100)
    renderer.render(batch_of(Endpoint.CHAT_COMPLETIONS), 0, {"model": "m", "messages": messages})
    assert seen[0]["tool_calls"][0]["id"] == seen[1]["tool_call_id"]
    assert len(seen[1]["tool_call_id"]) == 9


def test_an_answer_with_calls_says_so() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    asked = {**CHAT, "tools": [tool("f")]}
    asked.pop("model")
    body = answer(
        Endpoint.CHAT_COMPLETIONS, asked, [text], tokenizer=FakeTokenizer(TEMPLATES["Hermes"])
    )
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert call["id"].startswith("call_")
