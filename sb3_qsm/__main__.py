"""``python -m sb3_qsm``: the same as the command ``sb3-qsm``."""

import sys

from sb3_qsm.cli import main

sys.exit(main())
