from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.errors import BudgetError
from engine.memory.measure import free_host_bytes, measure_budgets

MIB = 2**20
MEMINFO = """MemTotal:       16000000 kB
MemFree:          100000 kB
MemAvailable:    1048576 kB
HugePages_Total:       0"""


def write(folder: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def free_bytes(folder: Path) -> int:
    write(folder, {"meminfo": MEMINFO})
    limits = (folder / "memory.max", folder / "memory.limit_in_bytes")
    return free_host_bytes(limits, folder / "meminfo")


def test_without_a_container_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert free_bytes(tmp_path) == 1024 * MIB


@pytest.mark.parametrize("limit", ["max", 9223372036854771712, 2048 * MIB])
def test_a_container_with_more_room_than_the_machine_changes_nothing(
    tmp_path: Path, limit: object
) -> None:
    write(tmp_path, {"memory.max": limit, "memory.current": 5 * MIB})
    assert free_bytes(tmp_path) == 1024 * MIB


def test_a_second_generation_container_leaves_its_limit_less_what_it_uses(tmp_path: Path) -> None:
    write(tmp_path, {"memory.max": 600 * MIB, "memory.current": 250 * MIB})
    assert free_bytes(tmp_path) == 350 * MIB


def test_page_cache_that_gives_way_does_not_count_as_used(tmp_path: Path) -> None:
    stat = f"anon 1\nfile {90 * MIB}\ninactive_file {60 * MIB}\nactive_file {30 * MIB}"
    write(
        tmp_path,
        {"memory.max": 600 * MIB, "memory.current": 250 * MIB, "memory.stat": stat},
    )
    assert free_bytes(tmp_path) == 410 * MIB


def test_a_first_generation_container_names_its_files_otherwise(tmp_path: Path) -> None:
    stat = f"cache 7\ntotal_inactive_file {50 * MIB}"
    write(
        tmp_path,
        {
            "memory.limit_in_bytes": 600 * MIB,
            "memory.usage_in_bytes": 250 * MIB,
            "memory.stat": stat,
        },
    )
    assert free_bytes(tmp_path) == 400 * MIB


def test_a_container_over_its_limit_has_nothing_free_and_not_less(tmp_path: Path) -> None:
    write(tmp_path, {"memory.max": 100 * MIB, "memory.current": 130 * MIB})
    assert free_bytes(tmp_path) == 0


def test_given_limits_are_taken_as_they_are_and_the_spill_folder_is_made(tmp_path: Path) -> None:
    spill_dir = tmp_path / "new" / "spill"
    budgets = measure_budgets(spill_dir=spill_dir, gpu_bytes=0, host_bytes=5, disk_bytes=7)
    assert (budgets.gpu_bytes, budgets.host_bytes, budgets.disk_bytes) == (0, 5, 7)
    assert spill_dir.is_dir()


def test_what_is_not_given_is_a_share_of_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.memory.measure.free_host_bytes", lambda: 1000)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2000, 9000))
    budgets = measure_budgets(spill_dir=tmp_path)
    assert (budgets.host_bytes, budgets.gpu_bytes) == (800, 1800)
    assert budgets.disk_bytes > 0


def test_bytes_of_a_gpu_that_is_not_there_are_refused_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert measure_budgets(spill_dir=tmp_path).gpu_bytes == 0
    with pytest.raises(BudgetError, match=r"8,000 bytes of GPU memory .* no GPU is usable"):
        measure_budgets(spill_dir=tmp_path, gpu_bytes=8000)
