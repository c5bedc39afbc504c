"""Which machine this is, and which libraries compute on it: what measurements are only valid for."""

import dataclasses
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`num_cores` are those that this process may run on; `versions` are by library."""

    cpu: str
    num_cores: int
    num_threads: int
    gpu: str | None
    versions: Mapping[str, str]

    def as_dict(self) -> dict[str, str]:
        """By the name of the fact or the library."""
        facts = {"cpu": self.cpu, "cores": str(self.num_cores), "threads": str(self.num_threads)}
        return facts | ({"gpu": self.gpu} if self.gpu else {}) | dict(self.versions)


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    return Machine(
        cpu=_cpu_name(cpuinfo),
        num_cores=len(os.sched_getaffinity(0)),
        num_threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions={
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _cpu_name(cpuinfo: Path) -> str:
    """The model, or the architecture where the kernel does not tell it."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = [line.partition(":") for line in lines]
    names = [value.strip() for name, _, value in fields if name.strip() == "model name"]
    return names[0] if names else platform.machine()
