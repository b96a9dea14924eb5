"""What each configuration of the Triton kernels takes of each GPU generation, as the compiler says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table

from copsd_tools.bench.compile.ahead_of_time import SHARED_LIMITS, Configuration, Resources, compile_for
from copsd_tools.bench.compile.ahead_of_time import configurations as all_configurations


def compile_all(
    capabilities: Sequence[int] = tuple(SHARED_LIMITS), configurations: Iterable[Configuration] | None = None
) -> Iterator[tuple[Configuration, int, Resources]]:
    """Compile configurations, all by default, for those of the compute capabilities that each is made for."""
    for configuration in all_configurations() if configurations is None else configurations:
        for capability in sorted(set(capabilities) & set(configuration.capabilities)):
            yield configuration, capability, compile_for(configuration, capability)


def resource_table(capabilities: Sequence[int], text: str) -> Table:
    """One line for each configuration whose name has the text, what it takes for each capability."""
    title = "registers of a thread / spilled bytes of a thread / shared bytes of a program / products on tensor cores"
    table = Table("kernel", title=title)
    for capability in capabilities:
        table.add_column(f"sm_{capability}", justify="right")
    lines: dict[str, dict[int, str]] = {}
    chosen = [configuration for configuration in all_configurations() if text in configuration.name]
    for configuration, capability, found in compile_all(capabilities, chosen):
        cell = " / ".join(map(str, (found.registers, found.stack, found.shared, *found.instructions)))
        lines.setdefault(configuration.name, {})[capability] = cell
    for name, cells in lines.items():
        table.add_row(name, *(cells.get(capability, "") for capability in capabilities))
    return table
