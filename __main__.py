"""``python -m ideogram4_quant``: the same command line as ``ideogram4-quant``."""

import sys

from .cli import main

sys.exit(main())
