"""Services: a modality's pipeline behind HTTP, with batching of concurrent requests and a bounded queue.

`polyspec task=serve modality=…` starts the one that the modality's module `serve` describes, on the engine that the `serve`
group names: one process (`serve=local`, needs polyspec[serve]) or replicas (`serve=ray`, needs polyspec[ray]).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig, OmegaConf

from polyspec.errors import ConfigError
from polyspec.pipelines import part_of


def serve(config: DictConfig) -> None:
    """Run the configured modality's service until it is told to stop; what it has accepted it finishes."""
    from hydra.utils import instantiate

    settings: Any = OmegaConf.to_container(config.serve, resolve=True)
    engine = instantiate(settings.pop("engine"))
    recipe = config.recipe.name if config.get("recipe") else None
    where = {"target": config.target, "recipe": recipe, "device": config.device, "dtype": config.dtype}
    engine(config.modality.name, {**where, **settings})


def local(modality: str, settings: dict[str, Any]) -> None:
    """Serve in this process. settings: `host`, `port`, `grace_s`, the rest is for the modality's `application`."""
    if find_spec("uvicorn") is None:
        raise ConfigError("serving needs FastAPI, uvicorn and prometheus-client: pip install 'polyspec[serve]'")
    host, port, grace = (settings.pop(name) for name in ("host", "port", "grace_s"))
    running = server(part_of(modality, "serve").application(**settings), host, port, grace)
    running.run()
    if not running.started:
        raise SystemExit(3)


def server(app: Any, host: str, port: int, grace: int) -> Any:
    """A uvicorn server of `app` that lets go of kept connections when it is told to stop: their next answer ends them.

    uvicorn alone keeps one whose answer was half sent at that moment, and cancels what it asks for once `grace` is over."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            app.state.ready, app.state.closing = False, True
            await super().shutdown(sockets)

    return Server(uvicorn.Config(app, host=host, port=port, timeout_graceful_shutdown=grace, log_level="warning"))
