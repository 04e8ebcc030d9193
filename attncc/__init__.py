"""attncc, the attention compiler: from a few lines of mathematics to a fast, verified kernel."""

from attncc.build import build, check
from attncc.diagnostics import AttnError, BuildError, CallError, SpecError
from attncc.runtime.call import CompiledAttention

__all__ = ["AttnError", "BuildError", "CallError", "CompiledAttention", "SpecError", "build", "check"]
