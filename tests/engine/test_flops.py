"""FLOPs counted from shapes, beside counting them one by one and beside torch's own counter."""

from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from engine.compute.attention import ATTENTION_NAME
from engine.compute.skeleton import build_skeleton
from engine.memory.checkpoint import open_checkpoint
from engine.memory.pack import plan_groups
from engine.memory.shapes import largest_matrix, model_work
from engine.planning.flops import Work, attended
from tests.support.tiny_models import NUM_LAYERS, VOCAB_SIZE, write_tiny_model


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("segment", [(1, 0), (1, 9), (5, 0), (6, 4), (3, 50)])
def test_pairs_are_those_that_a_causal_mask_lets_through(
    segment: tuple[int, int], window: int | None
) -> None:
    num_tokens, past = segment
    pairs = [
        (query, key)
        for query in range(past, past + num_tokens)
        for key in range(query + 1)
        if window is None or query - key < window
    ]
    found = attended([segment, (1, 2)], window=window)
    other = min(3, window or 3)
    assert found.num_pairs == len(pairs) + other
    assert found.num_cached == len({key for _, key in pairs}) + other


def work_of(folder: Path, name: str) -> Work:
    opened = open_checkpoint(write_tiny_model(folder, name))
    model = build_skeleton(opened.config, attention=ATTENTION_NAME)
    groups = plan_groups(opened, model)
    rows, columns = largest_matrix(groups)
    assert rows * columns >= 64 * 64
    return model_work(groups, opened.config, dtype=torch.float32)


@pytest.mark.parametrize("name", ["opt", "llama", "qwen3", "gpt2"])
def test_a_forwards_flops_are_those_that_torch_counts(tmp_path: Path, name: str) -> None:
    num_tokens = 12
    work = work_of(tmp_path, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.arange(2, 2 + num_tokens)[None], logits_to_keep=1, use_cache=False)
    every_pair = num_tokens * num_tokens  # eager attention computes what it then masks
    counted = sum(work.matrix_flops(layer, num_tokens) for layer in range(NUM_LAYERS))
    counted += NUM_LAYERS * work.attention_flops(every_pair) + work.head_flops(1)
    assert counted == counter.get_total_flops()


def test_of_experts_only_the_chosen_ones_count(tmp_path: Path) -> None:
    work = work_of(tmp_path, "mixtral")
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    router, expert = 4 * 64, 3 * 64 * 128
    assert work.matrix_elements == (attention + router + 2 * expert,) * NUM_LAYERS
    assert work.expert_elements == (2 * expert,) * NUM_LAYERS
    assert work.expert_share == 0.5
    of_attention, of_router, of_expert = 2 * 128 + 2 * 96, 64 + 4, (64 + 256) + (128 + 64)
    assert work.layer_values == (of_attention + of_router + 2 * of_expert,) * NUM_LAYERS
    assert work.head_elements == VOCAB_SIZE * 64


def test_windows_are_each_layers_own(tmp_path: Path) -> None:
    work = work_of(tmp_path, "gemma2")
    assert set(work.windows) == {8, None}
    assert work.expert_elements == (0,) * NUM_LAYERS
    assert work.layer_kv_bytes == (2 * 2 * 16 * 4,) * NUM_LAYERS
