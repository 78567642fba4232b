"""python -m experiments.doctor"""

import sys

from experiments.doctor.examine import main

if __name__ == "__main__":
    sys.exit(main())
