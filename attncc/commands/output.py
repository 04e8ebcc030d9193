"""What commands write: files, remarks, progress. Needs neither PyTorch nor anything else that is slow to import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from attncc.diagnostics import CallError
from attncc.errors import CannotWrite

if TYPE_CHECKING:
    from rich.progress import Progress


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and makes its folder where there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise CallError(CannotWrite(None, str(path), reason(error))) from error


def reason(error: Exception) -> str:
    """What the system says of a file, in a few words."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def say(text: str) -> None:
    """A remark to the user, out of the way of results."""
    print(text, file=sys.stderr)


def progress() -> Progress:
    """A progress bar on stderr, gone when it is done; none where nobody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
