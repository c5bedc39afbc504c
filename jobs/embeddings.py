"""`/v1/embeddings`: texts in, vectors out, with the endpoint's own parameters and shapes; knows no
engine.
"""

import base64
import dataclasses
import enum
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.prompts import parse_prompts
from jobs.values import integer, invalid_value, unsupported_value, wrong_type


class EncodingFormat(enum.StrEnum):
    """How vectors are written."""

    FLOAT = "float"  # an array of numbers
    BASE64 = "base64"  # of their float32 bytes, the lowest first


class PoolingKind(enum.StrEnum):
    """Which of a text's tokens its vector is made of."""

    LAST = "last"
    MEAN = "mean"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingAsk:
    """What is asked of the vectors. `dimensions` None is all."""

    encoding_format: EncodingFormat = EncodingFormat.FLOAT
    pooling: PoolingKind = PoolingKind.LAST
    dimensions: int | None = None


def parse_embedding_ask(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is the endpoint's own of a request, as fields of an Ask. Raises InvalidRequestError."""
    inputs = parse_prompts(given.get("input"), "input")
    for index, text in enumerate(inputs):
        if not text:
            place = "input" if len(inputs) == 1 else f"input[{index}]"
            raise invalid_value(place, "an empty input has no embedding")
    return {
        "prompts": inputs,
        "param": "input",
        "max_tokens": 0,
        "embedding": EmbeddingAsk(
            encoding_format=EncodingFormat(_choice(given, "encoding_format", EncodingFormat)),
            pooling=PoolingKind(_choice(given, "pooling", PoolingKind)),
            dimensions=integer(given, "dimensions", low=1),
        ),
    }


def num_inputs(body: Mapping[str, Any]) -> int:
    """How many texts the body of a line wants embedded, as far as it can be told."""
    inputs = body.get("input")
    is_many = isinstance(inputs, list) and any(isinstance(item, str | list) for item in inputs)
    return len(inputs) if isinstance(inputs, list) and is_many else 1


def embeddings_body(
    vectors: Sequence[bytes],
    *,
    encoding_format: EncodingFormat,
    model: str,
    num_tokens: int,
) -> dict[str, Any]:
    """`vectors` in order of the inputs, of float32 with the lowest byte first."""
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(vector, encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _written(vector: bytes, encoding_format: EncodingFormat) -> list[float] | str:
    """As numbers they have all the digits that tell float32's values apart."""
    if encoding_format is EncodingFormat.BASE64:
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def _choice(given: Mapping[str, Any], name: str, kind: type[enum.StrEnum]) -> str:
    """One of the enumeration's values, if none is given the first."""
    values = [each.value for each in kind]
    found = given.get(name, values[0])
    if not isinstance(found, str):
        raise wrong_type(name, "a string", found)
    if found not in values:
        raise unsupported_value(name, found, values)
    return found
