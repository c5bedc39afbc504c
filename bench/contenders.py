"""The engines of the offloading benchmark, each as legs of one batch size over one workload."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bench.legs.job import Job
from bench.peers import airllm_folder, llama_program
from bench.runner import Leg
from bench.seeded_model import LlamaShape, write_checkpoint, write_gguf
from bench.workloads import Workload

FREIGHT: Final = "Freight"
_ACCELERATE: Final = "Accelerate disk"
_AIRLLM: Final = "AirLLM"
_LLAMA: Final = "llama.cpp mmap"
_DTYPES: Final[Mapping[str, str]] = {"f32": "float32", "bf16": "bfloat16"}

PEERS: Final = (
    "accelerate-bf16",
    "accelerate-f32",
    "airllm-bf16",
    "airllm-f32",
    "llama-bf16",
    "llama-f16",
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contenders:
    """Makes legs. `folder` is the cache with the model, its GGUF files, and the peers' own files.

    The last part of a peer's name is what it computes in; of llama.cpp, what its file holds.
    """

    folder: Path
    shape: LlamaShape
    threads: int
    planner: str
    headroom_bytes: int
    block_rows: int
    sweep_tokens: int | None

    @property
    def checkpoint(self) -> Path:
        return self.folder / "models" / self.shape.name

    @property
    def spill_dir(self) -> Path:
        return self.folder / "spill"

    def write_models(self, peers: list[str]) -> int:
        """Write what is not there yet; the bytes of the weights."""
        write_checkpoint(self.checkpoint, self.shape)
        for half in ("f16", "bf16"):
            if f"llama-{half}" in peers:
                write_gguf(self._gguf(half), self.checkpoint, self.shape, half)
        return self.weights_file.stat().st_size

    @property
    def weights_file(self) -> Path:
        return self.checkpoint / "model.safetensors"

    def _gguf(self, half: str) -> Path:
        return self.checkpoint.with_name(f"{self.shape.name}-{half}.gguf")

    def freight(self, workload: Workload, limit_bytes: int) -> tuple[Leg, Job]:
        options = {
            "checkpoint": str(self.checkpoint),
            "spill_dir": str(self.spill_dir),
            "planner": self.planner,
            "limit_bytes": limit_bytes,
            "headroom_bytes": self.headroom_bytes,
            "block_rows": min(self.block_rows, len(workload.requests)),
            "sweep_tokens": self.sweep_tokens,
        }
        leg = Leg(engine=FREIGHT, setting="", module="freight", options=options)
        return leg, self._job(workload, len(workload.requests))

    def freight_once(self, workload: Workload) -> tuple[Leg, Job]:
        """Loads with memory to spare and answers nothing: the pack is then there."""
        leg, job = self.freight(workload, limit_bytes=0)
        options = leg.options | {"host_bytes": 2**40, "only_load": True}
        return dataclasses.replace(leg, options=options, setting="packs"), job

    def peer(self, name: str, batch: int, workload: Workload) -> tuple[Leg, Job]:
        """Batches of equal lengths all cost the same, so of those one is timed."""
        engine, _, kind = name.partition("-")
        job = self._job(workload, batch if workload.is_static else len(workload.requests))
        if engine == "llama":
            return self._llama(kind, batch, workload), job
        options = {
            "checkpoint": str(self.checkpoint),
            "dtype": _DTYPES[kind],
            "batch": batch,
            "folder": str(self.folder / engine),
        }
        setting = f"{_DTYPES[kind]}, batch {batch}"
        if engine == "accelerate":
            return Leg(engine=_ACCELERATE, setting=setting, module="padded", options=options), job
        longest = max(len(r.token_ids) + r.max_tokens for r in workload.requests)
        leg = Leg(
            engine=_AIRLLM,
            setting=setting,
            module="airllm_layers",
            options=options | {"max_tokens": longest},
            import_path=(airllm_folder(self.folder),),
        )
        return leg, job

    def _llama(self, half: str, batch: int, workload: Workload) -> Leg:
        options = {"checkpoint": str(self._gguf(half))}
        if workload.is_static:
            program = str(llama_program(self.folder, "llama-batched-bench"))
            return Leg(
                engine=_LLAMA,
                setting=f"{half}, batch {batch}",
                module="llama_batched",
                options=options | {"program": program, "shared_tokens": workload.shared_tokens},
            )
        program = str(llama_program(self.folder, "llama-server"))
        return Leg(
            engine=_LLAMA,
            setting=f"{half}, {batch} slots",
            module="llama_server",
            options=options | {"program": program, "slots": batch, "no_repack": True},
        )

    def _job(self, workload: Workload, rows: int) -> Job:
        return Job(
            requests=workload.requests[:rows],
            threads=self.threads,
            ignore_eos=True,
            options={},
        )
