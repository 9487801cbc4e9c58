"""`python -m pipelines`: the menu of jobs, and the way into each of them."""

import gc
import sys

from pipelines.runtime.command_line import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    gc.freeze()  # else the interpreter takes Ray and MLflow apart object by object, for a second
    sys.exit(code)
