"""`python -m pipelines`: the menu of jobs, and the way into each of them."""

import sys

from pipelines.runtime.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
