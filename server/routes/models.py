"""`/v1/models`: what this installation serves, read from the ledger."""

from fastapi import APIRouter

from jobs.openai import ModelList, ModelObject, model_object
from server.deps import LedgerDep

router = APIRouter(tags=["models"])


@router.get("/v1/models")
def list_models(ledger: LedgerDep) -> ModelList:
    return ModelList(data=[model_object(model) for model in ledger.models.all()])


# Ids may hold slashes, raw or percent-encoded.
@router.get("/v1/models/{model_id:path}")
def get_model(model_id: str, ledger: LedgerDep) -> ModelObject:
    return model_object(ledger.models.get(model_id))
