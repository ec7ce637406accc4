"""`python -m imgcls_fast` is `imgcls-fast`."""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path and sys.path[0] in ("", os.path.abspath(os.curdir)):
    # `python -m` looks for modules in the current folder first, and a folder of images may hold a csv.py: not from here on
    del sys.path[0]

from imgcls_fast.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
