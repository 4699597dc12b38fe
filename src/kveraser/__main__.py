"""`kveraser`, `python -m kveraser`, and so `accelerate launch -m kveraser` and `torchrun -m kveraser`."""

import sys

from kveraser.errors import MissingExtraError, extras


def main() -> None:
    """Run the command line; without its packages, say in one line how to install them."""
    try:
        with extras():
            from kveraser.cli.main import main as run
    except MissingExtraError as error:
        print(f"kveraser: {error}", file=sys.stderr)
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
