"""The table of routes."""

from typing import Final

from fastapi import APIRouter

from server.routes import batches, files, health, models, riders, uploads

ROUTES: Final[tuple[APIRouter, ...]] = (
    files.router,
    uploads.router,
    batches.router,
    riders.router,
    models.router,
    health.router,
)
