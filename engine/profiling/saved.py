"""A profile of this machine on disk: when it holds still, and when the machine is measured anew."""

import logging
from pathlib import Path
from typing import Final

from engine.errors import HardwareError, RecordError
from engine.memory.machine import this_machine
from engine.planning.hardware import MOST_OTHERS_SHARE, Hardware
from engine.planning.records import read_text, write_text
from engine.profiling.description import hardware_of
from engine.profiling.measure import FULL, QUICK, Progress, measure

_FORMAT: Final = "6"
"""Of what is measured and how: raised when an old profile is none any more."""

_EFFORT: Final = "effort"
_IN_FULL: Final = "in full"
_log = logging.getLogger(__name__)


def read_hardware(path: Path) -> Hardware:
    """Raises HardwareError or RecordError; both name the file."""
    try:
        return Hardware.from_json(read_text(path))
    except HardwareError as error:
        raise HardwareError(f"{path}: {error}") from error


def measured_or_saved(
    path: Path,
    *,
    spill_dir: Path,
    is_quick: bool,
    force: bool = False,
    progress: Progress | None = None,
) -> Hardware:
    """What `path` holds, if it is of this machine, these libraries and this folder, and no quick one
    where a full one is wanted, and was measured while few others ran; else measured now, and written
    there. Raises EngineError.
    """
    saved, reason = _saved(path, spill_dir, is_quick=is_quick)
    if saved is not None and not force:
        return saved
    _log.info(
        "this machine is measured, which takes %s: %s",
        "some seconds" if is_quick else "nearly two minutes",
        "it was asked for" if force else reason,
    )
    measured = measure(spill_dir, effort=QUICK if is_quick else FULL, progress=progress)
    hardware = hardware_of(measured, valid_for(spill_dir, is_quick=is_quick))
    write_text(path, hardware.to_json())
    if hardware.is_crowded:
        _log.warning(
            "%s: plans will be misled, and it is measured anew at the next start",
            _crowded(hardware),
        )
    return hardware


def _crowded(hardware: Hardware) -> str:
    return (
        f"others had {hardware.others_share:.0%} of the cores' time while this machine was measured, "
        f"of {MOST_OTHERS_SHARE:.0%} at most"
    )


def valid_for(spill_dir: Path, *, is_quick: bool) -> dict[str, str]:
    """What a profile of this moment would hold for."""
    return {
        "profile": _FORMAT,
        **this_machine().as_dict(),
        "spill folder": str(spill_dir.absolute()),
        _EFFORT: "quick" if is_quick else _IN_FULL,
    }


def _saved(path: Path, spill_dir: Path, *, is_quick: bool) -> tuple[Hardware | None, str]:
    """The saved profile if it will do; else why not."""
    if not path.exists():
        return None, "it never was"
    try:
        saved = read_hardware(path)
    except (HardwareError, RecordError) as error:
        return None, str(error)
    then, now = dict(saved.versions), valid_for(spill_dir, is_quick=is_quick)
    if then.get(_EFFORT) == _IN_FULL:
        now[_EFFORT] = _IN_FULL  # which is as good where a quick one would do
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            return None, f"{name} was {then.get(name)}, and is {now.get(name)}"
    if saved.is_crowded:
        return None, _crowded(saved)
    return saved, ""
