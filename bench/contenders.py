"""The engines of the offloading benchmark, each as legs of one batch size over one workload."""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bench.legs.job import Job
from bench.llama_shape import HalfType, LlamaShape
from bench.peers import ROOT, airllm_folder, llama_program
from bench.runner import Leg
from bench.workloads import Workload

FREIGHT: Final = "Freight"
_AMPLE_BYTES: Final = 16 * 2**30
_ACCELERATE: Final = "Accelerate disk"
_AIRLLM: Final = "AirLLM"
_LLAMA: Final = "llama.cpp mmap"
_HALVES: Final[tuple[HalfType, ...]] = ("f16", "bf16")
DTYPES: Final[Mapping[str, str]] = {"f32": "float32", "bf16": "bfloat16"}

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
    headroom_bytes: int
    block_rows: int | None
    sweep_tokens: int | None
    profile: Path | None
    """Of this machine, to plan by; else fixed rules decide."""

    @property
    def checkpoint(self) -> Path:
        return self.shape.checkpoint(self.folder)

    @property
    def spill_dir(self) -> Path:
        return self.folder / "spill"

    def write_models(self, peers: list[str]) -> int:
        """Write what is not there yet; the bytes of the weights.

        In another process: torch's libraries, mapped here, would be nobody's memory in the legs.
        """
        halves = [half for half in _HALVES if f"llama-{half}" in peers]
        command = [sys.executable, "-m", "bench.seeded_model", f"--cache={self.folder}"]
        command += [*self.shape.as_arguments(), "--halves", *halves]
        subprocess.run(command, check=True, cwd=ROOT)
        return self.weights_file.stat().st_size

    def packs(self) -> list[Path]:
        """The weight files that Freight has written from this checkpoint."""
        return sorted(self.spill_dir.glob(f"packs/{self.shape.name}*/weights.bin"))

    @property
    def weights_file(self) -> Path:
        return self.checkpoint / "model.safetensors"

    def freight(self, workload: Workload, limit_bytes: int, *, kind: str) -> tuple[Leg, Job]:
        """`kind` is one of `DTYPES`."""
        options = {
            "checkpoint": str(self.checkpoint),
            "spill_dir": str(self.spill_dir),
            "profile": str(self.profile) if self.profile else None,
            "limit_bytes": limit_bytes,
            "headroom_bytes": self.headroom_bytes,
            "block_rows": self.block_rows,
            "sweep_tokens": self.sweep_tokens,
            "dtype": DTYPES[kind],
        }
        leg = Leg(engine=FREIGHT, setting=DTYPES[kind], module="freight", options=options)
        return leg, self._job(workload, len(workload.requests))

    def freight_once(self, workload: Workload) -> tuple[Leg, Job]:
        """Loads with memory to spare and answers nothing: the pack is then there."""
        leg, job = self.freight(workload, limit_bytes=0, kind="f32")
        options = leg.options | {"host_bytes": _AMPLE_BYTES, "only_load": True}
        return dataclasses.replace(leg, options=options, setting="packs"), job

    def peer(self, name: str, batch: int, workload: Workload) -> tuple[Leg, Job]:
        """Batches of equal lengths all cost the same, so of those one is timed."""
        engine, _, kind = name.partition("-")
        job = self._job(workload, batch if workload.is_static else len(workload.requests))
        if engine == "llama":
            return self._llama("f16" if kind == "f16" else "bf16", batch, workload), job
        # Of this model only: AirLLM takes whatever split it finds for its own.
        folder = self.folder / "peers" / engine / self.shape.name
        folder.mkdir(parents=True, exist_ok=True)
        options = {
            "checkpoint": str(self.checkpoint),
            "dtype": DTYPES[kind],
            "batch": batch,
            "folder": str(folder),
        }
        setting = f"{DTYPES[kind]}, batch {batch}"
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

    def _llama(self, half: HalfType, batch: int, workload: Workload) -> Leg:
        options = {"checkpoint": str(self.shape.gguf(self.folder, half))}
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
