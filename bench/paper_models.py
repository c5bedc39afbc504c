"""The OPT models of the FlexGen paper as the planner sees them: shapes alone, in float16."""

import dataclasses

from engine.planning.flops import Work
from engine.planning.shape import ModelShape, Placeable

_VOCAB_SIZE = 50272
_GRANULE_ROWS = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Opt:
    """Figures of its config."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int

    @property
    def shape(self) -> ModelShape:
        hidden, inner = self.hidden_size, 4 * self.hidden_size
        layer = tuple(
            _matrix(rows, columns)
            for rows, columns in ((hidden, hidden),) * 4 + ((inner, hidden), (hidden, inner))
        )
        biases_and_norms = 4 * hidden + inner + hidden + 4 * hidden
        return ModelShape(
            layers=(layer,) * self.num_layers,
            fixed_bytes=2 * (self.num_layers * biases_and_norms + 2050 * hidden),
            embedding=None,
            head=_matrix(_VOCAB_SIZE, hidden),
            tied=True,
            scales_logits=False,
            compute_dtype="float16",
            compute_itemsize=2,
            kv_bytes_per_token=self.num_layers * 4 * hidden,
            hidden_size=hidden,
            intermediate_size=inner,
            vocab_size=_VOCAB_SIZE,
            max_context_tokens=2048,
            lookup_bytes_per_token=12 * self.num_heads,
            widened_bytes_per_token=4 * hidden + 2 * self.num_heads,
        )

    @property
    def work(self) -> Work:
        hidden, layers = self.hidden_size, self.num_layers
        return Work(
            matrix_elements=(12 * hidden * hidden,) * layers,
            windows=(None,) * layers,
            num_heads=self.num_heads,
            key_size=hidden // self.num_heads,
            value_size=hidden // self.num_heads,
            kv_bytes_per_token=4 * hidden,
            head_elements=_VOCAB_SIZE * hidden,
            layer_kv_bytes=(4 * hidden,) * layers,
            expert_elements=(0,) * layers,
            expert_share=1.0,
            # Four products of the hidden size, and the two of the MLP with four times of it.
            layer_values=(18 * hidden,) * layers,
            layer_products=(6,) * layers,
            expert_products=(0,) * layers,
        )


def _matrix(rows: int, columns: int) -> Placeable:
    return Placeable(
        num_bytes=2 * rows * columns,
        granule_bytes=2 * _GRANULE_ROWS * columns,
        row_bytes=2 * columns,
    )


OPT_6_7B = Opt(name="OPT-6.7B", num_layers=32, hidden_size=4096, num_heads=32)
OPT_30B = Opt(name="OPT-30B", num_layers=48, hidden_size=7168, num_heads=56)
OPT_175B = Opt(name="OPT-175B", num_layers=96, hidden_size=12288, num_heads=96)
