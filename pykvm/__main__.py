"""``python -m pykvm`` is the command ``pykvm``."""

import sys

try:
    from pykvm.cli import main

    status = main()
except KeyboardInterrupt:  # before main() could see to it
    status = 130
sys.exit(status)
