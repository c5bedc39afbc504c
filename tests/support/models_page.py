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

What Freight makes of every type that transformers {version} has a causal language model of. `make docs-models`
writes this page from the engine's own answers, and a test holds the two together; do not edit it.

**exact**, {num_exact} types: a small seeded model of the type goes through the whole engine (checkpoint on disk,
packed weights, half of every layer streamed; float32, on the CPU) in two ways: ragged prompts packed in one
forward, and chunks of prompts beside decoding rows, in several micro-batches, layer by layer. The logits of every
sampled token and the scores of every prompt token are within {tolerance} of the library's own forward (as a rule 1e-6),
and greedy tokens equal `generate`. `make coverage-models` runs this for every type, `make test` for a sample.

**refused**, {num_refused} types: loading ends with the type's name and the reason below, before a weight is read.

- The config decides. A mixed type such as `granitemoehybrid` runs where all its layers attend; any type is refused
  for quantised weights, or where its config asks for attention in both directions.
- A type that the page does not name, of another version of the library, is judged by the same rules: its kinds of
  layers, whether it asks for attention through the library's interface, whether it keeps a recurrent state. What slips
  through them ends the first sweep by name: a layer that does not call attention, a mask of the model's own, other
  heads than the config promises.
- Rotary embeddings that change for all rows once one is long (`dynamic`, `longrope`) run up to the original length.
- Multimodal types run on text alone; their other towers are loaded and not used.

Exercised beside what each type's shrunk config asks for: {variants}.

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
