"""`python -m fxquant`."""

from fxquant.cli import main

main()
