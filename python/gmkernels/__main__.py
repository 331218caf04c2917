"""`python -m gmkernels`."""

import sys

from .cli import main

sys.exit(main())
