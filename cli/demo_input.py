"""The demo's input: real text of clearly unequal lengths, the same at every call.

The text is Python's own documentation, which every installation carries. Prompts have some 30 to
900 tokens and answers 16 to 96, all greedy. `python -m cli.demo_input FILE MODEL` writes it.
"""

import dataclasses
import json
import pydoc_data.topics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_NUM_TOPICS: Final = 64  # the fewest that a supported Python has is above it
_SYSTEM: Final = "You are a precise assistant. Answer in plain words."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Errand:
    """One kind of request; `num_characters` of the topic's text are quoted."""

    name: str
    ask: str
    num_characters: int
    max_tokens: int


_ERRANDS: Final = (
    _Errand(
        name="question",
        ask="In one sentence: what is '{topic}' in the Python language?",
        num_characters=0,
        max_tokens=32,
    ),
    _Errand(
        name="summary",
        ask="Summarize this text in two or three sentences.",
        num_characters=2800,
        max_tokens=96,
    ),
    _Errand(
        name="keywords",
        ask="List five keywords for this text, separated by commas.",
        num_characters=600,
        max_tokens=24,
    ),
    _Errand(
        name="explanation",
        ask="Explain this text to a beginner.",
        num_characters=1200,
        max_tokens=64,
    ),
    _Errand(
        name="title",
        ask="Give this text a short title.",
        num_characters=300,
        max_tokens=16,
    ),
)


def write_demo_input(path: Path, *, model: str) -> int:
    """Write the requests as JSONL; how many they are."""
    lines = [json.dumps(request) for request in demo_requests(model)]
    path.write_text("\n".join(lines) + "\n")
    return len(lines)


def demo_requests(model: str) -> Iterator[Mapping[str, Any]]:
    """Two requests a topic. Kinds follow one another, so that long and short stand side by side."""
    topics = sorted(pydoc_data.topics.topics.items())[:_NUM_TOPICS]
    for number, (topic, text) in enumerate(topics):
        for errand in (_ERRANDS[number % 5], _ERRANDS[(number + 2) % 5]):
            yield {
                "custom_id": f"{errand.name}-{topic}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": model,
                    "messages": [
                        {"role": "system", "content": _SYSTEM},
                        {"role": "user", "content": _question(errand, topic, text)},
                    ],
                    "max_tokens": errand.max_tokens,
                    "temperature": 0,
                },
            }


def _question(errand: _Errand, topic: str, text: str) -> str:
    ask = errand.ask.format(topic=topic)
    quoted = text[: errand.num_characters].strip()
    return f"{ask}\n\n{quoted}" if quoted else ask


if __name__ == "__main__":
    write_demo_input(Path(sys.argv[1]), model=sys.argv[2])
