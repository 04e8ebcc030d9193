"""attncc, the attention compiler: from a few lines of mathematics to a fast, verified kernel."""

import sys
from typing import TYPE_CHECKING

# A submodule sets its name here when it is first imported: `check` before the function of that name does.
import attncc.check  # pyright: ignore[reportUnusedImport] - for the order
from attncc.build import build, check, register_operators
from attncc.diagnostics import AttnError, BuildError, CallError, SpecError

if sys.modules.get("torch"):  # Whoever has imported PyTorch will call: then the first build need not import the rest.
    import attncc.runtime.call  # noqa: F401  # pyright: ignore[reportUnusedImport] - for later

if TYPE_CHECKING:
    from attncc.runtime.call import CompiledAttention
    from attncc.runtime.recurrent import RecurrentAttention

__all__ = [
    "AttnError",
    "BuildError",
    "CallError",
    "CompiledAttention",
    "RecurrentAttention",
    "SpecError",
    "build",
    "check",
    "register_operators",
]


def __getattr__(name: str) -> object:
    """Imports what needs PyTorch when it is asked for, so that commands that need none start quickly."""
    if name == "CompiledAttention":
        from attncc.runtime.call import CompiledAttention

        return CompiledAttention
    if name == "RecurrentAttention":
        from attncc.runtime.recurrent import RecurrentAttention

        return RecurrentAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
