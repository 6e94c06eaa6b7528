"""A command line, read by tyro into a dataclass."""

import contextlib
import io
import re


def read(kind, argv=None, **options):
    """`tyro.cli`, except that words which it cannot read end in one line like every other bad input.

    Raises:
        ValueError: unknown or missing flags, or values of another type; its text is that of tyro's frame.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, **options)
    except SystemExit as end:
        if not end.code:  # --help
            raise
    lines = [line.strip("│╭╮╰╯ ") for line in said.getvalue().splitlines()[1:]]
    parts = " ".join(line if line.strip("─") else "\n" for line in lines).split("\n")  # between the rules
    meant = re.search(r"Perhaps you meant:?\s+(-\S+)", said.getvalue().replace("│", " "))
    hint = f" (perhaps {meant[1]}?)" if meant else ""
    raise ValueError(f"{' '.join(parts[0].split()).rstrip('.')}{hint}; see --help") from None
