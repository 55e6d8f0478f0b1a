"""`python -m depcut` is the `depcut` command."""

from depcut.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
