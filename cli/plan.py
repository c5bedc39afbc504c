"""`freight plan`: what would be decided for a model, a machine and a file of requests; runs nothing."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cli.console import say, show
from cli.model import find_model
from cli.options import ComputeIn, DiskSpace, GpuMemory, HostMemory, overridden
from cli.plan_table import (
    corrections_text,
    placement_table,
    policy_table,
    prediction_table,
    prediction_text,
    sensitivity_table,
)
from jobs.settings import Settings

if TYPE_CHECKING:  # torch is loaded by the command alone
    from cli.planned import Question
    from engine.planning.plan import Plan


def plan(
    model: Annotated[
        str, typer.Argument(help="A folder (its config.json will do) or a GGUF file.")
    ],
    *,
    workload: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Requests, as for `freight run`.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="Another machine's profile, or one known by name."),
    ] = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    disk_space: DiskSpace = None,
    compute_dtype: ComputeIn = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the policy here.")
    ] = None,
    frontier_file: Annotated[
        Path | None,
        typer.Option("--frontier", metavar="FILE.html", help="Draw throughput against latency."),
    ] = None,
) -> None:
    """Show what Freight would decide and what it predicts. No weights are needed."""
    from cli.planned import Question  # noqa: PLC0415 (torch is slow to import)
    from engine.planning.records import write_record, write_text  # noqa: PLC0415

    settings = overridden(
        Settings.from_environment(),
        gpu_memory_bytes=gpu_memory,
        host_memory_bytes=host_memory,
        disk_space_bytes=disk_space,
        compute_dtype=compute_dtype,
    )
    settings = dataclasses.replace(settings, model=model)
    settings = dataclasses.replace(settings, model=str(find_model(settings)))
    question = Question.of(settings, workload=workload, hardware=hardware)
    found = question.answer()
    _show(question, found)
    if json_file is not None:
        write_record(json_file, found.policy)
        say(f"the policy is in {json_file}; --policy {json_file} carries it out")
    if frontier_file is not None:
        write_text(frontier_file, question.page(found))
        say(f"the frontier is in {frontier_file}")


def _show(question: "Question", found: "Plan") -> None:
    console = Console(highlight=False)
    workload, machine = question.situation.workload, question.situation.hardware
    show(
        f"{question.source} on {machine.name}\n"
        f"{workload.num_rows:,} rows of {workload.mean_prompt_tokens:.0f} prompt tokens "
        f"({workload.mean_own_tokens:.0f} of their own) and {workload.mean_output_tokens:.0f} "
        f"output tokens in the mean\n"
    )
    for table in (policy_table(found.policy), placement_table(found.policy)):
        console.print(table)
        show("")
    show(f"{prediction_text(found.prediction)}\n")
    console.print(prediction_table(found.prediction))
    show("")
    console.print(sensitivity_table(found))
    if text := corrections_text(question.corrections):
        show(f"\n{text}")
