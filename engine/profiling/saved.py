"""A profile of this machine on disk: when it holds still, and when the machine is measured anew."""

import dataclasses
import datetime as dt
import logging
from pathlib import Path
from typing import Any, Final

from engine.errors import RecordError
from engine.memory.machine import Machine, this_machine
from engine.planning.records import read_record, to_json, write_record
from engine.profiling.measure import FULL, QUICK, Progress, measure
from engine.profiling.measurement import Measured

FORMAT: Final = 1
"""Part of what a profile is valid for: raise it when other things are measured, or otherwise."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What was measured, when, and of which machine, by the disk of which spill folder."""

    format: int
    measured_at: str
    is_quick: bool
    machine: Machine
    spill_dir: str
    measured: Measured


def measured_or_saved(
    path: Path,
    *,
    spill_dir: Path,
    is_quick: bool,
    force: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """What `path` holds, if it is of this machine, these libraries and this folder, and no quick one
    where a full one is wanted; else measured now, and written there. Raises EngineError.
    """
    reason = "it was asked for" if force else _reason_to_measure(path, spill_dir, is_quick=is_quick)
    if reason is None:
        return read_record(Profile, path)
    _log.info(
        "this machine is measured (%s): %s",
        "some seconds" if is_quick else "about a minute",
        reason,
    )
    profile = Profile(
        format=FORMAT,
        measured_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        is_quick=is_quick,
        machine=this_machine(),
        spill_dir=str(spill_dir.absolute()),
        measured=measure(spill_dir, effort=QUICK if is_quick else FULL, progress=progress),
    )
    write_record(path, profile)
    return profile


def _reason_to_measure(path: Path, spill_dir: Path, *, is_quick: bool) -> str | None:
    """None: the saved profile will do."""
    if not path.exists():
        return "it never was"
    try:
        saved = read_record(Profile, path)
    except RecordError as error:
        return str(error)
    now = _valid_for(this_machine(), spill_dir)
    then = {"format": saved.format, **to_json(saved.machine), "spill_dir": saved.spill_dir}
    changed = [
        f"{name} was {then[name]}, and is {now[name]}" for name in now if then[name] != now[name]
    ]
    if saved.is_quick and not is_quick:
        changed.append("it was measured quickly")
    return changed[0] if changed else None


def _valid_for(machine: Machine, spill_dir: Path) -> dict[str, Any]:
    return {"format": FORMAT, **to_json(machine), "spill_dir": str(spill_dir.absolute())}
