"""`python -m deltalab` is the command `deltalab`."""

from deltalab.cli import main

main()
