"""The error for wrong input, and the comparison that raises it most. Imports nothing.

A `UserError` is not a bug of ours: scripts print its message as one line and end with status 2.
"""


class UserError(Exception):
    """Wrong usage or input. The message is one line: what, where, how to mend it."""


def require_same(expected, found, what, remedy):
    """Raise a UserError that names the first key whose value differs between two dicts."""
    for key in {**expected, **found}:
        a, b = expected.get(key), found.get(key)
        if a != b:
            raise UserError(
                f"{what}: {key} differs (expected {shorten(a)}, found {shorten(b)}); {remedy}"
            )


def shorten(value):
    """A value as text of at most 70 characters."""
    text = str(value)
    return text if len(text) <= 70 else text[:60] + "..."


def first_line(error, limit=120):
    """The first line of an exception's message, or its type where it has none, cut to `limit`."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit]
