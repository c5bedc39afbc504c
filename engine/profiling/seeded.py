"""Models of seeded weights that a machine is measured with: written, and known by nobody else."""

from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import save_file

from engine.memory.safetensors import SINGLE_FILE

PREFIX: Final = ".freight-profile-"
"""What the names of their folders begin with."""


def write_model(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """By the library's own initialisation; the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.save_pretrained(folder)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / SINGLE_FILE)
    return folder
