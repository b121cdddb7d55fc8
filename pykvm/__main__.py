"""``python -m pykvm`` is the command ``pykvm``."""

import sys

from pykvm.cli import main

sys.exit(main())
