"""`polyspec task=bench serve=local` (or `serve=ray`): a service under load, its latencies, throughput and refusals.

The service is started as `task=serve` would, in a process of its own. First `clients` ask one request after another: that
is what it can do. Then `share` of that rate, or each of several shares in turn, is offered at random times (a Poisson
process) whether or not answers come, as users do.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from polyspec.errors import ConfigError
from polyspec.pipelines import part_of
from polyspec.tasks import whole_file


@dataclass(slots=True)
class Phase:
    """What was answered when: latencies in seconds of the answered, and how often each status came."""

    name: str
    offered: float | None = None  # requests a second; None: as many as were answered
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def figures(self) -> dict[str, Any]:
        ordered = sorted(self.latencies) or [float("nan")]
        quantiles = {f"p{q}_ms": 1000 * ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (50, 95, 99)}
        answered = self.statuses["200"] / self.seconds if self.seconds else 0.0
        failed = sum(n for status, n in self.statuses.items() if status not in ("200", "503"))
        return {
            "phase": self.name,
            "offered_per_second": answered if self.offered is None else self.offered,
            "answered_per_second": answered,
            **quantiles,
            "refused": self.statuses["503"],
            "errors": failed,
            "statuses": dict(self.statuses),
        }


def run(config: DictConfig) -> None:
    """Start the service, load it, print a table, write load.json."""
    try:
        import httpx
    except ImportError as error:
        raise ConfigError("loading a service needs httpx: pip install httpx") from error
    settings: Any = OmegaConf.to_container(config.bench, resolve=True)
    load, folder = settings["load"], Path(settings["output"])
    shares = load["share"] if isinstance(load["share"], list) else [load["share"]]
    path, bodies = part_of(config.modality.name, "serve").example_requests(config, settings)
    choose = random.Random(config.seed)
    console = Console()
    with service(config) as url:

        async def phases() -> list[Phase]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

                async def ask(phase: Phase) -> None:
                    start = time.perf_counter()
                    try:
                        status = str((await client.post(path, json=choose.choice(bodies))).status_code)
                    except httpx.HTTPError as error:
                        status = type(error).__name__
                    phase.statuses[status] += 1
                    if status == "200":
                        phase.latencies.append(time.perf_counter() - start)

                with console.status("warming up"):
                    await closed(ask, Phase("warm-up"), load["clients"], min(3.0, load["seconds"]))
                with console.status("as much as it can do"):
                    full = await closed(ask, Phase("at capacity"), load["clients"], load["seconds"])
                found, most = [full], full.statuses["200"] / full.seconds
                for share in shares if most else ():
                    with console.status(f"{share * most:.0f} requests a second"):
                        part = Phase(f"{share:.0%} of it", share * most)
                        found.append(await opened(ask, part, load["seconds"], choose))
                return found

        found = [p.figures() for p in asyncio.run(phases())]
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "load.json") as file:
        report = {"settings": settings, "serve": OmegaConf.to_container(config.serve), "phases": found}
        file.write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    console.print(table(found))
    console.print(f"wrote {folder / 'load.json'}", markup=False, highlight=False)


async def closed(ask: Callable[[Phase], Any], phase: Phase, clients: int, seconds: float) -> Phase:
    """Each client asks again as soon as it is answered."""
    start = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - start < seconds:
            await ask(phase)

    await asyncio.gather(*(client() for _ in range(clients)))
    phase.seconds = time.perf_counter() - start
    return phase


async def opened(ask: Callable[[Phase], Any], phase: Phase, seconds: float, choose: random.Random) -> Phase:
    """Requests at random times, `phase.offered` a second."""
    assert phase.offered is not None
    start, due, asked = time.perf_counter(), 0.0, []
    while True:
        due += choose.expovariate(phase.offered)
        if due > seconds:
            break
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        asked.append(asyncio.create_task(ask(phase)))
    await asyncio.gather(*asked)
    phase.seconds = time.perf_counter() - start
    return phase


@contextmanager
def service(config: DictConfig) -> Iterator[str]:
    """The service of `config` in a process of its own, once it is ready; its URL. It is ended afterwards."""
    import httpx

    with socket.socket() as free:
        free.bind((config.serve.host, 0))
        port = free.getsockname()[1]
    given = [a for a in sys.argv[1:] if not a.startswith(("task=", "bench", "serve.port="))]
    command = [sys.executable, "-m", "polyspec", "task=serve", *given, f"serve.port={port}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = f"http://{config.serve.host}:{port}"
    try:
        while True:
            if process.poll() is not None:
                assert process.stderr is not None
                said = process.stderr.read().strip().splitlines()
                raise ConfigError(f"the service did not start: {said[-1] if said else process.returncode}")
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def table(found: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="service under load", title_justify="left")
    for column in ("", "offered\n/s", "answered\n/s", "p50\nms", "p95\nms", "p99\nms", "503", "errors"):
        shown.add_column(column, justify="right" if column else "left")
    for f in found:
        rates = (f"{f[key]:.1f}" for key in ("offered_per_second", "answered_per_second", "p50_ms", "p95_ms", "p99_ms"))
        shown.add_row(f["phase"], *rates, str(f["refused"]), str(f["errors"]))
    return shown
