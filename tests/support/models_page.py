"""The page of model types, written from what the engine says of each: `make docs-models`.

    python -m tests.support.models_page docs/models.md

Whether it tells the truth is for tests/engine/test_models.py to find out.
"""

import sys
from pathlib import Path
from typing import Any, Final

import transformers

from engine.memory.architecture import REFUSED_TYPES, reason_to_refuse
from tests.support.shrunk_models import VARIANTS, causal_types, shrink

_HEAD: Final = """# Model types

Every type that transformers {version} has a causal language model of, and what Freight makes of it.
`make docs-models` writes this page; do not edit it.

**exact** ({num_exact} types): a small seeded model of the type goes through the whole engine (checkpoint on disk,
packed weights, half of every layer streamed) in two ways: ragged prompts packed in one forward, and prompt
chunks beside decoding rows in several micro-batches, layer by layer. The logits of every sampled
token are within {tolerance} of the library's own forward (as a rule 1e-6), and greedy tokens equal `generate`.
`make coverage-models` runs this for all types, `make test` for a sample.

**refused** ({num_refused} types): loading ends with the type's name and the reason below, before a byte of weights is
read. Types that the page does not name (of another transformers version, say) are judged by the same rules:
kinds of layers, the library's attention interface, recurrent state. What slips through them is caught in
the first sweep: a layer that does not call attention, a mask of the model's own, other heads than
the config promises.

The config decides: a mixed type (`lfm2`, `granitemoehybrid`) runs where all its layers attend, and a
type below may be refused for a quantised checkpoint. Rotary embeddings that change for every row once one
row is long (`dynamic`, `longrope`) run up to the original length. Multimodal types run on text alone.

Tried beside the default of their type: {variants}.

| type | verdict | why, or what was exercised |
|---|---|---|
"""


def page(*, tolerance: float) -> str:
    rows = verdicts()
    lines = [f"| `{name}` | {verdict} | {note} |" for name, (verdict, note) in rows.items()]
    num_exact = sum(verdict == "exact" for verdict, _ in rows.values())
    head = _HEAD.format(
        version=transformers.__version__,
        num_exact=num_exact,
        num_refused=len(rows) - num_exact,
        tolerance=tolerance,
        variants="; ".join(VARIANTS),
    )
    return head + "\n".join(lines) + "\n"


def verdicts() -> dict[str, tuple[str, str]]:
    """Verdict and note of every type, by name."""
    return {name: _verdict(name, config) for name, config in sorted(causal_types().items())}


def _verdict(name: str, config_class: type) -> tuple[str, str]:
    if name in REFUSED_TYPES:
        return "refused", REFUSED_TYPES[name]
    config = shrink(config_class)
    reason = reason_to_refuse(config)
    return ("exact", _exercised(config)) if reason is None else ("refused", reason)


def _exercised(config: Any) -> str:
    """What of the engine the shrunk config calls for beside plain attention."""
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    has = {
        "windows": "sliding_attention" in kinds or bool(getattr(text, "sliding_window", None)),
        "chunks": "chunked_attention" in kinds,
        "experts": any("expert" in name and value for name, value in text.to_dict().items()),
        "latent keys and values": hasattr(text, "kv_lora_rank"),
        "layers that share keys and values": bool(getattr(text, "num_kv_shared_layers", 0)),
        "inputs for each layer": bool(getattr(text, "hidden_size_per_layer_input", 0)),
    }
    return ", ".join(name for name, is_there in has.items() if is_there)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(tolerance=1e-3))
