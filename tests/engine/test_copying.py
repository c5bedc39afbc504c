"""Copies by one thread: every value as it was, whatever its dtype and however it lies."""

import pytest
import torch

from engine.memory.copying import copy_by_one_thread


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64]
)
def test_slices_are_copied_as_they_are(dtype: torch.dtype) -> None:
    source = torch.randn(3, 20, 8).to(dtype)
    target = torch.zeros(3, 32, 8, dtype=dtype)
    with torch.inference_mode():
        copy_by_one_thread(target[:, 5:9], source[:, 11:15])
    assert torch.equal(target[:, 5:9], source[:, 11:15])
    assert not target[:, :5].any()
    assert not target[:, 9:].any()


def test_what_is_not_a_number_stays_what_it_was() -> None:
    source = torch.tensor([0x7FC1, 0x7F80, -0x8000], dtype=torch.int16).view(torch.bfloat16)
    target = torch.zeros(3, dtype=torch.bfloat16)
    copy_by_one_thread(target, source)
    assert torch.equal(target.view(torch.int16), source.view(torch.int16))


def test_values_of_another_dtype_are_not_converted() -> None:
    with pytest.raises(AssertionError, match="not converted"):
        copy_by_one_thread(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
