"""What an engine opens is closed with it, and by a loading that fails, however late."""

import functools
import gc
import json
import threading
from pathlib import Path
from typing import Any, Final

import pytest
from transformers import PreTrainedModel

from engine.config import Budgets
from engine.engine import Engine
from engine.errors import BudgetError, EngineError
from engine.memory.retention import prune_packs
from engine.memory.ring import Slot
from engine.memory.weights import StreamedWeights
from engine.planning.policy import Split, Tier
from engine.sweep import assembly
from engine.sweep.trace import ChromeTrace
from engine.timeline import Timeline
from tests.engine.test_engine import prompt_of
from tests.support.policies import streaming
from tests.support.tiny_models import write_tiny_model, write_tiny_tokenizer

# Hidden states and some rows' keys and values in files, others beside; a table read row by row.
_EVERYWHERE: Final = streaming(
    0.5,
    embedding=0.0,
    hidden_tier=Tier.DISK,
    kv=Split(gpu_bytes=0, cpu_bytes=200_000, disk_bytes=10**7),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_tokenizer(write_tiny_model(tmp_path_factory.mktemp("model"), "llama"))
    load(folder).close()  # what the process keeps for good is open from here on
    return folder


def load(folder: Path, **changes: Any) -> Engine:
    options: dict[str, Any] = {"policy": _EVERYWHERE, "call_log": folder / "calls.jsonl"}
    options["timeline"] = Timeline(sink=ChromeTrace(folder / "trace.json"))
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=2**62, spill_dir=folder / "spill")
    return Engine.load(folder, budgets=budgets, **(options | changes))


def opened() -> tuple[list[str], list[str]]:
    """The names of the engine's threads and the files of its descriptors, in order. A server that
    other tests share may run in this process, and opens and closes its own meanwhile: connections,
    and files of its state folder.
    """
    gc.collect()  # models are cycles
    links = list(Path("/proc/self/fd").iterdir())
    targets = [str(link.readlink()) for link in links if link.is_symlink()]  # not the listing's
    threads = [each.name for each in threading.enumerate() if each.name.startswith("freight-")]
    files = [each for each in targets if each.startswith("/") and "/service" not in each]
    return sorted(threads), sorted(files)


def is_held(folder: Path) -> bool:
    """Whether somebody reads the folder's pack: if nobody does, it goes."""
    return prune_packs(folder / "spill", ()) == 0


def test_a_closed_engine_leaves_nothing_open(folder: Path) -> None:
    before = opened()
    with load(folder) as engine:
        engine.submit(prompt_of(num_tokens=40))
        engine.sweep()
        assert opened() != before
        assert is_held(folder)
    assert opened() == before
    assert not is_held(folder)


def test_a_closed_engine_gives_its_weights_back_though_somebody_holds_it(folder: Path) -> None:
    def held() -> list[str]:
        gc.collect()
        kinds = (PreTrainedModel, Slot, StreamedWeights)
        found = [type(each) for each in gc.get_objects()]
        return sorted(kind.__name__ for kind in found if issubclass(kind, kinds))

    before = held()
    engine = load(folder)
    engine.submit(prompt_of())
    engine.sweep()
    assert len(held()) > len(before)
    engine.close()
    assert held() == before
    assert engine.report().num_sweeps == 1


@pytest.mark.parametrize(
    "name", ["KVCache", "StreamedWeights", "load_buffers", "gated_head", "Executor", "Block"]
)
def test_a_load_that_fails_leaves_nothing_open(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise EngineError(name)

    before = opened()
    monkeypatch.setattr(assembly, name, fail)
    with pytest.raises(EngineError, match=name):
        load(folder)
    assert opened() == before
    assert not is_held(folder)
    assert json.loads((folder / "calls.jsonl").read_text().splitlines()[-1])["event"] == "close"
    assert json.loads((folder / "trace.json").read_text())


def test_keys_and_values_that_the_disk_has_no_room_for_leave_nothing_open(folder: Path) -> None:
    before = opened()
    kv = Split(gpu_bytes=0, cpu_bytes=200_000, disk_bytes=2**61)
    with pytest.raises(BudgetError, match="has no room for"):
        load(folder, policy=streaming(0.5, kv=kv))
    assert opened() == before
    assert not is_held(folder)


def test_a_pack_that_is_damaged_is_written_anew_and_nothing_of_the_first_try_stays(
    folder: Path, tmp_path: Path
) -> None:
    budgets = Budgets(gpu_bytes=0, host_bytes=10**9, disk_bytes=10**9, spill_dir=tmp_path)
    # The library fuses experts its own way, so that they are packed and not read in place.
    source = write_tiny_tokenizer(write_tiny_model(tmp_path / "model", "mixtral"))
    again = functools.partial(Engine.load, source, budgets=budgets, policy=streaming(1.0))
    again().close()
    before = opened()
    path = next(tmp_path.glob("packs/*/weights.bin"))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 4096)
    again().close()
    assert opened() == before
