"""From syntax tree to IR, or every error in it."""
