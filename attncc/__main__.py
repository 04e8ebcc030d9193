"""`python -m attncc`, as the command `attncc`."""

import sys

from attncc.cli import main

if __name__ == "__main__":
    sys.exit(main())
