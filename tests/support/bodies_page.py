"""The page of what a line's body may ask, as the code says: `python -m tests.support.bodies_page FILE`."""

import json
import sys
from pathlib import Path

from jobs.parameters import PARAMETERS, Parameter

_INTRODUCTION = """# What a line's body may ask

Made from `jobs/parameters.py` by `make docs-bodies`; a test holds the page to the code. A parameter is
honoured, accepted without effect, or refused: then the line, and no other, gets a 400 that names it.
A refused parameter may be null or have one of the values shown, which ask for nothing. What is not
listed is refused as unknown.
"""
_NOTES = """## Answers

- **Usage.** A line's prompts are counted once, however many choices each has. `cached_tokens` are prompt tokens
  that were found computed, or were computed by another row of the block: they depend on what else runs.
- **`system_fingerprint`** changes with the weights, their dtypes and the dtype of the arithmetic.
- **Log-probabilities** are of the model's own distribution: before logit bias, grammar, penalties, temperature and
  truncation. So a token that a schema forced may be told as unlikely, and the likeliest ones beside it may be such
  as the schema forbids.
- **Scored prompts.** A completion with `echo` and `logprobs` tells of the prompt's tokens too: `token_logprobs` and
  `top_logprobs` begin with null, as at OpenAI, though the client's types have none: nobody knows how likely the first
  token was. A token of half a character is called by its bytes, `bytes:\\xc3`. `text_offset` counts from the prompt's
  beginning. A special token that the tokenizer puts before a text has an entry, and takes no place in it.
  With `max_tokens` 0 that is all, in one pass of prefill; with more, what was generated follows, and last the
  token that ended it, which is no part of the text: harnesses that ask for one token more leave off one entry. A
  prompt that is scored takes nothing from prefixes that other rows have computed. Harnesses such as lm-eval send
  token ids, and get what they need to tell whether a text is what greedy decoding would have said.
- **Embeddings** are the hidden states after the model's last norm, of the `last` token or the `mean` of all, made to
  length 1. `dimensions` takes the first so many values and makes them to length 1 again; more than the model has are
  refused. Base64 holds float32, the lowest byte first, and numbers are written with all the digits that tell these
  apart. The tokenizer's own special tokens count as a text's tokens. Each text may be as long as the model's context.
- **`n`.** Each choice has a random sequence of its own under the line's seed, so choices differ; each has a matcher
  of its own if there is a schema. Without `seed` the line's place in its batch decides: a line that is run again
  after a crash says the same.

## Schemas

`response_format` of type `json_object` or `json_schema` holds the whole text to a JSON schema, strict or not: at
every token only those can be drawn that keep the text valid, and the text ends when it is whole. Cut short by
`max_tokens` (`finish_reason` is then `length`) or by a `stop` of your own, it is the beginning of a valid text.
Between the tokens of JSON there is one blank at most. A `json_object` is any JSON object; the prompt need not
mention JSON.

The schema is checked before the batch runs. What cannot be kept to gets its line a 400 with the reason: `not`,
`if`, `contains`, `uniqueItems`, `dependentRequired`, `propertyNames`, `oneOf` with branches that overlap,
look-around in a pattern, a `$ref` to elsewhere, an unknown `format`, a schema that nothing fits. Properties come
in the schema's order. OpenAI's further demands on strict schemas (`additionalProperties: false`, every property
required) are not made. `min_tokens` and `ignore_eos` do not go with a schema.

The grammars are [llguidance](https://github.com/guidance-ai/llguidance)'s (MIT, the library in vLLM, SGLang and
llama.cpp). Weighed against xgrammar: llguidance has no dependencies and one stable-ABI wheel for every Python from
3.9 on, where xgrammar brings torch, triton and apache-tvm-ffi into the intake process and has a wheel for each
version; it refuses what it does not cover by name; its masks are computed lazily, so a schema costs nothing before
it is used. `bench/structured.py` measures the cost: 0.04 ms of CPU a token for the masks of the demo model, beside
27 ms for its layers on the same two cores. Masks are made by one thread, while a GPU still computes the head.

## Calls of functions

`tools` are shown to the model by its chat template. What it answers is read in the manner of the template's family:
Hermes and Qwen, Llama 3, Mistral, DeepSeek (`worker/tool_calls/`, one file each); a template of none of them refuses
`tools`. With `tool_choice` `required` or a function's name the answer is held to calls that fit the functions'
schemas, and so it is in `auto` if one of the functions is `strict`; text may stand before and after
calls. Otherwise what the model writes is read as it is, and what is no whole call stays text. A schema
for the answer (`response_format`) does not go with functions that may be called.
"""


def page() -> str:
    tables = [
        "\n".join(
            [
                f"## `{endpoint}`\n",
                "| parameter | what becomes of it | |",
                "|---|---|---|",
                *map(_row, table),
            ]
        )
        for endpoint, table in PARAMETERS.items()
    ]
    return "\n\n".join([_INTRODUCTION.rstrip(), *tables, _NOTES.rstrip()]) + "\n"


def _row(parameter: Parameter) -> str:
    values = ", ".join(f"`{json.dumps(value)}`" for value in parameter.neutral)
    support = f"{parameter.support}, but for {values}" if values else parameter.support.value
    return f"| `{parameter.name}` | {support} | {parameter.note} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
