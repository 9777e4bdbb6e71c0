"""`python -m surgery`: the command line."""

from surgery.cli import main

main()
