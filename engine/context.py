"""How long a row of a model may be, from its config; needs no torch and no weights."""

from typing import Any, Final

_REGIME_SWITCHING: Final = frozenset({"dynamic", "longrope"})
"""Rotary variants that change every row's frequencies once one row is longer than the original."""


def max_context_tokens(config: Any) -> int:
    """The longest row. Where a longer one would change its neighbours' positions, the original."""
    text = config.get_text_config(decoder=True)
    longest = int(text.max_position_embeddings)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in _REGIME_SWITCHING:
        original = rope.get("original_max_position_embeddings") or longest
        return min(longest, int(original))
    return longest
