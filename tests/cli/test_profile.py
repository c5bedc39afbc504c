"""`freight profile`: measured once, shown as a table that fits, written where it was asked."""

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.main import app
from cli.profile_table import profile_table, profile_text
from engine.profiling import saved
from engine.profiling.measurement import Measured
from engine.profiling.saved import read_hardware
from tests.support.profiles import MEASURED, hardware_here


def test_the_command_measures_once_and_writes_the_profile_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[object] = []

    def pretend(spill_dir: Path, *, effort: object, progress: object) -> Measured:
        spent.append(effort)
        return MEASURED

    monkeypatch.setattr(saved, "measure", pretend)
    monkeypatch.setenv("FREIGHT_STATE_DIR", str(tmp_path / "state"))
    out = tmp_path / "out.json"
    for _ in range(2):
        told = CliRunner().invoke(app, ["profile", "--out", str(out)])
        assert told.exit_code == 0, told.output
    assert len(spent) == 1
    assert read_hardware(out) == read_hardware(tmp_path / "state" / "profile.json")
    assert read_hardware(out).versions["effort"] == "in full"
    assert CliRunner().invoke(app, ["profile", "--force", "--quick"]).exit_code == 0
    assert len(spent) == 2


def test_the_table_has_a_row_a_figure_and_curves_by_their_points(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(profile_table(hardware_here(tmp_path)))
    text = captured.get()
    assert "1 at 64 KiB, 1 at 1 MiB, 1 at 32 MiB" in text
    assert "GFLOP: 7 at 1, 19.8 at 8, 56 at 64, 158 at 512" in text
    assert "20.0 GB" in text
    assert "a layer's step 600 µs, a row 40 µs, a row's layer" in " ".join(text.split())
    assert "GB: 6 at 1:1, 1.5 at 4:1" in text
    assert "a prompt's layer 80 µs, an expert 100 µs" in " ".join(text.split())
    assert text.count("±5%") == 17
    told = profile_text(hardware_here(tmp_path))
    assert "17.2 GB of host memory, 137.4 GB of disk may be used" in told
    assert "effort in full" in told
    assert "others" not in told
    crowded = dataclasses.replace(hardware_here(tmp_path), others_share=0.37)
    assert "others had 37.0% of the cores' time: too much" in profile_text(crowded)
