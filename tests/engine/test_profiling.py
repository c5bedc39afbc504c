"""A profile: everything is measured once, kept as it was, and measured anew when it holds no more."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.planning.records import read_record, to_json, write_record
from engine.profiling import saved
from engine.profiling.measure import Effort, measure
from engine.profiling.measurement import Figure, Measured
from engine.profiling.overheads import Overheads, fit_overheads
from engine.profiling.saved import Profile, measured_or_saved
from tests.support.profiles import MEASURED, profile_of

LEAST = Effort(
    seconds=0.0,
    overhead_s=0.0,
    gemm_rows=(1, 4),
    request_bytes=(2**16, 2**18),
    file_bytes=2**20,
    scanned_bytes=2**20,
)


def test_all_that_a_plan_asks_is_measured_and_told_step_by_step(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    measured = measure(tmp_path / "spill", effort=LEAST, progress=lambda *step: told.append(step))
    for figure in (Figure.DISK_READ, Figure.DISK_WRITE):
        assert [at for at, _ in measured.curve(figure)] == [2**16, 2**18]
    assert measured.kinds(Figure.GEMM)[:2] == ("cpu/float32", "cpu/bfloat16")
    assert [rows for rows, _ in measured.curve(Figure.GEMM, "cpu/bfloat16")] == [1, 4]
    assert measured.rate(Figure.MEMORY_READ, "cpu") > 0
    assert measured.rate(Figure.ATTENTION, "cpu/float32") > 0
    assert measured.rate(Figure.EXPANSION, "bfloat16 to cpu/float32") > 0
    assert sum(dataclasses.astuple(measured.overheads["cpu"])) > 0
    assert measured.host_bytes > 0
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert told[-1] == (len(told) - 1, len(told) - 1, "")
    assert list((tmp_path / "spill").iterdir()) == []


def test_a_folder_that_takes_no_file_is_refused_by_name(tmp_path: Path) -> None:
    effort = dataclasses.replace(LEAST, request_bytes=(2**48,), file_bytes=2**48)
    with pytest.raises(EngineError, match="spill cannot be measured with a file of 281,474,976"):
        measure(tmp_path / "spill", effort=effort)


@pytest.mark.parametrize(
    "told",
    [
        Overheads(sweep_s=1e-3, step_s=2e-4, row_s=3e-5, row_step_s=4e-6),
        Overheads(sweep_s=0.0, step_s=2e-4, row_s=0.0, row_step_s=0.0),
    ],
)
def test_overheads_are_what_four_sweeps_say(told: Overheads) -> None:
    def sweep_s(layers: int, rows: int) -> float:
        return told.sweep_s + layers * told.step_s + rows * (told.row_s + layers * told.row_step_s)

    found = fit_overheads(
        [sweep_s(layers, rows) for layers in (2, 10) for rows in (1, 32)],
        layers=(2, 10),
        rows=(1, 32),
    )
    for field in dataclasses.fields(Overheads):
        expected = getattr(told, field.name)
        assert getattr(found, field.name) == pytest.approx(expected, abs=1e-12)


def test_noise_makes_no_overhead_negative() -> None:
    found = fit_overheads([4.0, 3.0, 2.0, 1.0], layers=(2, 10), rows=(1, 32))
    assert min(dataclasses.astuple(found)) >= 0


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Effort]:
    """The efforts that were spent; nothing is measured."""
    spent: list[Effort] = []

    def pretend(
        spill_dir: Path, *, effort: Effort, progress: Callable[..., None] | None = None
    ) -> Measured:
        spent.append(effort)
        return MEASURED

    monkeypatch.setattr(saved, "measure", pretend)
    return spent


def test_a_machine_is_measured_once_and_the_file_is_what_it_was(
    tmp_path: Path, counted: list[Effort]
) -> None:
    path = tmp_path / "state" / "profile.json"
    first = measured_or_saved(path, spill_dir=tmp_path, is_quick=True)
    assert measured_or_saved(path, spill_dir=tmp_path, is_quick=True) == first
    assert read_record(Profile, path) == first
    assert first.measured == MEASURED
    assert len(counted) == 1
    full = measured_or_saved(path, spill_dir=tmp_path, is_quick=False)
    assert (first.is_quick, full.is_quick) == (True, False)
    assert measured_or_saved(path, spill_dir=tmp_path, is_quick=True) == full
    assert len(counted) == 2
    assert counted[0].seconds < counted[1].seconds
    measured_or_saved(path, spill_dir=tmp_path, is_quick=True, force=True)
    assert len(counted) == 3


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another processor": lambda data: data["machine"].update(cpu="Abacus"),
    "fewer cores": lambda data: data["machine"].update(num_cores=0),
    "another library": lambda data: data["machine"]["versions"].update(torch="0.1"),
    "a GPU less": lambda data: data["machine"].update(gpu="T4"),
    "another folder": lambda data: data.update(spill_dir="/elsewhere"),
    "another format": lambda data: data.update(format=0),
    "half a file": lambda data: data.pop("measured"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_it_is_measured_anew_for(what: str, tmp_path: Path, counted: list[Effort]) -> None:
    path = tmp_path / "profile.json"
    write_record(path, profile_of(tmp_path))
    measured_or_saved(path, spill_dir=tmp_path, is_quick=False)
    assert counted == []
    data = to_json(profile_of(tmp_path))
    CHANGES[what](data)
    path.write_text(json.dumps(data))
    measured_or_saved(path, spill_dir=tmp_path, is_quick=True)
    assert len(counted) == 1
