"""What intake's tasks work with, and the one place where bare RQ functions find it.

RQ calls tasks by name, with arguments from the queue: they can be handed nothing else. So there is
one global, the cached `_shelf`, and nobody but tasks looks at it.
"""

import dataclasses
import functools

from jobs.ledger.ledger import Ledger
from jobs.queue import Doorbell
from jobs.settings import Settings
from jobs.stores import STORES
from jobs.stores.base import FileStore
from worker.render import Renderer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IntakeContext:
    settings: Settings
    ledger: Ledger
    store: FileStore
    doorbell: Doorbell
    renderer: Renderer
    model_id: str


@functools.cache
def _shelf() -> list[IntakeContext]:
    """The process's only mutable global: empty, or the one context."""
    return []


def provide_context(context: IntakeContext) -> None:
    """Called once by the process that is about to run tasks."""
    _shelf()[:] = [context]


def task_context() -> IntakeContext:
    """For bodies of tasks only; all else is handed what it needs."""
    (context,) = _shelf()
    return context


def open_store(settings: Settings) -> FileStore:
    return STORES["folder"].open(settings.files_dir)
