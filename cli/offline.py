"""A request file answered in this process: validation, rendering and engine, no queue, no ledger.

The parts are the worker's own, so a line gets the answer that the server would give it.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cli.errors import StartError
from cli.result_files import ResultFiles
from engine.config import Completion, Prompt
from engine.errors import PromptError
from jobs.batch import Batch, Endpoint, LineFault
from jobs.errors import InvalidRequestError, RequestError
from jobs.line import (
    LineRecord,
    broken_result,
    completed_result,
    parse_request_line,
    refused_result,
)
from jobs.settings import Settings
from worker.answering import Answerer, Gathering
from worker.input_lines import InputLine, input_lines
from worker.inspection import Inspection
from worker.model import Engine
from worker.render import Rendered, Renderer, error_body, parse_row_key
from worker.trials import Trials


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OfflineBatch:
    """A file that may run: one endpoint, one model, no faults."""

    path: Path
    batch: Batch
    num_lines: int
    max_line_bytes: int


@dataclasses.dataclass(slots=True, kw_only=True)
class Tally:
    """What this run did so far."""

    num_answered: int = 0
    num_refused: int = 0
    num_skipped: int = 0
    output_tokens: int = 0

    @property
    def num_settled(self) -> int:
        return self.num_answered + self.num_refused + self.num_skipped


def open_batch(path: Path, settings: Settings) -> OfflineBatch:
    """Look at every line. Raises StartError with all faults, as a batch would fail validation.

    The model was chosen when the run was started; the file's own name for it is taken as it is,
    so long as all lines agree.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error
    with stream:
        endpoint, model = _first_wishes(stream, settings)
        inspection = Inspection(
            endpoint=endpoint,
            served_model=model,
            max_lines=settings.max_batch_lines,
            max_line_bytes=settings.max_line_bytes,
        )
        stream.seek(0)
        lines = input_lines(stream, max_line_bytes=settings.max_line_bytes)
        faults = inspection.look(lines)
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if faults:
        raise StartError("\n".join([f"{path} cannot run:", *map(_fault_text, faults)]))
    return OfflineBatch(
        path=path,
        batch=_batch(digest, endpoint, model),
        num_lines=inspection.num_lines,
        max_line_bytes=settings.max_line_bytes,
    )


def _first_wishes(stream: BinaryIO, settings: Settings) -> tuple[Endpoint, str]:
    """Endpoint and model of the first line, as far as it can be read."""
    first = next(input_lines(stream, max_line_bytes=settings.max_line_bytes), None)
    try:
        data = json.loads(first.raw or b"") if first else {}
    except ValueError:
        data = {}
    data = data if isinstance(data, dict) else {}
    body = data.get("body")
    model = body.get("model") if isinstance(body, dict) else None
    url = data.get("url")
    endpoint = next((each for each in Endpoint if each == url), Endpoint.CHAT_COMPLETIONS)
    return endpoint, str(model or "")


def _batch(digest: str, endpoint: Endpoint, model: str) -> Batch:
    now_s = int(time.time())
    return Batch(
        # From the content: seeds and ids are those of an earlier run of the same file.
        id=f"batch_{digest[:32]}",
        endpoint=endpoint,
        input_file_id=f"file-{digest[:32]}",
        completion_window="24h",
        created_at=now_s,
        expires_at=now_s + 86_400,
        model=model,
    )


def _fault_text(fault: LineFault) -> str:
    where = f"line {fault.line}: " if fault.line else ""
    return f"  {where}{fault.message} ({fault.code})"


class OfflineRun:
    """Keeps the engine's block full until the file has been answered. A line that the engine raises
    for is a failed one, and costs the others nothing.
    """

    def __init__(
        self, source: OfflineBatch, *, engine: Engine, renderer: Renderer, files: ResultFiles
    ) -> None:
        self.tally = Tally()
        self._source = source
        self._engine = engine
        self._trials = Trials(engine)
        self._renderer = renderer
        self._files = files
        self._running: dict[int, tuple[LineRecord, Gathering]] = {}
        self._answerer = Answerer(renderer.tokenizer, fingerprint=engine.fingerprint)

    def go(self, on_sweep: Callable[[Tally], None]) -> None:
        """Raises EngineBrokenError, with what is finished in the files, if no line is to blame."""
        with self._source.path.open("rb") as stream:
            prompts = self._prompts(stream)
            while True:
                self._fill_block(prompts)
                if not self._running:
                    break
                swept = self._trials.sweep()
                for completion in swept.completions:
                    self._record(completion)
                for key in swept.blamed:
                    self._blame(key)
                on_sweep(self.tally)
        on_sweep(self.tally)

    def _fill_block(self, prompts: Iterator[Prompt]) -> None:
        # While it is looked for who is to blame, most rows are not in the engine.
        while max(self._engine.num_rows, self._trials.num_rows) < self._engine.block_rows:
            prompt = next(prompts, None)
            if prompt is None:
                return
            # Nobody else will come to find out: the last one left is to blame.
            self._trials.submit(prompt, on_last_try=True)

    def _prompts(self, stream: BinaryIO) -> Iterator[Prompt]:
        """The lines that are to run; those that cannot are settled on the way."""
        lines = input_lines(stream, max_line_bytes=self._source.max_line_bytes)
        for index, line in enumerate(lines):
            record, rendered = self._rendered(index, line)
            if rendered is not None:
                self._running[index] = record, Gathering(rendered)
                for prompt in rendered.prompts:
                    if index in self._running:  # none of them was blamed meanwhile
                        yield prompt

    def _rendered(self, index: int, line: InputLine) -> tuple[LineRecord, Rendered | None]:
        batch = self._source.batch
        assert line.raw is not None
        request, _ = parse_request_line(line.raw, line=line.number, endpoint=batch.endpoint)
        assert request is not None
        record = LineRecord(
            index=index,
            custom_id=request.custom_id,
            offset_bytes=line.offset_bytes,
            num_bytes=len(line.raw),
            num_prompt_tokens=0,
            shard_index=0,
        )
        if record.custom_id in self._files.answered:
            self.tally.num_skipped += 1
            return record, None
        try:
            rendered = self._renderer.render(batch, index, request.body)
            for prompt in rendered.prompts:
                self._engine.check(prompt)
        except PromptError as error:
            refusal = InvalidRequestError(str(error), param=error.param, code=error.code)
            return self._refuse(record, refusal), None
        except RequestError as error:
            return self._refuse(record, error), None
        return record, rendered

    def _refuse(self, record: LineRecord, error: RequestError) -> LineRecord:
        body = error_body(error)
        batch_id = self._source.batch.id
        self._files.append(refused_result(batch_id, record, status_code=400, error=body))
        self.tally.num_refused += 1
        return record

    def _record(self, completion: Completion) -> None:
        batch = self._source.batch
        _, index, _ = parse_row_key(completion.key)
        line, gathering = self._running[index]
        if not gathering.add(completion):
            return
        del self._running[index]
        if gathering.is_faulty:
            self._fail(line, "The answer could not be kept to its schema any further.")
            return
        body, usage = self._answerer.body(batch, index, gathering), gathering.usage
        self._files.append(completed_result(batch.id, line, body=body, usage=usage))
        self.tally.num_answered += 1
        self.tally.output_tokens += usage.output_tokens

    def _blame(self, key: str) -> None:
        _, index, _ = parse_row_key(key)
        if index not in self._running:
            return  # for another of its prompts
        line, gathering = self._running.pop(index)
        for prompt in gathering.rendered.prompts:
            self._trials.cancel(prompt.key)
        self._fail(line, "The engine raised an error over this line, and over no other.")

    def _fail(self, line: LineRecord, message: str) -> None:
        self._files.append(broken_result(self._source.batch.id, line, message=message))
        self.tally.num_refused += 1
