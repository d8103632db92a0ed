"""`serve=ray`: the service of `serve=local` on Ray Serve, in replicas that are replaced when they die.

Ray routes requests to replicas, each of which is the same application with its own model, batches and bounded queue. Items
that are added or removed through one replica reach the others, and those that start later, through a folder they share.
Needs polyspec[ray].
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from polyspec.errors import ConfigError
from polyspec.lengths import positive
from polyspec.pipelines import part_of

NAME = "polyspec"


def run(modality: str, settings: dict[str, Any]) -> None:
    """Serve on replicas until SIGTERM or SIGINT; what they have accepted they finish.

    settings: `host`, `port`, `grace_s`, `replicas`, `autoscale` (None, or Ray Serve's autoscaling_config in place of a fixed
    number), `cpus` (of each replica), `address` (of a Ray cluster; None: one on this machine, ended with the service); the
    rest is for the modality's `application`. Raises ConfigError without Ray, or for sizes below one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a replica that asks for no accelerator may see it
    try:
        ray, serve = import_module("ray"), import_module("ray.serve")
    except ImportError as error:
        raise ConfigError("serve=ray needs Ray Serve: pip install 'polyspec[ray]'") from error
    own = {name: settings.pop(name) for name in ("host", "port", "grace_s", "replicas", "autoscale", "cpus", "address")}
    part_of(modality, "serve")  # an error now rather than in a replica
    with tempfile.TemporaryDirectory(prefix="polyspec-") as folder:
        settings = found_from_anywhere({**settings, "catalogue": settings["catalogue"] or folder})
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        ray.init(address=own["address"], include_dashboard=False, log_to_driver=False, logging_level="warning")
        try:
            serve.start(http_options={"host": own["host"], "port": own["port"]})
            application = deployment(serve, modality, settings, own).bind()
            try:
                serve.run(application, name=NAME, route_prefix="/", logging_config={"log_level": "WARNING"})
            except RuntimeError as error:
                raise ConfigError(f"the replicas did not start: {error}") from error
            stop.wait()
            serve.delete(NAME)  # waits for the replicas, and they for what they have accepted
        finally:
            with suppress(Exception):  # what is left of Ray ends with this process
                serve.shutdown()
            ray.shutdown()


def deployment(serve: Any, modality: str, settings: dict[str, Any], own: dict[str, Any]) -> Any:
    """The application as a Ray Serve deployment; it is made where a replica starts."""

    def build() -> Any:
        return part_of(modality, "serve").application(**settings)

    fixed = {"num_replicas": positive("replicas", own["replicas"])}
    scale = {"autoscaling_config": own["autoscale"]} if own["autoscale"] else fixed
    return serve.deployment(
        serve.ingress(build)(),
        name=modality,
        ray_actor_options={"num_cpus": own["cpus"]},
        # a replica's own queue refuses first, with 503 and Retry-After; health and metrics still get through
        max_ongoing_requests=2 * (positive("queue", settings["queue"]) + positive("batch", settings["batch"])),
        max_queued_requests=settings["queue"],
        graceful_shutdown_timeout_s=own["grace_s"],
        health_check_period_s=2,
        **scale,
    )


def found_from_anywhere(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths: a replica starts in a folder of its own."""
    paths = {name: settings.get(name) for name in ("target", "users", "catalogue")}
    return {**settings, **{name: str(Path(p).resolve()) for name, p in paths.items() if p and Path(p).exists()}}
