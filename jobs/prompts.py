"""Prompts as bodies write them: a text, token ids, or an array of either; knows no endpoint."""

from typing import Final

from jobs.values import above_length, unicode_text, wrong_type

MAX_PROMPTS: Final = 2048

PromptText = str | tuple[int, ...]


def parse_prompts(value: object, param: str) -> tuple[PromptText, ...]:
    """Raises InvalidRequestError with the place in `param` that is wrong."""
    if isinstance(value, str):
        return (unicode_text(value, param),)
    if not isinstance(value, list):
        raise wrong_type(param, "a string or an array of integers", value)
    if not any(isinstance(item, str | list) for item in value):
        return (token_ids(value, param),)
    if len(value) > MAX_PROMPTS:
        raise above_length(param, MAX_PROMPTS, len(value), kind="array")
    if len(value) == 1:
        return (_one_prompt(value[0], param),)
    return tuple(_one_prompt(item, f"{param}[{index}]") for index, item in enumerate(value))


def token_ids(items: list[object], place: str) -> tuple[int, ...]:
    return tuple(_token_id(item, f"{place}[{index}]") for index, item in enumerate(items))


def _one_prompt(item: object, place: str) -> PromptText:
    if isinstance(item, str):
        return unicode_text(item, place)
    if not isinstance(item, list):
        raise wrong_type(place, "a string or an array of integers", item)
    return token_ids(item, place)


def _token_id(value: object, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(place, "an integer", value)
    return value
