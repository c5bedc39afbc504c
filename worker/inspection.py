"""The first pass over a batch's input: every fault of the file, in the contract's words."""

import dataclasses
from collections.abc import Iterable
from typing import Final

from jobs.batch import Endpoint, LineFault
from jobs.embeddings import num_inputs
from jobs.line import (
    duplicate_fault,
    mismatched_model_fault,
    parse_request_line,
    unknown_model_fault,
)
from worker.input_lines import InputLine

MAX_FAULTS: Final = 100


@dataclasses.dataclass(slots=True, kw_only=True)
class Inspection:
    """Looks at lines one by one; holds their custom ids and at most `MAX_FAULTS` faults.

    `max_lines` is also how many texts may be embedded, over all lines.
    """

    endpoint: Endpoint
    served_model: str
    max_lines: int
    max_line_bytes: int
    model: str | None = None
    num_lines: int = 0
    num_inputs: int = 0
    _custom_ids: set[str] = dataclasses.field(default_factory=set)
    _faults: list[LineFault] = dataclasses.field(default_factory=list)
    _num_hidden: int = 0

    def look(self, lines: Iterable[InputLine]) -> list[LineFault]:
        """All faults by line; empty if the batch may run."""
        for line in lines:
            self.num_lines += 1
            if self.num_lines <= self.max_lines:
                self._look_at(line)
        return self._found()

    def _look_at(self, line: InputLine) -> None:
        if line.raw is None:
            message = f"This line is longer than {self.max_line_bytes} bytes."
            fault = LineFault(code="line_too_long", message=message, line=line.number)
            self._note([fault])
            return
        request, faults = parse_request_line(line.raw, line=line.number, endpoint=self.endpoint)
        self._note(faults)
        if request is None:
            return
        if request.custom_id in self._custom_ids:
            self._note([duplicate_fault(request.custom_id, line=line.number)])
        self._custom_ids.add(request.custom_id)
        if self.endpoint is Endpoint.EMBEDDINGS:
            self.num_inputs += num_inputs(request.body)
        self._look_at_model(str(request.body["model"]), line.number)

    def _look_at_model(self, model: str, number: int) -> None:
        self.model = self.model or model
        if model != self.model:
            self._note([mismatched_model_fault(model, line=number)])
        elif model != self.served_model:
            self._note([unknown_model_fault(model, line=number)])

    def _note(self, faults: list[LineFault]) -> None:
        room = MAX_FAULTS - len(self._faults)
        self._faults += faults[:room]
        self._num_hidden += len(faults[room:])

    def _found(self) -> list[LineFault]:
        if self.num_lines == 0:
            message = (
                "The input file is empty. "
                "Please ensure that the batch contains at least one request."
            )
            return [LineFault(code="empty_file", message=message)]
        found = list(self._faults)
        if self._num_hidden:
            message = f"{self._num_hidden} more errors were found and are not listed."
            found.append(LineFault(code="too_many_errors", message=message))
        if self.num_lines > self.max_lines:
            message = (
                f"The input file contains {self.num_lines:,} requests; "
                f"the limit is {self.max_lines:,}."
            )
            found.append(LineFault(code="request_limit_exceeded", message=message))
        elif self.num_inputs > self.max_lines:
            message = (
                f"The input file contains {self.num_inputs:,} embedding inputs; "
                f"the limit is {self.max_lines:,}."
            )
            found.append(LineFault(code="embedding_input_limit_exceeded", message=message))
        return found
