"""The web application: the routes of the API over one service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from retnet import __version__
from retnet.serve.http import health, metrics, page
from retnet.serve.http.access.guard import Guard
from retnet.serve.http.access.keys import ApiKeys
from retnet.serve.http.api import completions, left_out
from retnet.serve.http.chat import routes as chat
from retnet.serve.http.chat.routes import ChatFormat
from retnet.serve.http.errors import ErrorBody, add_error_handlers
from retnet.serve.http.grammars.constraints import Constraints
from retnet.serve.http.metrics import Metrics
from retnet.serve.http.service import Service
from retnet.serve.http.sessions import routes as session_routes
from retnet.serve.http.sessions.store import SessionStore
from retnet.serve.http.settings import Settings


def create_app(service: Service, settings: Settings | None = None) -> FastAPI:
    """The application. Its lifespan starts the service and stops it.

    Raises ValueError and OSError for an API key file or a chat template that cannot be used.
    """
    settings = settings or service.settings
    sessions = SessionStore(settings, service.engine.fingerprint)
    form = ChatFormat.of(service, settings)
    constraints = Constraints.of(service, form.ends)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        await sessions.start()
        try:
            yield
        finally:
            service.stop()
            await sessions.close()
            constraints.close()

    app = FastAPI(
        title="retnet serve",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={"default": {"model": ErrorBody, "description": "A request that is refused, or that failed"}},
    )
    app.state.service, app.state.settings = service, settings
    app.state.sessions, app.state.metrics, app.state.constraints = sessions, Metrics(service), constraints
    app.state.metrics.measures.append(lambda: metrics.session_metrics(sessions))
    app.state.chat = form
    add_error_handlers(app)
    keys = None if settings.api_key_file is None else ApiKeys.read(settings.api_key_file)
    app.add_middleware(Guard, service=service, settings=settings, keys=keys, metrics=app.state.metrics)
    for part in (health, metrics, completions, left_out, chat, session_routes, page):
        app.include_router(part.router)
    return app
