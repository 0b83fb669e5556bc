"""The commands `vista export` and `vista serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from vista_ext._extras import require

typer = require("typer", extra="run")


def export(
    run: Annotated[Path, typer.Argument(help="folder of a trained run")],
    folder: Annotated[Path, typer.Argument(help="folder to make")],
    device: Annotated[str, typer.Option(help="torch device that will serve")] = "cpu",
) -> None:
    """Compile stage 2 of a run for serving: no Python code of the model is needed to load it."""
    from vista_ext.runs import Run
    from vista_ext.serve.export import export_run

    manifest = export_run(Run.open(run, device=device), folder)
    print(f"exported: {folder}, model version {manifest.spec.model_version}")


def serve(
    source: Annotated[Path, typer.Argument(help="folder of an exported model, or of a run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as limits.timeout=0.5")] = None,
    store: Annotated[str, typer.Option(help="a folder, redis:// or rediss:// URL; the run's by default")] = "",
    config: Annotated[Path | None, typer.Option(help="YAML file (docs/serving.md)")] = None,
    device: Annotated[str, typer.Option(help="torch device of a run's model")] = "cpu",
) -> None:
    """Score over HTTP: POST /score, GET /health, /ready, /metrics."""
    from vista_ext.serve.service import serve as run_service
    from vista_ext.serve.settings import load_service_config
    from vista_ext.serve.worker import Settings

    run_service(Settings(str(source), store, load_service_config(config, overrides or ()), device))


def register(app: Any) -> None:
    """Add the commands to the command line."""
    app.command()(export)
    app.command()(serve)
