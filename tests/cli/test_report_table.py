"""The report for a person: a row a link, units in reach of the eye, nothing made up."""

import io
import re

from rich.console import Console

from cli.report_table import report_table, report_text
from engine.planning.ceilings import Ceilings
from engine.planning.policy import Tier
from engine.sweep.report import Report
from engine.timeline import Total, Track


def report() -> Report:
    def busy(seconds: float, *, num_bytes: int = 0, flops: int = 0) -> Total:
        return Total(
            num_spans=1, busy_s=seconds, covered_s=seconds, num_bytes=num_bytes, flops=flops
        )

    return Report(
        policy_reason="by hand",
        ceilings=Ceilings(
            gemm_flops_per_s=2e11, memory_bytes_per_s=2e10, disk_read_bytes_per_s=1e9
        ),
        num_sweeps=4,
        sweep_s=10.0,
        weights_fetched_s=8.0,
        weights_waited_s=2.0,
        generated_tokens=50,
        sweeps_by_rows={16: 2, 20: 2},
        totals={
            Track.DISK_READ: busy(8.0, num_bytes=6_000_000_000),
            Track.LAYERS: busy(6.0, flops=900_000_000_000),
            Track.WAIT: busy(2.0),
        },
        idle_s={Track.DISK_READ: 1.5},
        peak_bytes={Tier.GPU: 0, Tier.CPU: 1_500_000_000, Tier.DISK: 300},
    )


def test_a_row_tells_what_was_done_beside_what_could_have_been() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(report_table(report()))
    assert isinstance(console.file, io.StringIO)
    rows = [re.split(r" {2,}", line.strip()) for line in console.file.getvalue().splitlines()]
    assert ["disk read", "6.0 GB", "8.00 s", "750.0 MB/s", "1.0 GB/s", "75%"] in rows
    layers = ["layers", "900.0 GFLOP", "6.00 s", "150.0 GFLOP/s", "200.0 GFLOP/s", "75%"]
    assert layers in rows
    assert ["waiting for weights", "2.00 s"] in rows


def test_the_sums_are_said_in_words() -> None:
    text = report_text(report().as_dict())
    assert "4 sweeps in 10.0 s, 18.0 rows in each and 20 at most; 0 preempted" in text
    assert "50 generated tokens, 5.0 generated a second" in text
    assert "75% of weight I/O hidden behind compute, 67% of compute hidden behind I/O" in text
    assert "60% of the roofline, 1.5 s of bubbles" in text
    assert "at most 1.5 GB host memory, 300 B disk" in text
