"""`python -m bn_repro.report`."""

import sys

from bn_repro.report import page

sys.exit(page.main())
