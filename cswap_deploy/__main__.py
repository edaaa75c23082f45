"""`python -m cswap_deploy` is the command line."""

from cswap_deploy.cli import main

main()
