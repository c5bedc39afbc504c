"""`/healthz`: whether requests can be served, and who else was heard of lately. Needs no key."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from server.deps import BellDep, SettingsDep, WholeLedgerDep

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """Only the ledger decides; the rest informs. Without a worker, batches wait."""

    status: Literal["ok"] = "ok"
    ledger: Literal["ok"] = "ok"
    redis: str
    worker: Literal["alive", "silent", "absent"]
    worker_heartbeat_age_s: float | None
    intake_heartbeat_age_s: float | None


@router.get("/healthz")
def health(ledger: WholeLedgerDep, bell: BellDep, settings: SettingsDep) -> Health:
    ledger.models.all()  # an unusable ledger raises, and its answer is 503
    presence = bell.presence()
    age_s = presence.block_worker_age_s
    worker: Literal["alive", "silent", "absent"] = "absent"
    if age_s is not None:
        worker = "alive" if age_s <= settings.lease_s else "silent"
    return Health(
        redis=presence.redis,
        worker=worker,
        worker_heartbeat_age_s=age_s,
        intake_heartbeat_age_s=presence.intake_worker_age_s,
    )
