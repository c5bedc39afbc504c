"""What tests against the oracle share: ragged prompts, and the library's own greedy answers."""

import random
from typing import Any

import torch

from engine.config import Prompt, Sampling
from tests.support.tiny_models import VOCAB_SIZE

# Tokens without the end of sequence, and whether there was one.
Answer = tuple[tuple[int, ...], bool]


def ragged_prompts(seed: int = 0) -> list[Prompt]:
    draw = random.Random(seed)
    return [
        Prompt(
            key=str(index),
            token_ids=tuple(
                draw.randrange(2, VOCAB_SIZE) for _ in range(draw.choice((1, 2, 9, 17, 40, 66)))
            ),
            sampling=Sampling(max_tokens=draw.choice((1, 5, 20, 50, 75))),
        )
        for index in range(9)
    ]


def oracle_answer(model: Any, prompt: Prompt) -> Answer:
    """One prompt alone through `generate`, without padding."""
    ids = torch.tensor([prompt.token_ids])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=prompt.sampling.max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens = answer[0, ids.shape[1] :].tolist()
    ended = tokens[-1] == model.generation_config.eos_token_id
    return tuple(tokens[:-1] if ended else tokens), ended
