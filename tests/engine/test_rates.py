"""What is measured of a machine: the right work is timed, and nothing of it is left behind."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.compute import rates
from engine.compute.lost import lost_beside_fetches, lost_beside_reads
from engine.compute.segments import Segment
from engine.memory import links
from engine.memory.kv_cache import KVCache, KVShape
from engine.memory.links import disk_rates, memory_read_rate
from engine.memory.machine import this_machine
from engine.memory.stopwatch import Rate, rate_of, rate_of_trials
from engine.memory.tiers import DirectReader, HostBuffer

CPU = torch.device("cpu")


def test_a_rate_is_the_median_trials_and_its_spread_that_of_the_middle_half() -> None:
    rate = rate_of_trials([1.0, 2.0, 4.0, 5.0, 100.0], amount=8)
    assert rate == Rate(per_s=2.0, spread=0.75)


def test_a_call_is_tried_three_times_after_one_that_does_not_count() -> None:
    calls: list[int] = []
    rate = rate_of(lambda: calls.append(1), amount=1, device=CPU, seconds=0.0)
    assert len(calls) == 4
    assert rate.per_s > 0


def test_the_disk_is_read_and_written_where_it_was_asked_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []

    class Watched(DirectReader):
        def read(self, buffer: HostBuffer, *, offset_bytes: int, num_bytes: int) -> torch.Tensor:
            found = super().read(buffer, offset_bytes=offset_bytes, num_bytes=num_bytes)
            assert bool(found.any()), "every byte of the file was written"
            read.append((offset_bytes, num_bytes))
            return found

    monkeypatch.setattr(links, "DirectReader", Watched)
    sizes = [2**16, 2**20]
    found = disk_rates(tmp_path, sizes, file_bytes=2**22, seconds=0.0)
    assert [rate.request_bytes for rate in found] == sizes
    assert all(rate.read.per_s > 0 and rate.write.per_s > 0 for rate in found)
    assert read == [(2**16 * at, 2**16) for at in range(4)] + [
        (2**20 * at, 2**20) for at in range(4)
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        disk_rates(tmp_path / "gone", [2**16], file_bytes=2**20, seconds=0.0)


def _amounts(monkeypatch: pytest.MonkeyPatch, module: object) -> list[float]:
    """What is timed is done once, and not timed."""
    amounts: list[float] = []

    def once(
        run: Callable[[], object], *, amount: float, device: torch.device, seconds: float
    ) -> Rate:
        run()
        amounts.append(amount)
        return Rate(per_s=amount, spread=0.0)

    monkeypatch.setattr(module, "rate_of", once)
    return amounts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_attention_count_what_they_do(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    amounts = _amounts(monkeypatch, rates)
    found = rates.gemm_rates([1, 16], dtype=dtype, device=CPU, seconds=0.0)
    assert [each.rows for each in found] == [1, 16]
    assert amounts == [2 * 2048 * 2048, 16 * 2 * 2048 * 2048]
    for heads_per_key in (1, 4):
        rates.attention_rate(heads_per_key=heads_per_key, dtype=dtype, device=CPU, seconds=0.0)
    assert amounts[2:4] == [32 * 512 * 4 * (64 + 64) * dtype.itemsize] * 2
    (rate,) = rates.expansion_rates([4], dtype, dtype=dtype, device=CPU, seconds=0.0)
    assert (rate.rows, amounts[4:]) == (4, [1.0] * 6)
    # Two that take as long are told apart by as little as can be.
    assert rate.rate.per_s == pytest.approx(1024 * 1024 * dtype.itemsize / 0.02)
    prompts = rates.prompt_rate(16, dtype=dtype, device=CPU, seconds=0.0)
    pairs = 16 * 17 // 2 - 4 * 5 // 2
    assert prompts.per_s == pytest.approx(4 * pairs * 8 * 4 * 64 / 0.02)


def test_what_reads_and_fetches_beside_take_is_a_share(tmp_path: Path) -> None:
    lost = lost_beside_reads(tmp_path, request_bytes=2**18, file_bytes=2**20, seconds=0.0)
    assert 0.0 <= lost < 1.0
    assert 0.0 <= lost_beside_fetches(tmp_path, seconds=0.0) < 1.0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="gone"):
        lost_beside_reads(tmp_path / "gone", request_bytes=2**18, file_bytes=2**20, seconds=0.0)
    assert rates.product_overhead_s(seconds=0.0) >= 0.0


def test_rows_that_attend_lie_beside_each_other_and_see_all_of_their_context() -> None:
    cache = KVCache(
        [KVShape(num_heads=1, key_size=1, value_size=1)],
        budget_bytes=8 * 3 * 512,
        dtype=torch.float32,
    )
    segments = [Segment(start=at, num_tokens=1, past=511, slot=512 * at) for at in range(3)]
    packing = rates._packing(cache, segments)
    assert packing.attended(None).num_cached == packing.num_slots == 3 * 512
    assert packing.slots.tolist() == [511, 1023, 1535]


def test_memory_is_scanned_as_often_as_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    amounts = _amounts(monkeypatch, links)
    memory_read_rate(CPU, num_bytes=4096, seconds=0.0)
    assert amounts == [4096]


def test_the_machine_tells_its_processor_and_its_libraries(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    lines = ["processor\t: 0", "model name\t: Abacus 3000 @ 1 Hz: fast", "model name\t: other"]
    cpuinfo.write_text("\n".join(lines))
    machine = this_machine(cpuinfo)
    assert machine.cpu == "Abacus 3000 @ 1 Hz: fast"
    assert machine.versions["torch"] == torch.__version__
    assert machine == this_machine(cpuinfo)
    assert machine.as_dict()["cpu"] == "Abacus 3000 @ 1 Hz: fast"
    assert "gpu" in machine.as_dict() or machine.gpu is None
    assert this_machine(tmp_path / "none").cpu


def test_places_go_round() -> None:
    assert list(itertools.islice(links._places(4, 12), 5)) == [0, 4, 8, 0, 4]
