"""python -m experiments.sweep"""

import sys

from experiments.sweep.grid import main

if __name__ == "__main__":
    sys.exit(main())
