"""`freight demo`: the whole path once, on this machine, with figures; then it stops again.

It keeps to itself: own state folder, ledger, queue and port. A server that runs already is left
alone, and so are the batches that wait for it.
"""

import collections
import dataclasses
import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import typer

from cli.console import say, show
from cli.demo_input import write_demo_input
from cli.model import find_model
from cli.options import ModelOption
from cli.result_files import ResultPaths
from cli.serve import running
from cli.submit import submit_and_fetch
from jobs.settings import Settings

_NUM_SHOWN: Final = 3
_LONGEST_SHOWN_CHARACTERS: Final = 300


def demo(model: ModelOption = None) -> None:
    """Start everything, run a real batch through the official client, show results and figures."""
    from cli.client import connect  # noqa: PLC0415 (slow to import)

    settings = demo_settings(Settings.from_environment(), model=model)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    requests = settings.state_dir / "requests.jsonl"
    results = ResultPaths.beside(requests)
    with running(settings) as freight, connect(freight.url) as client:
        model_id = client.models.list().data[0].id
        num_requests = write_demo_input(requests, model=model_id)
        say(f"wrote {num_requests} requests to {requests}")
        started_s = time.monotonic()
        complete = submit_and_fetch(client, requests, results, check=freight.check)
        wall_s = time.monotonic() - started_s
    if not complete:
        say(f"not every line was answered; see {results.errors} and {settings.state_dir / 'logs'}")
        raise typer.Exit(1)
    answers = _read(results.output)
    _show_answers(answers)
    show(Figures.of(answers, wall_s=wall_s).as_text())
    show(_places(settings, requests, results))
    if not is_conserved(_read(requests), answers):
        say("the output does not hold each custom_id exactly once, answered")
        raise typer.Exit(1)


def demo_settings(usual: Settings, *, model: str | None) -> Settings:
    """Everything apart from the usual but the model and its packed weights, which cost time."""
    usual = dataclasses.replace(usual, model=model or usual.model)
    return dataclasses.replace(
        usual,
        state_dir=usual.state_dir / "demo",
        database_url=None,
        redis_url=None,
        host="127.0.0.1",
        port=_free_port(),
        model=str(find_model(usual)),
        spill_dir=usual.weights_dir,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a batch took, by its own output file."""

    num_lines: int
    input_tokens: int
    output_tokens: int
    wall_s: float

    @classmethod
    def of(cls, answers: Sequence[Mapping[str, Any]], *, wall_s: float) -> "Figures":
        usages = [answer["response"]["body"]["usage"] for answer in answers]
        return cls(
            num_lines=len(answers),
            input_tokens=sum(usage["prompt_tokens"] for usage in usages),
            output_tokens=sum(usage["completion_tokens"] for usage in usages),
            wall_s=wall_s,
        )

    def as_text(self) -> str:
        total_tokens = self.input_tokens + self.output_tokens
        return (
            f"\n{self.num_lines} lines answered in {self.wall_s:.1f} s, from upload to download\n"
            f"  input tokens   {self.input_tokens:>8}\n"
            f"  output tokens  {self.output_tokens:>8}  {self.output_tokens / self.wall_s:8.1f} /s\n"
            f"  all tokens     {total_tokens:>8}  {total_tokens / self.wall_s:8.1f} /s\n"
        )


def is_conserved(
    requests: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether each request has exactly one line in the output, and that line an answer."""
    asked = collections.Counter(request["custom_id"] for request in requests)
    answered = collections.Counter(
        answer["custom_id"]
        for answer in answers
        if answer["response"] and answer["response"]["status_code"] == 200
    )
    return asked == answered and len(answers) == len(requests)


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _show_answers(answers: Sequence[Mapping[str, Any]]) -> None:
    for answer in answers[:_NUM_SHOWN]:
        text = answer["response"]["body"]["choices"][0]["message"]["content"].strip()
        show(f"\n{answer['custom_id']}\n  {text[:_LONGEST_SHOWN_CHARACTERS]}")


def _places(settings: Settings, requests: Path, results: ResultPaths) -> str:
    return (
        f"  requests      {requests}\n"
        f"  results       {results.output}\n"
        f"  logs          {settings.state_dir / 'logs'}\n"
        f"  state folder  {settings.state_dir}"
    )
