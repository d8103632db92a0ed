"""`python -m polyspec`."""

from polyspec.cli import main

if __name__ == "__main__":
    main()
