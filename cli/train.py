"""`kpu-train`: the name is reserved here; the trainer comes with a later release."""

import typer

from cache.errors import KpuError
from cli.failures import reported

app = typer.Typer(help="Train a student from a feature cache. Not part of this release.", add_completion=False)


@app.callback(invoke_without_command=True)
@reported
def train() -> None:
    """Say that there is no trainer yet.

    Raises:
        KpuError: always.
    """
    raise KpuError(
        "kpu-train is not part of this release; read the cache that kpu-cache makes from your own training loop with "
        "`from cache import open_cache`"
    )
