"""What the compiler raises about itself, never about a specification."""

from __future__ import annotations


class IRError(AssertionError):
    """An expression or an attention breaks a rule of the IR: a fault of the pass that made it."""
