"""Which printer spells a plan."""

from __future__ import annotations

from attncc.emit.cpp import CppPrinter
from attncc.emit.render import Printer
from attncc.emit.triton import TritonPrinter
from attncc.plan.nodes import KernelPlan


def printer_of(plan: KernelPlan) -> Printer:
    """The printer of a plan's backend."""
    return {"cpp": CppPrinter, "triton": TritonPrinter}[plan.target.backend](plan)
