"""`polyspec task=recipes`: the table of recipes. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from polyspec.recipe import recipes


def show(config: Any) -> None:
    """Print every recipe with its guarantee, paper, modalities and knobs."""
    table = Table(title="recipes", title_justify="left", show_lines=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("guarantee", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("what it does")
    for r in recipes():
        details = [f"for {', '.join(r.modalities)}"]
        if r.needs:
            details.append(f"needs {', '.join(r.needs)}")
        if r.takes:
            details.append(f"takes {', '.join(r.takes)}")
        if r.knobs:
            details.append("knobs " + ", ".join(f"{k}={v}" for k, v in r.knobs.items()))
        table.add_row(r.name, r.guarantee, r.paper or "-", f"{r.summary}\n[dim]{'; '.join(details)}[/dim]")
    Console().print(table)
