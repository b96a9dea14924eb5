"""Started by a test: ``copsd`` with arguments, killed as soon as it, or a process that it forks, opens a file.

killed_worker.py PART ARGUMENTS...: PART is a part of the file's path. Whoever opens it is not killed, but the process
that was started.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from copsd_tools import cli


def main() -> int:
    part, trainer = sys.argv[1], os.getpid()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and part in str(arguments[0]):
            os.kill(trainer, signal.SIGKILL)

    sys.addaudithook(watch)
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
