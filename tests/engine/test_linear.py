"""Products with sliced weights are the library's own products, however the rows are cut."""

import itertools
import time
from collections.abc import Sequence
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.compute import gemm as gemm_module
from engine.compute import linear as linear_module
from engine.compute.gemm import Gemm, choose_gemm, kernels_for, products_with
from engine.compute.head import Head
from engine.compute.linear import MULTIPLIER_ATTRIBUTE, Multiplier, attach_multiplier
from engine.compute.logprobs import score
from engine.compute.scores import RunningScores
from engine.compute.tail import Tail
from engine.memory.matrix import Matrix, Slice, Stack
from engine.memory.weights import WeightCounters

CPU: Final = torch.device("cpu")
TORCH: Final = Gemm([(1, F.linear)], reason="a test's")

BORDERS: Final = {"whole": (), "one border": (16,), "single rows": (1, 2, 95), "all": range(1, 96)}


def sliced(
    weight: torch.Tensor,
    borders: Sequence[int],
    *,
    transposed: bool = False,
    kind: Any = Matrix,
    dtype: torch.dtype = torch.float32,
) -> Any:
    matrix = kind(weight.shape, dtype=dtype, device=CPU, transposed=transposed)
    for first, last in itertools.pairwise((0, *borders, len(weight))):
        matrix.add(first, last).bind(weight[first:last])
    return matrix


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a slice takes more than one tile, and the last one is not full."""
    monkeypatch.setattr(linear_module, "TILE_BYTES", 40 * 33 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1, 7), (2, 3, 5), (1, 0)])
def test_a_sliced_linear_is_a_linear(
    dtype: torch.dtype, borders: Sequence[int], leading: tuple[int, ...], *, bias: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 33).to(dtype)
    offset = torch.randn(96) if bias else None
    inputs = torch.randn(*leading, 33)
    found = Multiplier(TORCH, CPU).linear(inputs, sliced(weight, borders), offset)
    torch.testing.assert_close(found, F.linear(inputs, weight.float(), offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_a_sliced_conv1d_adds_up_the_shares_of_its_input(
    dtype: torch.dtype, borders: Sequence[int]
) -> None:
    torch.manual_seed(0)
    module = Conv1D(33, 96)
    weight = torch.randn(96, 33).to(dtype)
    module.weight = nn.Parameter(weight.float())
    nn.init.normal_(module.bias)
    inputs = torch.randn(1, 5, 96)
    matrix = sliced(weight, borders, transposed=True)
    found = Multiplier(TORCH, CPU).linear(inputs, matrix, module.bias)
    torch.testing.assert_close(found, module(inputs))


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_shares_of_16_bits_add_up_as_if_they_were_one(borders: Sequence[int]) -> None:
    """Each share is rounded once and their sum once, however many there are."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(96, 33).bfloat16(), torch.randn(50, 96).bfloat16()
    matrix = sliced(weight, borders, transposed=True, dtype=torch.bfloat16)
    found = Multiplier(TORCH, CPU).linear(inputs, matrix, None).double()
    exact = inputs.double() @ weight.double()
    error = (found - exact).square().mean().sqrt()
    plain = ((inputs @ weight).double() - exact).square().mean().sqrt()
    assert error < 1.5 * plain


@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_timed_without_what_is_waited_for(*, transposed: bool) -> None:
    weight = torch.randn(96, 33)
    matrix = sliced(weight, BORDERS["one border"], transposed=transposed)
    waits_s = 0.05
    for part in matrix.slices:
        part.on_ask = lambda: time.sleep(waits_s)
    multiplier = Multiplier(TORCH, CPU)
    inputs = torch.randn(5, 96 if transposed else 33)
    began_s = time.perf_counter()
    multiplier.linear(inputs, matrix, None)
    took_s = time.perf_counter() - began_s
    assert 0 < multiplier.counters.taken_s <= took_s - waits_s * len(matrix.slices)
    before_s = multiplier.counters.taken_s
    multiplier.product(inputs, weight, None, transposed=transposed)
    assert multiplier.counters.taken_s > before_s


class Modules(nn.ModuleDict):
    """As much of a model as is asked for its head."""

    def get_output_embeddings(self) -> Any:
        return dict(self.items()).get("head")


# What is computed in, by what is stored.
PACKED: Final = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("dtype", "stored"), PACKED)
def test_what_stays_is_packed_once_but_not_the_head(
    dtype: torch.dtype, stored: torch.dtype
) -> None:
    if "oneDNN" not in kernels_for(dtype, CPU):
        pytest.skip(f"oneDNN has no product of {dtype} on this CPU")
    model: Any = Modules({name: nn.Linear(33, 96) for name in ("resident", "cut", "head")})
    inputs = torch.randn(7, 33).to(dtype)
    expected = [module.to(dtype)(inputs) for module in model.values()]
    for name, module in model.items():
        weight = module.weight.detach().to(stored)
        del module.weight
        module.weight = sliced(weight, (40,) if name == "cut" else (), dtype=dtype)
    streamed = model["cut"].weight.slices[1]
    arriving = streamed.stored
    streamed.unbind()
    attach_multiplier(model, dtype=dtype, device=CPU)
    streamed.bind(arriving)
    is_packed = [
        [part.stored.is_mkldnn for part in module.weight.slices] for module in model.values()
    ]
    assert is_packed == [[True], [True, False], [False]]
    for module, answer in zip(model.values(), expected, strict=True):
        torch.testing.assert_close(module(inputs), answer, rtol=1e-2, atol=1e-2)


def test_nothing_takes_more_bytes_for_being_packed() -> None:
    model: Any = Modules({"linear": nn.Linear(33, 96)})
    weight = model["linear"].weight.detach().bfloat16()
    del model["linear"].weight
    model["linear"].weight = sliced(weight, ())
    attach_multiplier(model, dtype=torch.float32, device=CPU)
    stored = model["linear"].weight.slices[0].stored
    assert (stored.dtype, stored.is_mkldnn) == (torch.bfloat16, False)


def test_every_module_with_a_sliced_weight_is_given_a_forward_of_ours() -> None:
    torch.manual_seed(0)
    model: Any = Modules({"ours": nn.Linear(33, 96), "theirs": nn.Linear(96, 5)})
    inputs = torch.randn(4, 33)
    expected = model["theirs"](model["ours"](inputs))
    weight = model["ours"].weight.detach()
    del model["ours"].weight
    model["ours"].weight = sliced(weight, (40,))
    model["experts"] = nn.Module()
    model["experts"].down_proj = sliced(torch.randn(4, 8, 8), (2,), kind=Stack)
    multiplier = attach_multiplier(model, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(model["theirs"](model["ours"](inputs)), expected)
    assert getattr(model["experts"], MULTIPLIER_ATTRIBUTE) is multiplier
    assert not hasattr(model["theirs"], MULTIPLIER_ATTRIBUTE)


def test_a_sliced_weight_taken_for_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError):
        F.linear(torch.randn(4, 33), sliced(torch.randn(96, 33), ()))


# -- kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 100, 513, 2000])
def test_the_kernel_chosen_multiplies_and_is_named(num_rows: int, dtype: torch.dtype) -> None:
    chosen = choose_gemm((96, 33), dtype=dtype, device=CPU)
    rows, weight = torch.randn(num_rows, 33).to(dtype), torch.randn(96, 33).to(dtype)
    product = chosen.kernel(num_rows)(rows, weight)
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (2**-7, 1e-2)
    exact = F.linear(rows.float(), weight.float())
    torch.testing.assert_close(product.float(), exact, rtol=rtol, atol=atol)
    if len(kernels_for(dtype, CPU)) > 1:
        name = str(dtype).removeprefix("torch.")
        assert chosen.reason.startswith(f"96 x 33 {name} on this CPU: ")
        assert chosen.reason.count("GFLOP/s") == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_multiply_gives_the_product(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(7, 33).to(dtype), torch.randn(96, 33).to(dtype)
    products = products_with(weight)
    assert products.keys() >= kernels_for(dtype, CPU).keys()
    for name, product in products.items():
        expected = F.linear(rows, weight)
        torch.testing.assert_close(product(rows), expected, rtol=2**-7, atol=1e-2, msg=name)


def test_each_number_of_rows_has_the_kernel_that_was_faster_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(kernel: Any, rows: torch.Tensor, weight: torch.Tensor) -> float:
        return 1.0 if (kernel is F.linear) == (len(rows) <= 32) else 2.0

    monkeypatch.setattr(gemm_module, "_seconds", seconds)
    monkeypatch.setattr(gemm_module, "_has_onednn", lambda dtype: True)
    chosen = choose_gemm((96, 33), dtype=torch.float32, device=CPU)
    kernels = [chosen.kernel(num_rows) for num_rows in (1, 2, 32, 33, 128, 9999)]
    assert [kernel is F.linear for kernel in kernels] == [True] * 3 + [False] * 3
    assert "torch at 1 " in chosen.reason
    assert "oneDNN at 128 " in chosen.reason


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float16, "cpu"), (torch.float32, "cuda"), (torch.bfloat16, "cuda")]
)
def test_a_gpu_has_no_choice_nor_has_float16(dtype: torch.dtype, device: str) -> None:
    chosen = choose_gemm((96, 33), dtype=dtype, device=torch.device(device))
    assert chosen.kernel(1) is chosen.kernel(4096) is F.linear


# -- the head ----------------------------------------------------------------------------------


class Tiles:
    """A weight source whose head is in three tiles, there only while they are held."""

    def __init__(self, weight: torch.Tensor, slices: Sequence[Slice]) -> None:
        self.counters = WeightCounters()
        self.head_stages = range(4, 4 + len(slices))
        self.visits: list[int] = []
        self._weight = weight
        self._slices = slices

    def slices_of(self, stage: int) -> Sequence[Slice]:
        return [self._slices[stage - 4]]

    def acquire(self, stage: int, *, num_forwards: int = 1) -> None:
        assert num_forwards == 1
        self.visits.append(stage)
        [part] = self.slices_of(stage)
        part.bind(self._weight[part.first : part.last])

    def release(self, stage: int) -> None:
        self.slices_of(stage)[0].unbind()

    def begin(self, num_tokens: int) -> None: ...
    def rewind(self) -> None: ...

    def close(self) -> None: ...


def test_logits_of_16_bit_values_are_not_rounded_to_16_bits() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(96, 33).bfloat16(), torch.randn(5, 33).bfloat16()
    logits = torch.empty(5, 96)
    Multiplier(TORCH, CPU).logits(hidden, weight, logits)
    exact = hidden.double() @ weight.double().t()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 6])
def test_the_head_is_its_resident_rows_and_each_tile_once(num_rows: int) -> None:
    torch.manual_seed(0)
    module: Any = nn.Linear(33, 96)
    weight = module.weight.detach()
    hidden = torch.randn(num_rows, 33)
    expected = module(hidden)
    del module.weight
    module.weight = sliced(weight, (20, 50, 80))
    tiles = Tiles(weight, module.weight.slices[1:])
    for part in module.weight.slices[1:]:
        part.unbind()
    head = Head(module, tiles, Multiplier(TORCH, CPU), tail=Tail(()))
    scored = RunningScores(hidden, range(num_rows), num_top=3)
    torch.testing.assert_close(head(hidden, [scored]), expected)
    assert tiles.visits == [4, 5, 6]
    torch.testing.assert_close(
        scored.table(), score(expected, torch.arange(num_rows), num_top=3), atol=1e-5, rtol=0
    )
