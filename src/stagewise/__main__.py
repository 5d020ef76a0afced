"""`python -m stagewise` is the command `stagewise`; worker processes are started this way."""

from stagewise.cli.main import main

main()
