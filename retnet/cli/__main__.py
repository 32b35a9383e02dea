"""`python -m retnet.cli`, for launchers such as torchrun that want a module."""

from retnet.cli import main

main()
