"""The tables of routes: those that ask for a key, and those that are open to everybody."""

from typing import Final

from fastapi import APIRouter

from server.routes import batches, files, health, models, results, riders, uploads

ROUTES: Final[tuple[APIRouter, ...]] = (
    files.router,
    uploads.router,
    batches.router,
    results.router,
    riders.router,
    models.router,
)
OPEN_ROUTES: Final[tuple[APIRouter, ...]] = (health.router,)
