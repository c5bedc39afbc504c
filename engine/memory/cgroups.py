"""The memory limits of this process's control groups, of both generations, nested ones too."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

_V1_FILE: Final = "memory.limit_in_bytes"
_V2_FILE: Final = "memory.max"


class _Mount(NamedTuple):
    """A hierarchy of groups: the group named `root` in it is seen at `point`."""

    root: PurePosixPath
    point: Path
    is_v2: bool


def memory_limits(proc: Path = Path("/proc/self")) -> list[Path]:
    """The limit files of the process's group and of every group around it, innermost first.

    A container may see its own group as the root or not, and groups above its own not at all.
    """
    groups = dict(_groups(proc / "cgroup"))
    limits = []
    for mount in _mounts(proc / "mountinfo"):
        if (group := groups.get(mount.is_v2)) is not None:
            name = _V2_FILE if mount.is_v2 else _V1_FILE
            limits += [folder / name for folder in _folders(mount, group)]
    return [limit for limit in limits if limit.is_file()]


def _groups(cgroup: Path) -> Iterator[tuple[bool, PurePosixPath]]:
    """Whether of the second generation, and the process's group there. Lines: id:controllers:path."""
    for line in _lines(cgroup):
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            yield True, PurePosixPath(group)
        elif "memory" in controllers.split(","):
            yield False, PurePosixPath(group)


def _mounts(mountinfo: Path) -> Iterator[_Mount]:
    """Lines: id, parent, device, root, point, options, optional ones, "-", type, source, options."""
    for line in _lines(mountinfo):
        fields = line.split()
        kind, _source, options = fields[fields.index("-") + 1 :][:3]
        is_v2 = kind == "cgroup2"
        if is_v2 or (kind == "cgroup" and "memory" in options.split(",")):
            yield _Mount(PurePosixPath(fields[3]), Path(fields[4]), is_v2)


def _folders(mount: _Mount, group: PurePosixPath) -> Iterator[Path]:
    inside = group.relative_to(mount.root) if group.is_relative_to(mount.root) else group
    # A group outside what this mount shows: only the mount's own root can be looked at.
    parts = () if ".." in inside.parts else inside.relative_to(inside.anchor).parts
    for depth in range(len(parts), -1, -1):
        yield mount.point.joinpath(*parts[:depth])


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
