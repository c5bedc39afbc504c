"""The table of file stores, by kind."""

from typing import Final

from jobs.stores.base import FileStore
from jobs.stores.folder import FolderStore

STORES: Final[dict[str, type[FileStore]]] = {"folder": FolderStore}
