"""The table of routes."""

from typing import Final

from fastapi import APIRouter

from server.routes import batches, files, health, models, results, uploads

ROUTES: Final[tuple[APIRouter, ...]] = (
    files.router,
    uploads.router,
    batches.router,
    results.router,
    models.router,
    health.router,
)
