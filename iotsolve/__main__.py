"""`python -m iotsolve`, where the command is not on the path."""

from iotsolve.cli import main

main()
