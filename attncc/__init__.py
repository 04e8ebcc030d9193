"""attncc, the attention compiler."""
