"""A request file as what waits: its lines sampled, rendered and summed up, as intake would."""

from pathlib import Path
from typing import Final

from cli.errors import StartError
from cli.offline import OfflineBatch, open_batch
from jobs.errors import RequestError
from jobs.line import parse_request_line
from jobs.line_group import WaitingBatch
from jobs.settings import Settings
from worker.grouping import RenderedGrouping
from worker.input_lines import input_lines
from worker.render import Renderer

_MOST_LINES: Final = 2_000
"""That are rendered: of a longer file every so many-th."""


def waiting_of_file(path: Path, settings: Settings, renderer: Renderer) -> WaitingBatch:
    """Raises StartError for a file that could not run, or none of whose lines could."""
    found = waiting_of(open_batch(path, settings), renderer)
    if found is None:
        raise StartError(f"{path}: none of its lines can run on this model")
    return found


def waiting_of(source: OfflineBatch, renderer: Renderer) -> WaitingBatch | None:
    """None if no line can run."""
    every = -(-source.num_lines // _MOST_LINES)
    grouping = RenderedGrouping()
    with source.path.open("rb") as stream:
        lines = input_lines(stream, max_line_bytes=source.max_line_bytes)
        for index, line in enumerate(lines):
            if index % every or line.raw is None:
                continue
            request, _ = parse_request_line(
                line.raw, line=line.number, endpoint=source.batch.endpoint
            )
            assert request is not None, "the file was looked at"
            try:
                grouping.add(renderer.render(source.batch, index, request.body))
            except RequestError:
                continue  # it will get its error, and takes no place
    groups = grouping.groups()
    if not groups:
        return None
    return WaitingBatch(
        batch_id=source.batch.id, num_open=source.num_lines, groups=groups, outputs=()
    )
