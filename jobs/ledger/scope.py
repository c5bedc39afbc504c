"""Whose records a look at the ledger sees and adds to: one caller's, or everybody's."""

import dataclasses

from sqlalchemy import ColumnElement, Table, true

from jobs.tenant import Caller


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Without a caller it is the whole ledger, as the roles behind the server need it."""

    caller: Caller | None = None

    @property
    def tenant(self) -> str | None:
        return None if self.caller is None else self.caller.tenant

    def owner_of_new(self, tenant: str) -> str:
        """Whose a new record is, `tenant` being what it says itself."""
        return self.tenant or tenant

    def owns(self, table: Table) -> ColumnElement[bool]:
        """Of files, uploads and batches: the condition on rows that are to be seen."""
        return true() if self.caller is None else table.c.tenant == self.caller.tenant


WHOLE = Scope()
