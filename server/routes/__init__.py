"""The table of routes."""

from typing import Final

from fastapi import APIRouter

from server.routes import batches, files, health, models, uploads

ROUTES: Final[tuple[APIRouter, ...]] = (
    files.router,
    uploads.router,
    batches.router,
    models.router,
    health.router,
)
