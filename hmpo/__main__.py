"""`python -m hmpo` is `hmpo`."""

import sys

from hmpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
