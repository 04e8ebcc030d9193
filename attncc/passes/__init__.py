"""IR to IR, one function in one file each."""
