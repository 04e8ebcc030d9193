"""Source text to running kernels."""
