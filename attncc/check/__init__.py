"""Syntax tree to IR: names, types, errors."""
