"""OPT-6.7B- and OPT-30B-shaped models under a GPU budget, as FlexGen's paper has them, with ablation.

    python -m bench.gpu_offload [--shapes 6.7b 30b] [--gpu-gib 16] [--rows 256] ...
    python -m bench.gpu_offload --shapes tiny --device cpu --rows 8

Seeded random bfloat16 weights, prompts of 512 tokens and 32 new ones, all of one length: padding then
costs nothing. 14 GB of disk for 6.7b and 60 GB for 30b, which is read in place, not packed again.
"""

import argparse
import sys

from bench.ablation import Setting, add_arguments, ceilings, measure, table
from bench.opt_shape import OPT_SHAPES
from bench.seeded_model import write_checkpoint
from bench.workloads import Sizes, uniform


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=list(OPT_SHAPES), default=["6.7b", "30b"])
    add_arguments(parser, gpu_gib=16)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    arguments = parser.parse_args(words)
    setting = Setting.from_arguments(arguments)
    sizes = Sizes(
        rows=arguments.rows,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        prefix_prompt_tokens=0,
        prefix_share=0,
        seed=arguments.seed,
    )
    for name in arguments.shapes:
        shape = OPT_SHAPES[name]
        checkpoint = write_checkpoint(shape.checkpoint(setting.cache), shape)
        requests = uniform(sizes, shape.vocab).requests
        runs = measure(checkpoint, requests, vocab=shape.vocab, setting=setting)
        print(f"OPT-{name} on {setting.device}: {ceilings(runs)}\n")
        print(f"{table(runs)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
