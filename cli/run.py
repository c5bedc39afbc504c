"""`freight run`: answer a file offline, with a progress bar; no Redis, no server, no ledger."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import progress_bar, progress_console, say
from cli.model import find_model
from cli.options import (
    ComputeIn,
    DiskSpace,
    GpuMemory,
    HostMemory,
    ModelOption,
    PolicyFile,
    SpillDir,
    Trace,
    overridden,
)
from cli.report_table import report_table, report_text
from cli.result_files import ResultPaths, open_results
from jobs.settings import Settings

if TYPE_CHECKING:  # what runs the engine is loaded by the command alone
    from cli.offline import OfflineBatch, OfflineRun, Tally
    from worker.model import EngineReport


def run(
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests, one a line.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Results, as they finish.")],
    model: ModelOption = None,
    *,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    disk_space: DiskSpace = None,
    spill_dir: SpillDir = None,
    compute_dtype: ComputeIn = None,
    policy: PolicyFile = None,
    trace: Trace = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip the lines that OUT.jsonl holds already.")
    ] = False,
) -> None:
    """Answer IN.jsonl in this process. Failed lines go to OUT.errors.jsonl. 0 if none failed."""
    settings = overridden(
        Settings.from_environment(),
        model=model,
        gpu_memory_bytes=gpu_memory,
        host_memory_bytes=host_memory,
        disk_space_bytes=disk_space,
        spill_dir=spill_dir,
        compute_dtype=compute_dtype,
        policy=policy,
        trace_file=trace,
    )
    settings = dataclasses.replace(settings, model=str(find_model(settings)))
    paths = ResultPaths.beside(source, out)
    try:
        tally = answer_file(source, paths, settings, resume=resume)
    except KeyboardInterrupt:
        say(f"stopped; what is finished is in {out}, and --resume goes on from there")
        raise typer.Exit(130) from None
    if tally.num_refused:
        say(f"{tally.num_refused} lines failed; see {paths.errors}")
        raise typer.Exit(1)


def answer_file(source: Path, paths: ResultPaths, settings: Settings, *, resume: bool) -> "Tally":
    from cli.file_workload import waiting_of  # noqa: PLC0415 (see above)
    from cli.offline import OfflineRun, open_batch  # noqa: PLC0415
    from worker.model import (  # noqa: PLC0415
        load_engine,
        load_renderer,
        load_tokenizer,
        served_model,
    )

    batch = open_batch(source, settings)
    with open_results(paths, resume=resume) as files:
        say(f"loading {settings.model}")
        max_context_tokens = served_model(settings).max_context_tokens
        renderer = load_renderer(settings, load_tokenizer, max_context_tokens=max_context_tokens)
        waiting = waiting_of(batch, renderer)
        loaded = load_engine(settings, [waiting] if waiting else [])
        with contextlib.closing(loaded.engine) as engine:
            offline = OfflineRun(batch, engine=engine, renderer=renderer, files=files)
            _go_with_progress(offline, batch)
            _show_report(engine.report())
    return offline.tally


def _show_report(report: "EngineReport") -> None:
    told = report.as_dict()
    say(f"  {told['policy_reason']}")
    say(report_text(told))
    progress_console().print(report_table(report))


def _go_with_progress(offline: "OfflineRun", batch: "OfflineBatch") -> None:
    started_s = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("running", total=batch.num_lines, rate="")

        def show(tally: "Tally") -> None:
            rate = tally.output_tokens / (time.monotonic() - started_s)
            text = f"{tally.output_tokens} tokens, {rate:.1f}/s"
            bar.update(task, completed=tally.num_settled, rate=text)

        offline.go(show)
    tally = offline.tally
    say(
        f"{tally.num_answered} lines answered, {tally.num_refused} failed, "
        f"{tally.num_skipped} answered before; {tally.output_tokens} output tokens "
        f"in {time.monotonic() - started_s:.1f} s"
    )
