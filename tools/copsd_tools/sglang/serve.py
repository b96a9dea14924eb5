"""``copsd serve``: start the SGLang servers of a configuration by themselves, for trainers elsewhere or for a look."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from copsd_tools.command_line.arguments import add_configuration, new_parser
from copsd_tools.command_line.outputs import check_folder
from copsd_tools.command_line.terminal import say
from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd serve configs/smollm2_mgsm_sw.yaml
  copsd serve CONFIG sglang.servers=2 sglang.devices=[0,1] sglang.memory_fraction=0.85 sglang.port=30000
  copsd train CONFIG rollout.engine=sglang 'sglang.urls=[http://127.0.0.1:30000,http://127.0.0.1:30001]'
"""
_LOOK_SECONDS = 1.0
_FAILED = 1


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("serve", f"{__doc__} Ends on Ctrl-C, and when a server ends.", EXAMPLES)
    add_configuration(parser)
    args = parser.parse_intermixed_args(argv)
    return _serve(args.config, args.overrides)


def _serve(path: str, overrides: Sequence[str]) -> int:
    from rich.console import Console

    from megatron_copsd.config.check import check
    from megatron_copsd.config.load import load_config
    from megatron_copsd.hf.read import read_architecture
    from megatron_copsd.hf.weight_files import check_weights
    from megatron_copsd.rollout.sglang.process import SglangServer, plan_servers, start_all, stop_all

    loaded = load_config(path, [*overrides, "rollout.engine=sglang"])
    check(loaded)
    config, places = loaded.config, loaded.places
    if config.sglang.urls:
        rule = "these servers run already, and serve starts its own"
        raise UserError(describe(places.named("sglang.urls"), config.sglang.urls, rule, "Add sglang.urls=[]."))
    check_folder(Path(config.run.dir), places.named("run.dir"))
    check_weights(config.model.path, read_architecture(config.model.path, config.model.revision), config.model.dtype)
    servers = [SglangServer(plan) for plan in plan_servers(config)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    try:
        with console.status("starting; logs: " + ", ".join(str(server.plan.log) for server in servers)):
            start_all(servers, config.sglang.start_timeout_s)
        say("ready: " + " ".join(server.url for server in servers), console)
        while not (ended := [str(server.plan.log) for server in servers if not server.is_alive]):
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        return 0
    finally:
        stop_all(servers)
    say(f"a server has ended; see {', '.join(ended)}", console)
    return _FAILED
