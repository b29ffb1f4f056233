"""``python -m jaxeff``: the same as the ``jaxeff`` console script."""

from jaxeff.cli import main

if __name__ == "__main__":
    main()
