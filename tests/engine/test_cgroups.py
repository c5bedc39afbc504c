"""Limits of control groups, found over fake trees of /proc and /sys of both generations."""

from pathlib import Path

import pytest

from engine.memory.cgroups import memory_limits
from engine.memory.measure import free_host_bytes

MIB = 2**20
V1_HIERARCHIES = """\
9:name=systemd:/
4:cpu,memory:{group}
3:cpuset:/elsewhere
0::/
"""


class Machine:
    """What one process sees of its groups."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.groups = folder / "groups"
        for each in (self.proc, self.groups):
            each.mkdir()

    def see(self, cgroup: str, *mounts: str) -> None:
        """Each mount: the root, a space, and "cgroup2" or the controllers of the first generation."""
        (self.proc / "cgroup").write_text(cgroup)
        lines = ["22 1 0:21 / /proc rw,nosuid shared:5 - proc proc rw"]
        for mount in mounts:
            root, kind = mount.split()
            what = "cgroup2 cgroup2 rw" if kind == "cgroup2" else f"cgroup cgroup rw,{kind}"
            lines.append(f"31 22 0:28 {root} {self.groups} rw,relatime shared:9 - {what}")
        (self.proc / "mountinfo").write_text("\n".join(lines) + "\n")

    def limit(self, group: str, limit: object, *, used: int = 0, v1: bool = False) -> Path:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        name, usage = names if v1 else ("memory.max", "memory.current")
        folder = self.groups / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{limit}\n")
        (folder / usage).write_text(f"{used}\n")
        return folder / name

    def limits(self) -> list[Path]:
        return memory_limits(self.proc)

    def free_bytes(self) -> int:
        meminfo = self.proc / "meminfo"
        meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 1048576 kB\n")
        return free_host_bytes(self.limits(), meminfo)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_nested_groups_limits_are_those_of_all_groups_around_it(machine: Machine) -> None:
    machine.see("0::/user.slice/job/step\n", "/ cgroup2")
    outer = machine.limit("user.slice", 700 * MIB, used=400 * MIB)
    inner = machine.limit("user.slice/job", 500 * MIB, used=100 * MIB)
    own = machine.limit("user.slice/job/step", "max", used=90 * MIB)
    machine.limit("other.slice", 1)
    assert machine.limits() == [own, inner, outer]
    assert machine.free_bytes() == 300 * MIB


@pytest.mark.parametrize("group", ["/", "/docker/c0ffee", "/../other"])
def test_a_container_that_sees_only_its_own_group_takes_that_one(
    machine: Machine, group: str
) -> None:
    machine.see(f"0::{group}\n", "/ cgroup2")
    own = machine.limit(".", 600 * MIB, used=250 * MIB)
    assert machine.limits() == [own]
    assert machine.free_bytes() == 350 * MIB


def test_a_mount_that_begins_at_the_containers_group_is_looked_at_from_there(
    machine: Machine,
) -> None:
    machine.see("0::/docker/c0ffee/nested\n", "/docker/c0ffee cgroup2")
    own = machine.limit("nested", 100 * MIB)
    around = machine.limit(".", 90 * MIB)
    assert machine.limits() == [own, around]
    assert machine.free_bytes() == 90 * MIB


def test_of_the_first_generation_the_memory_hierarchy_alone_counts(machine: Machine) -> None:
    group = "/docker/c0ffee"
    machine.see(V1_HIERARCHIES.format(group=group), "/ cpuset", "/ cpu,memory")
    own = machine.limit("docker/c0ffee", 600 * MIB, used=250 * MIB, v1=True)
    outer = machine.limit("docker", 9223372036854771712, used=300 * MIB, v1=True)
    stat = f"inactive_file 0\ntotal_inactive_file {50 * MIB}\n"
    (own.parent / "memory.stat").write_text(stat)
    assert machine.limits() == [own, outer]
    assert machine.free_bytes() == 400 * MIB


def test_without_control_groups_there_is_no_limit(machine: Machine, tmp_path: Path) -> None:
    machine.see("")
    assert machine.limits() == []
    assert memory_limits(tmp_path / "no-proc") == []
    assert machine.free_bytes() == 1024 * MIB


def test_this_machines_own_files_can_be_read() -> None:
    assert all(limit.read_text().strip() for limit in memory_limits())
    assert free_host_bytes() > 0
