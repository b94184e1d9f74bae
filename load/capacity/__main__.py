"""`python -m load.capacity`: see `load.capacity.command`."""

import sys

from load.capacity.command import main

if __name__ == "__main__":
    sys.exit(main())
