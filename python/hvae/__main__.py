"""``python -m hvae``."""

import sys

from hvae.cli import main

sys.exit(main())
