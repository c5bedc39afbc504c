"""Packs written in processes of their own: measured, or killed with -9 at a chosen point."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from engine.compute.skeleton import build_skeleton
from engine.memory import packing
from engine.memory.checkpoint import open_checkpoint
from engine.memory.manifest import Pack
from engine.memory.pack import ensure_pack


def write_large_model(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32) -> Path:
    """A seeded checkpoint of any size, one shard a tensor, never whole in memory."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.save_pretrained(folder)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for index, (name, shape) in enumerate(_unfused(shapes)):
        weight_map[name] = f"shard-{index}.safetensors"
        value = torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=generator)
        safetensors.torch.save_file({name: value}, folder / weight_map[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _unfused(shapes: dict[str, torch.Size]) -> list[tuple[str, torch.Size]]:
    """Mixtral's experts as its checkpoints have them; everything else as it is."""
    found: list[tuple[str, torch.Size]] = []
    for name, shape in shapes.items():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            found.append((name, shape))
            continue
        stem = name.rpartition(".mlp.")[0] + ".block_sparse_moe.experts"
        for expert in range(shape[0]):
            if name.endswith("down_proj"):
                found.append((f"{stem}.{expert}.w2.weight", shape[1:]))
            else:
                half = torch.Size((shape[1] // 2, shape[2]))
                found += [(f"{stem}.{expert}.{leaf}.weight", half) for leaf in ("w1", "w3")]
    return found


def pack_source(source: Path, spill_dir: Path, **options: Any) -> Pack:
    checkpoint = open_checkpoint(source)
    skeleton = build_skeleton(checkpoint.config, attention="eager")
    options = {"disk_bytes": 2**33} | options
    return ensure_pack(checkpoint, skeleton, spill_dir=spill_dir, **options)


def pack_and_die(source: Path, spill_dir: Path, *, at_operation: int) -> bool:
    """Pack in another process, which kills itself at the n-th write or sync; whether it died.

    A write that it dies in is half done.
    """
    process = _processes().Process(
        target=_pack_until_killed, args=(source, spill_dir, at_operation)
    )
    process.start()
    process.join()
    assert process.exitcode in {0, -signal.SIGKILL}
    died: bool = process.exitcode == -signal.SIGKILL
    return died


def peak_bytes_of_packing(source: Path, spill_dir: Path) -> int:
    """How far resident memory rises while the source is packed, in a process of its own."""
    context = _processes()
    answers = context.SimpleQueue()
    process = context.Process(target=_measure, args=(source, spill_dir, answers.put))
    process.start()
    process.join()
    assert process.exitcode == 0
    peak_bytes: int = answers.get()
    return peak_bytes


def _processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _pack_until_killed(source: Path, spill_dir: Path, at_operation: int) -> None:
    packing.SYNC_BYTES = 200_000  # type: ignore[misc]  # several syncs even in a small model
    num_left = at_operation
    pwrite, fsync = os.pwrite, os.fsync

    def die_if_due(last_act: Callable[[], object]) -> None:
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_pwrite(file: int, data: memoryview, offset: int) -> int:
        die_if_due(lambda: pwrite(file, data[: len(data) // 2], offset))
        return pwrite(file, data, offset)

    def watched_fsync(file: int) -> None:
        die_if_due(lambda: None)
        fsync(file)

    os.pwrite = watched_pwrite  # type: ignore[assignment]
    os.fsync = watched_fsync  # type: ignore[assignment]
    pack_source(source, spill_dir)


def _measure(source: Path, spill_dir: Path, answer: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(source)
    skeleton = build_skeleton(checkpoint.config, attention="eager")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status_bytes("VmRSS")
    ensure_pack(checkpoint, skeleton, spill_dir=spill_dir, disk_bytes=2**33)
    answer(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
