"""Bodies: text that cannot be UTF-8 and stops that stop nothing are refused where they stand."""

from typing import Any

import pytest

from jobs.batch import Endpoint
from jobs.bodies import parse_body
from jobs.errors import InvalidRequestError

COMPLETIONS = Endpoint.COMPLETIONS
CHAT = Endpoint.CHAT_COMPLETIONS
HALF = "a\ud800b"


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"} | fields]}


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (COMPLETIONS, {"prompt": HALF}, "prompt"),
        (COMPLETIONS, {"prompt": [HALF]}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "stop": HALF}, "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ["y", HALF]}, "stop[1]"),
        (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "x", "stop": ["y", ""]}, "stop[1]"),
        (CHAT, message(content=HALF), "messages[0].content"),
        (CHAT, message(content=[{"type": "text", "text": HALF}]), "messages[0].content[0].text"),
        (CHAT, message(name=HALF), "messages[0].name"),
    ],
)
def test_text_that_no_tokenizer_can_use_is_refused(
    endpoint: Endpoint, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body({"model": "m"} | body, endpoint)
    assert (refusal.value.code, refusal.value.param) == ("invalid_value", param)
    assert refusal.value.message.isascii()


def test_a_whole_pair_and_every_stop_are_kept() -> None:
    ask = parse_body(
        {"model": "m", "prompt": "\U0001f600", "stop": ["\U0001f600", "b"]}, COMPLETIONS
    )
    assert (ask.text, ask.stop) == ("\U0001f600", ("\U0001f600", "b"))


@pytest.mark.parametrize("body", [{"x" * 10**6: 1}, message(**{"x" * 10**6: 1})])
def test_a_refusal_quotes_no_more_than_a_little(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        parse_body({"model": "m", "messages": []} | body, CHAT)
    assert len(refusal.value.message) < 1_000
    assert len(refusal.value.param or "") < 1_000
