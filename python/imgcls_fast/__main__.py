"""`python -m imgcls_fast` is `imgcls-fast`."""

import sys

from imgcls_fast.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
