"""`python -m cswap_deploy` is the command line."""

import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path.cwd() != Path(__file__).parents[1]:
    del sys.path[0]  # `python -m` looks for modules in the current folder, which may be a bundle

from cswap_deploy.cli import main

main()
