"""`python -m stagewise` is the command `stagewise`; worker processes are started so."""

from stagewise.cli.main import main

main()
