"""What the commands of the command line do: each takes the parsed arguments and returns the exit status."""
