"""JSON schemas of many kinds, each of which bounds how long a text that fits it can be."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

_PERSON: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}

SCHEMAS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "flat": _PERSON,
        "nested": {
            "type": "object",
            "properties": {
                "owner": _PERSON,
                "car": {
                    "type": "object",
                    "properties": {"doors": {"type": "integer", "minimum": 2, "maximum": 5}},
                    "required": ["doors"],
                    "additionalProperties": False,
                },
            },
            "required": ["owner", "car"],
            "additionalProperties": False,
        },
        "enum": {"enum": ["red", "green", 3, None, {"shade": "blue"}]},
        "const": {
            "type": "object",
            "properties": {"kind": {"const": "invoice"}, "paid": {"type": "boolean"}},
            "required": ["kind", "paid"],
            "additionalProperties": False,
        },
        "array": {
            "type": "array",
            "items": {"type": "integer", "minimum": 1, "maximum": 9},
            "minItems": 2,
            "maxItems": 4,
        },
        "tuple": {
            "type": "array",
            "prefixItems": [{"enum": ["lat", "lon"]}, {"type": "boolean"}],
            "items": False,
            "minItems": 2,
        },
        "bounds": {
            "type": "object",
            "properties": {
                "low": {"type": "integer", "exclusiveMinimum": -5, "maximum": 5},
                "high": {"type": "integer", "minimum": 10, "exclusiveMaximum": 20},
            },
            "required": ["low", "high"],
            "additionalProperties": False,
        },
        "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "format": {"type": "string", "format": "date"},
        "refs": {
            "$defs": {
                "point": {
                    "type": "object",
                    "properties": {
                        "x": {"type": "integer", "minimum": 0, "maximum": 99},
                        "y": {"type": "integer", "minimum": 0, "maximum": 99},
                    },
                    "required": ["x", "y"],
                    "additionalProperties": False,
                }
            },
            "type": "array",
            "items": {"$ref": "#/$defs/point"},
            "minItems": 1,
            "maxItems": 2,
        },
        "any of": {
            "anyOf": [
                {"type": "string", "maxLength": 6},
                {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
                {"type": "null"},
            ]
        },
        "optional": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"enum": [1, 2]}},
            "required": ["b"],
            "additionalProperties": False,
        },
    }
)
