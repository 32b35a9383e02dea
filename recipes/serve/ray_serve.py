"""`retnet serve` on Ray Serve: replicas of one model, sessions that any of them resumes, scaling by load.

    pip install -e '.[serve,ray]'
    cd recipes/serve
    serve run ray_serve:build model=retnet-125m state_dir=/shared/sessions replicas=2          one machine or a cluster
    serve run ray_serve:build model=out/model gpus=1 slots=64 replicas=1 most_replicas=8       one GPU per replica

Each replica is the application of `retnet serve` with an engine of its own. Ray's proxy sends the requests that carry
one `x-session-id` header to one replica, where the session's state is in memory. The header's value is the client's
choice; the session's id is a good one. Requests without it go to any replica, and so does a session whose replica is
gone: replicas share `state_dir`, which every kept session is written to.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

import retnet
from retnet.serve.http.app import create_app
from retnet.serve.http.launch import EngineOptions, make_service
from retnet.serve.http.settings import Settings
from retnet.stack.resolve import model_label


class Options(BaseModel):
    """Values of `serve run`, as name=value.

    replicas, most_replicas: at least and at most; more are started while every replica has more requests than slots.
    waiting: requests that may wait in a replica for a slot. Ray keeps further ones in its proxy.
    cpus, gpus: of one replica. hosts: names that the proxy is reached by, beside this machine's.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    device: str = "auto"
    dtype: str | None = None
    name: str | None = None
    slots: int = Field(4, ge=1)
    waiting: int = Field(16, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    state_dir: Path | None = None
    api_key_file: Path | None = None
    hosts: list[str] = []
    replicas: int = Field(1, ge=1)
    most_replicas: int | None = Field(None, ge=1)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)


def build(options: Options) -> Application:
    """The application that `serve run` deploys."""

    def application() -> FastAPI:
        settings = Settings(
            state_dir=options.state_dir,
            api_key_file=options.api_key_file,
            allowed_hosts=tuple(options.hosts),
            max_waiting=options.waiting,
        )
        network = retnet.load(options.model, options.device, options.dtype)
        name = options.name or model_label(options.model)
        engine = EngineOptions(slots=options.slots, max_tokens=options.max_tokens)
        return create_app(make_service(network, retnet.load_tokenizer(network), name, engine, settings), settings)

    @serve.ingress(application)
    class Replica:
        def check_health(self) -> None:
            """Raises where the engine's thread has ended; Ray then replaces the replica."""
            if not self.app.state.service.alive:  # type: ignore[attr-defined] (set by serve.ingress)
                raise RuntimeError("the engine does not run")

    most = max(options.replicas, options.most_replicas or options.replicas)
    deployment = serve.deployment(
        Replica,
        name="retnet",
        max_ongoing_requests=options.slots + options.waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.replicas, max_replicas=most, target_ongoing_requests=options.slots
        ),
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        graceful_shutdown_timeout_s=Settings().grace,
    )
    return deployment.bind()
