"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Something given to the program is wrong; the message says where, what, which rule, and the remedy.

    Command lines print the message alone and exit with code 2; every other exception is a bug of ours and keeps its
    traceback.
    """


def describe(where: str, value: object, rule: str, remedy: str) -> str:
    """Format one problem the same way everywhere: place, offending value, rule broken, remedy."""
    return f"{where}: {value!r}: {rule}. {remedy}"
