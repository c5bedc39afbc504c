"""How long a row of a model may be, from its config; needs no torch and no weights."""

from typing import Any, Final

_REGIME_SWITCHING: Final = frozenset({"dynamic", "longrope"})
"""Rotary variants that change every row's frequencies once one row is longer than the original."""


def max_context_tokens(config: Any) -> int:
    """The longest row. Where a longer one would change its neighbours' positions, the original."""
    text = config.get_text_config(decoder=True)
    longest = int(text.max_position_embeddings)
    rope = getattr(text, "rope_parameters", None) or {}
    # One set of parameters for all layers, or one for each kind of layer.
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") in _REGIME_SWITCHING:
            longest = min(longest, int(each.get("original_max_position_embeddings") or longest))
    return longest
