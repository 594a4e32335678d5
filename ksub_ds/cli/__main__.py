"""`python -m ksub_ds.cli` is `ksub`."""

import sys

from ksub_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
