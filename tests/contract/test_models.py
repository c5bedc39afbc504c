"""Checklist 131 and 132: what is served."""

import httpx2
import openai
import pytest
from openai import OpenAI


def test_131_models_are_listed_and_found_by_raw_and_encoded_ids(
    client: OpenAI, http: httpx2.Client
) -> None:
    assert [model.id for model in client.models.list()] == ["org/name"]
    model = client.models.retrieve("org/name")
    assert (model.created, model.object, model.owned_by) == (5, "model", "freight")
    assert http.get("/v1/models").json()["object"] == "list"
    for written in ("org/name", "org%2Fname", "org/name/"):
        assert http.get(f"/v1/models/{written}").json()["id"] == "org/name"


def test_132_an_unknown_model_is_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="The model 'no/such' does not exist") as gone:
        client.models.retrieve("no/such")
    assert (gone.value.code, gone.value.param) == ("model_not_found", "model")
