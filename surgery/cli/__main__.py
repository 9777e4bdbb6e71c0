"""`python -m surgery.cli`, and so `torchrun -m surgery.cli`."""

from surgery.cli import main

main()
