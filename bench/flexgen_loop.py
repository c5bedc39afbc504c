"""FlexGen's own loop beside Freight's over the same engine, on a seeded Llama-shaped model.

    python -m bench.flexgen_loop --device cpu --host-gib 1.2 [--layers 16 --hidden 2048 ...]

Prompts and answers are ragged around their medians, and every prompt begins with the same tokens.
`bench.ablation` has the schedules. A budget below the weights makes the engine stream.
"""

import argparse
import dataclasses
import random
import sys

from bench.ablation import Setting, add_arguments, ceilings, measure, table
from bench.llama_shape import LlamaShape, add_shape_arguments
from bench.seeded_model import write_checkpoint
from bench.workloads import Request, Sizes, ragged


def job(sizes: Sizes, vocab: int) -> list[Request]:
    """Ragged requests behind one beginning of `prefix_prompt_tokens`."""
    draw = random.Random(sizes.seed + 3)
    shared = tuple(draw.randrange(2, vocab) for _ in range(sizes.prefix_prompt_tokens))
    return [
        dataclasses.replace(request, token_ids=shared + request.token_ids)
        for request in ragged(sizes, vocab).requests
    ]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser, gpu_gib=None)
    parser.add_argument(
        "--shared-tokens", type=int, default=128, help="that every prompt begins with"
    )
    add_shape_arguments(parser)
    arguments = parser.parse_args(words)
    shape = LlamaShape.from_arguments(arguments)
    sizes = Sizes(
        rows=arguments.rows,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        prefix_prompt_tokens=arguments.shared_tokens,
        prefix_share=1.0,
        seed=arguments.seed,
    )
    setting = Setting.from_arguments(arguments)
    checkpoint = write_checkpoint(shape.checkpoint(setting.cache), shape)
    runs = measure(checkpoint, job(sizes, shape.vocab), vocab=shape.vocab, setting=setting)
    print(f"{shape.name} on {setting.device}: {ceilings(runs)}\n")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
