"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Something given to the program is wrong; the message says where, what, which rule, and the remedy.

    Command lines print the message alone and exit with code 2; every other exception is a bug of ours and keeps its
    traceback.
    """


_LONGEST = 500


def describe(where: str, value: object, rule: str, remedy: str) -> str:
    """Format one problem the same way everywhere: place, offending value, rule broken, remedy."""
    shown = shortened(repr(list(value) if isinstance(value, tuple) else value))
    return f"{where}: {shown}: {rule}. {remedy}"


def shortened(text: str) -> str:
    """Return a text, or its beginning and its end where it would fill the screen."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
