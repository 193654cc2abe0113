"""How the commands in `launch/` end."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Run a command; what is wrong with what it was given is one sentence and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
