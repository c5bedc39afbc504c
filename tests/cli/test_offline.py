"""`freight run`: the worker's own parts around a fake engine; cut short, resumed, exact."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import cli.run
import worker.model
from cli.errors import StartError
from cli.file_workload import waiting_of
from cli.main import app
from cli.offline import OfflineRun, Tally, open_batch
from cli.result_files import ResultPaths, open_results
from cli.run import answer_file
from engine.config import Completion, FinishReason, Prompt
from engine.errors import EngineError, PromptError
from engine.sweep.report import Report
from jobs.ledger.ledger import Model
from jobs.settings import Settings
from tests.support.fake_engine import FakeEngine, FakeTokenizer
from worker.model import Loaded
from worker.render import Renderer

_REFUSED_TOKEN = 13


_POISON = 14
"""A prompt that holds this token makes every sweep it is in raise."""


class _Cut(BaseException):
    """The run is cut short here, as by Ctrl-C."""


class _NoText:
    """The tokenizer of a checkpoint that has none."""

    chat_template = ""
    vocab_size = 1000

    def encode(self, text: str) -> list[int]:
        raise EngineError("no tokenizer")

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        raise EngineError("no chat template")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def special_token_id(self, text: str) -> int | None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return str(token_id).encode()


class _FakeEngine:
    """Finishes the oldest row at each sweep; the text is the prompt's ids."""

    block_rows = 3
    fingerprint = "fake"
    max_context_tokens = 100
    num_steps = 0

    def __init__(self, *, most_sweeps: int | None = None) -> None:
        self.rows: list[Prompt] = []
        self.most_rows = 0
        self.closed = False
        self._most_sweeps = most_sweeps
        self._report = Report(policy_reason="a fake one's")

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def check(self, prompt: Prompt) -> None:
        if _REFUSED_TOKEN in prompt.token_ids:
            raise PromptError("an unlucky token", code="unlucky", param="prompt")

    def submit(self, prompt: Prompt) -> None:
        self.rows.append(prompt)
        self.most_rows = max(self.most_rows, self.num_rows)

    def cancel(self, key: str) -> None:
        self.rows = [row for row in self.rows if row.key != key]

    def sweep(self) -> list[Completion]:
        if any(_POISON in row.token_ids for row in self.rows):
            raise RuntimeError("out of luck")
        if self._report.num_sweeps == self._most_sweeps:
            raise _Cut
        self._report.num_sweeps += 1
        row = self.rows.pop(0)
        return [
            Completion(
                key=row.key,
                token_ids=(1, 2),
                text=" ".join(map(str, row.token_ids)),
                finish_reason=FinishReason.LENGTH,
                num_prompt_tokens=len(row.token_ids),
                num_generated=2,
            )
        ]

    def report(self) -> Report:
        return self._report

    def close(self) -> None:
        self.closed = True


def _write(path: Path, prompts: Sequence[object]) -> Path:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "any", "prompt": prompt, "max_tokens": 4, "temperature": 0},
        }
        for number, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _read(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _run(source: Path, out: Path, engine: _FakeEngine, *, resume: bool = False) -> Tally:
    settings = Settings(state_dir=source.parent)
    batch = open_batch(source, settings)
    renderer = Renderer(tokenizer=_NoText(), max_context_tokens=engine.max_context_tokens)
    with open_results(ResultPaths.beside(source, out), resume=resume) as files:
        run = OfflineRun(batch, engine=engine, renderer=renderer, files=files)
        run.go(lambda tally: None)
    return run.tally


def test_every_line_is_answered_and_the_block_kept_full(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [[number, 50] for number in range(8)])
    engine = _FakeEngine()
    tally = _run(source, tmp_path / "out.jsonl", engine)
    answers = _read(tmp_path / "out.jsonl")
    assert [answer["custom_id"] for answer in answers] == [f"line-{n}" for n in range(8)]
    assert answers[7]["response"]["body"]["choices"][0]["text"] == "7 50"
    assert answers[7]["response"]["body"]["usage"]["total_tokens"] == 4
    assert (tally.num_answered, tally.output_tokens) == (8, 16)
    assert engine.most_rows == engine.block_rows
    assert not (tmp_path / "out.errors.jsonl").exists()


@pytest.mark.parametrize(
    ("url", "body", "told"),
    [
        (
            "/v1/completions",
            {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 0},
            {"text": "ab", "token_logprobs": [None, -0.25]},
        ),
        ("/v1/embeddings", {"input": ["ab", "c"]}, {"dimensions": [2, 2]}),
    ],
)
def test_texts_are_scored_and_embedded(
    tmp_path: Path, url: str, body: dict[str, Any], told: dict[str, Any]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "any", **body}}
    source.write_text(json.dumps(line))
    batch = open_batch(source, Settings(state_dir=tmp_path))
    renderer = Renderer(tokenizer=FakeTokenizer(), max_context_tokens=100)
    assert waiting_of(batch, renderer) is not None
    with open_results(ResultPaths.beside(source, out), resume=False) as files:
        run = OfflineRun(batch, engine=FakeEngine(), renderer=renderer, files=files)
        run.go(lambda tally: None)
    assert (run.tally.num_answered, run.tally.output_tokens) == (1, 0)
    (answer,) = (each["response"]["body"] for each in _read(out))
    if url.endswith("embeddings"):
        assert [len(each["embedding"]) for each in answer["data"]] == told["dimensions"]
        assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    else:
        assert answer["choices"][0]["text"] == told["text"]
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == told["token_logprobs"]


def test_lines_that_cannot_run_are_errors_beside_the_output(tmp_path: Path) -> None:
    prompts = ["text without a tokenizer", [_REFUSED_TOKEN], [7]]
    source = _write(tmp_path / "in.jsonl", prompts)
    tally = _run(source, tmp_path / "out.jsonl", _FakeEngine())
    assert (tally.num_answered, tally.num_refused) == (1, 2)
    first, second = _read(tmp_path / "out.errors.jsonl")
    assert (first["custom_id"], first["response"]["status_code"]) == ("line-0", 400)
    assert second["response"]["body"]["error"]["code"] == "unlucky"


@pytest.mark.parametrize("place", [0, 4, 7])
def test_a_line_that_the_engine_raises_for_fails_alone(tmp_path: Path, place: int) -> None:
    prompts: list[object] = [[number, 50] for number in range(8)]
    prompts[place] = [[1, 50], [_POISON], [2, 50]]
    source = _write(tmp_path / "in.jsonl", prompts)
    engine = _FakeEngine()
    tally = _run(source, tmp_path / "out.jsonl", engine)
    assert (tally.num_answered, tally.num_refused) == (7, 1)
    others = {f"line-{number}" for number in range(8)} - {f"line-{place}"}
    assert {answer["custom_id"] for answer in _read(tmp_path / "out.jsonl")} == others
    (failed,) = _read(tmp_path / "out.errors.jsonl")
    assert (failed["custom_id"], failed["response"]["status_code"]) == (f"line-{place}", 500)
    assert not engine.rows


def test_an_engine_that_raises_for_every_line_ends_the_run_and_blames_none(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [[_POISON, number] for number in range(5)])
    with pytest.raises(EngineError, match="out of luck"):
        _run(source, tmp_path / "out.jsonl", _FakeEngine())
    assert not _read(tmp_path / "out.errors.jsonl")


def test_a_run_that_was_cut_short_is_resumed_with_each_line_once(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [[number] for number in range(6)])
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(_Cut):
        _run(source, out, _FakeEngine(most_sweeps=3))
    assert len(_read(out)) == 3, "each result is in the file before the next sweep"
    with out.open("ab") as file:
        file.write(b'{"id": "batch_req_torn", "custom_')
    tally = _run(source, out, _FakeEngine(), resume=True)
    assert (tally.num_skipped, tally.num_answered) == (3, 3)
    _run(source, whole, _FakeEngine())
    untimed = [
        [(line["id"], line["custom_id"], line["response"]["body"]["choices"]) for line in _read(p)]
        for p in (out, whole)
    ]
    assert untimed[0] == untimed[1]


def test_an_output_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [[1]])
    (tmp_path / "out.jsonl").write_text("dear to somebody\n")
    with pytest.raises(StartError, match="--resume"):
        _run(source, tmp_path / "out.jsonl", _FakeEngine())
    with pytest.raises(StartError, match="line 1 is no result"):
        _run(source, tmp_path / "out.jsonl", _FakeEngine(), resume=True)
    assert (tmp_path / "out.jsonl").read_text() == "dear to somebody\n"


@pytest.mark.parametrize(("name", "out"), [("in.jsonl", "in.jsonl"), ("a.errors.jsonl", "a.jsonl")])
def test_neither_results_nor_errors_may_go_over_the_requests(
    tmp_path: Path, name: str, out: str
) -> None:
    with pytest.raises(StartError, match="over the requests"):
        ResultPaths.beside(tmp_path / name, tmp_path / out)


def test_a_file_with_faults_is_refused_with_all_of_them(tmp_path: Path) -> None:
    source = _write(tmp_path / "in.jsonl", [[1], [2]])
    source.write_text(source.read_text().replace("line-1", "line-0") + "not json\n")
    with pytest.raises(StartError) as caught:
        open_batch(source, Settings(state_dir=tmp_path))
    assert "line 2: The custom_id 'line-0'" in str(caught.value)
    assert "line 3: This line is not parseable" in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]\n", '{"body": 3}\n', "\x00"])
def test_files_that_are_no_requests_are_refused(tmp_path: Path, content: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    with pytest.raises(StartError, match="cannot run"):
        open_batch(source, Settings(state_dir=tmp_path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read .*nothing\.jsonl"):
        open_batch(tmp_path / "nothing.jsonl", Settings(state_dir=tmp_path))


def test_the_command_loads_shows_and_closes_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = _FakeEngine()
    model = Model(id="any", created_at=1, max_context_tokens=100)
    renderer = Renderer(tokenizer=_NoText(), max_context_tokens=100)
    monkeypatch.setattr(worker.model, "load_engine", lambda *_: Loaded(engine=engine))
    monkeypatch.setattr(worker.model, "served_model", lambda settings: model)
    monkeypatch.setattr(worker.model, "load_renderer", lambda *_, **__: renderer)
    source = _write(tmp_path / "in.jsonl", [[1], [2]])
    paths = ResultPaths.beside(source, tmp_path / "out.jsonl")
    tally = answer_file(source, paths, Settings(state_dir=tmp_path), resume=False)
    assert tally.num_answered == 2
    assert engine.closed
    told = capsys.readouterr().err
    assert "a fake one's" in told
    assert "2 sweeps in 0.0 s" in told


@pytest.mark.parametrize(("option", "gpu_bytes"), [([], 2**30), (["--gpu-memory", "0"], 0)])
def test_an_option_of_zero_counts_against_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], gpu_bytes: int
) -> None:
    asked: list[Settings] = []

    def answer(source: Path, paths: ResultPaths, settings: Settings, *, resume: bool) -> Tally:
        asked.append(settings)
        return Tally()

    monkeypatch.setattr(cli.run, "answer_file", answer)
    (tmp_path / "model.gguf").touch()
    environment = {"FREIGHT_STATE_DIR": str(tmp_path), "FREIGHT_GPU_MEMORY_BYTES": "1GiB"}
    command = ["run", "in.jsonl", "out.jsonl", "--model", str(tmp_path / "model.gguf"), *option]
    answered = CliRunner().invoke(app, command, env=environment)
    assert answered.exit_code == 0, answered.output
    assert asked[0].gpu_memory_bytes == gpu_bytes
