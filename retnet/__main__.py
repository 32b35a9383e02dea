"""`python -m retnet`: the command line where `retnet` is not on the PATH."""

from retnet.cli import main

if __name__ == "__main__":
    main()
