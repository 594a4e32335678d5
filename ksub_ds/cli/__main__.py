"""Run `ksub` as `python -m ksub_ds.cli`."""

import sys

from ksub_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
