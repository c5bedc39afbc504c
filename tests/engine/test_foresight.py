"""What is foreseen of a model is what its engine then finds, with weights and without."""

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.config import Budgets
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.foresight import foresee
from engine.planning.shape import ModelShape
from tests.support.policies import streaming
from tests.support.tiny_models import TINY_MODELS, write_tiny_model


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_alone_tells_what_the_weights_will(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = write_tiny_model(tmp_path / "model", name, dtype=dtype)
    with_weights = {on_gpu: foresee(source, on_gpu=on_gpu) for on_gpu in (False, True)}
    (source / "model.safetensors").unlink()
    for on_gpu, seen in with_weights.items():
        alone = foresee(source, on_gpu=on_gpu)
        assert (seen.has_weights, alone.has_weights) == (True, False)
        assert _in_no_order(alone.shape) == _in_no_order(seen.shape)
        assert alone.work == seen.work


def _in_no_order(shape: ModelShape) -> ModelShape:
    """Weights that are read where they lie come in their file's order, which no config tells."""
    layers = tuple(
        tuple(sorted((dataclasses.replace(each, gap_bytes=0) for each in tensors), key=repr))
        for tensors in shape.layers
    )
    return dataclasses.replace(shape, layers=layers)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_engine_is_of_the_shape_that_was_foreseen(name: str, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model", name)
    seen = foresee(source, on_gpu=False)
    budgets = Budgets(gpu_bytes=0, host_bytes=2**28, disk_bytes=2**28, spill_dir=tmp_path / "spill")
    with Engine.load(source, budgets=budgets, policy=streaming(0.5)) as engine:
        assert engine.basis.shape == seen.shape
        assert engine.basis.work == seen.work


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        foresee(tmp_path / "gone", on_gpu=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no"):
        foresee(tmp_path / "empty", on_gpu=False)


def test_a_policy_made_of_what_was_foreseen_cuts_where_the_engine_can(tmp_path: Path) -> None:
    """Also where weights are read in the order of their file, down before gate."""
    source = write_tiny_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    budgets = Budgets(gpu_bytes=0, host_bytes=2**28, disk_bytes=2**28, spill_dir=tmp_path / "spill")
    shape = foresee(source, on_gpu=False).shape
    for share in range(1, 12):
        policy = streaming(share / 12)(shape, budgets)
        with Engine.load(source, budgets=budgets, policy=policy) as engine:
            assert engine.policy == policy
