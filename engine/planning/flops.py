"""What a model's tokens cost in multiplications and additions, from its shape; no tensors."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one token multiplies with, layer by layer.

    `matrix_elements[i]` are the weights of layer i that one token meets: of experts only those it is
    sent to. `windows[i]` is how many tokens back layer i attends, None for all of them.
    """

    matrix_elements: tuple[int, ...]
    windows: tuple[int | None, ...]
    num_heads: int
    key_size: int
    value_size: int
    kv_bytes_per_token: int
    """Of one layer, as it is kept."""
    head_elements: int
    layer_kv_bytes: tuple[int, ...]
    """Of a token's keys and values that each layer reads, its own or an earlier one's."""
    expert_elements: tuple[int, ...]
    """Of `matrix_elements` those in experts: each of them meets a share of the tokens only."""
    expert_share: float
    layer_values: tuple[int, ...]
    """Of a token in each layer, what goes into its products and comes out of them: norms, rotations,
    gates and sums read and write each of them about as often, whatever the model."""
    layer_products: tuple[int, ...]
    """Products of each layer, whatever their size, those of experts aside."""
    expert_products: tuple[int, ...]
    """Of one expert of each layer."""
    num_experts: int = 0
    """Of a layer that has any: `expert_share` of them are a token's."""

    def matrix_flops(self, layer: int, num_tokens: int) -> int:
        return 2 * self.matrix_elements[layer] * num_tokens

    def attention_flops(self, num_pairs: int) -> int:
        """Of one layer; `num_pairs` as counted by `attended`: scores, and their sum over values."""
        return 2 * self.num_heads * (self.key_size + self.value_size) * num_pairs

    def head_flops(self, num_rows: int) -> int:
        """Of the rows that sample: no other token meets the head."""
        return 2 * self.head_elements * num_rows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What a micro-batch attends to in one layer: pairs of a query and a cached token, and cached
    tokens, each row's counted once however many queries share it.
    """

    num_pairs: int
    num_cached: int


def attended(segments: Iterable[tuple[int, int]], *, window: int | None) -> Attended:
    """Of segments given as (new tokens, tokens cached before). A token attends to itself too."""
    num_pairs = num_cached = 0
    for num_tokens, past in segments:
        context = past + num_tokens
        span = context if window is None else window
        growing = min(
            max(span - past, 0), num_tokens
        )  # tokens whose whole context is in the window
        num_pairs += growing * past + growing * (growing + 1) // 2 + (num_tokens - growing) * span
        num_cached += min(context, span + num_tokens - 1)
    return Attended(num_pairs=num_pairs, num_cached=num_cached)
