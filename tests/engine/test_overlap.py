"""Looking ahead or not changes when weights are read, and no token."""

from pathlib import Path

import pytest

from engine.config import Budgets, Prompt, Sampling
from engine.engine import Engine
from engine.timeline import Event, Timeline, Track
from tests.support.policies import streaming
from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("overlap"), "llama")


def prompts() -> list[Prompt]:
    return [
        Prompt(
            key=str(number),
            token_ids=tuple(2 + (7 * number + at) % 200 for at in range(3 + 11 * number)),
            sampling=Sampling(max_tokens=4 + number, ignore_eos=True, temperature=0.7, seed=number),
        )
        for number in range(5)
    ]


def load(folder: Path, timeline: Timeline, *, overlap: bool, resident: float) -> Engine:
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=folder / "spill")
    policy = streaming(resident, micro_batch_tokens=16, overlap=overlap)
    return Engine.load(folder, budgets=budgets, policy=policy, timeline=timeline)


def tokens_of(engine: Engine) -> dict[str, tuple[int, ...]]:
    return {done.key: done.token_ids for done in engine.generate(prompts())}


def of_track(timeline: Timeline, track: Track) -> list[Event]:
    return [event for event in timeline.events if event.track is track]


def within(inner: Event, outer: Event) -> bool:
    return outer.started_s <= inner.started_s and inner.ended_s <= outer.ended_s


@pytest.mark.parametrize("resident", [0.0, 0.5])
def test_tokens_are_equal_and_without_it_reads_lie_within_waits(
    folder: Path, resident: float
) -> None:
    ahead, behind = Timeline(keep_events=True), Timeline(keep_events=True)
    with load(folder, ahead, overlap=True, resident=resident) as engine:
        expected = tokens_of(engine)
    with load(folder, behind, overlap=False, resident=resident) as engine:
        assert tokens_of(engine) == expected
        streamed_bytes = engine.policy.streamed_bytes
        report = engine.report()
    reads, waits = of_track(behind, Track.DISK_READ), of_track(behind, Track.WAIT)
    assert len(reads) == len(waits) > 0
    assert all(within(*pair) for pair in zip(reads, waits, strict=True))
    assert report.weights_streamed_bytes == report.num_sweeps * streamed_bytes
    reads, waits = of_track(ahead, Track.DISK_READ), of_track(ahead, Track.WAIT)
    assert not all(any(within(read, wait) for wait in waits) for read in reads)


def test_without_it_a_sweep_that_broke_off_is_got_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(folder, Timeline(), overlap=False, resident=0.0) as engine:
        expected = tokens_of(engine)
        engine.submit(prompts()[0])
        with monkeypatch.context() as broken:
            broken.setattr("engine.compute.routes.write_and_attend", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.sweep()
        engine.cancel("0")
        assert tokens_of(engine) == expected
