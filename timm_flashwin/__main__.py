"""`python -m timm_flashwin` is the `timm-flashwin` command."""

import sys

from .cli import main

sys.exit(main())
