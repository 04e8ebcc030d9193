"""IR, target and specialization to kernel plans."""
