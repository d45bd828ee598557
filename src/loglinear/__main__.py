"""`python -m loglinear` is the `loglinear` command."""

from loglinear.cli import main

if __name__ == "__main__":
    main()
