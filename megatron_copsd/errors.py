"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Something given to the program is wrong; the message says where, what, which rule, and the remedy.

    Command lines print the message alone and exit with code 2; every other exception is a bug of ours and keeps its
    traceback.
    """


_LONGEST = 500


def describe(where: str, value: object, rule: str, remedy: str) -> str:
    """Format one problem the same way everywhere: place, offending value, rule broken, remedy.

    A value that would fill the screen is shown by its beginning and its end.
    """
    shown = repr(list(value) if isinstance(value, tuple) else value)
    if len(shown) > _LONGEST:
        shown = f"{shown[: _LONGEST // 2]} ... {shown[-_LONGEST // 2 :]}"
    return f"{where}: {shown}: {rule}. {remedy}"
