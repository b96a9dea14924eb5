"""Finding a command by its name: a command's module is imported when it runs, since --help must not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """One command: the module whose ``main`` takes the arguments after its name, and what it is for, in a line."""

    module: str
    summary: str


@dataclass(frozen=True)
class CommandTable:
    """Commands to choose from.

    Attributes:
        prog: what is typed before a command's name.
        usage: what may follow the name.
        about: the first lines of the help; empty for none.
        closing: its last line.
        commands: by name.
    """

    prog: str
    usage: str
    about: str
    closing: str
    commands: Mapping[str, Command]

    def run(self, argv: Sequence[str]) -> int:
        """Run the command that ``argv`` begins with; returns its exit code, or 2 where there is no such command."""
        if not argv or argv[0] in ("-h", "--help"):
            print(self.help(), end="")
            return 0 if argv else USAGE_ERROR
        name, *rest = argv
        if name not in self.commands:
            known = ", ".join(self.commands)
            print(f"{self.prog}: {name!r}: no such command. Known: {known}.", file=sys.stderr)
            return USAGE_ERROR
        code: int = importlib.import_module(self.commands[name].module).main(rest)
        return code

    def help(self) -> str:
        """The commands and what they are for."""
        width = max(map(len, self.commands))
        lines = [f"usage: {self.prog} COMMAND {self.usage}", ""]
        lines += [self.about, ""] if self.about else []
        lines += ["commands:", *(f"  {name:<{width}}  {entry.summary}" for name, entry in self.commands.items())]
        return "\n".join([*lines, "", self.closing]) + "\n"
