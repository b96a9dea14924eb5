"""One rank of the processes that a test starts: trains under one layout after another, as far as it belongs to them.

layouts_worker.py PLAN, a JSON list of runs: {"processes", "config", "overrides", "folder"}. Each leaves its
weights as HF tensors in its folder. One start for all layouts, because importing takes longer than a small training.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from ranks import enter_group
from safetensors.torch import save_file

from megatron_copsd import platform
from megatron_copsd.config.load import load_config
from megatron_copsd.config.schema import Config

with platform.importing_megatron():
    from megatron.core import parallel_state

    from megatron_copsd.model.gather import iter_hf_tensors
    from megatron_copsd.run import assemble
    from megatron_copsd.train import train


def run_and_leave(config: Config) -> None:
    run = assemble(config)
    with run.monitor or nullcontext():
        train(run)
    run.engine.close()
    layout = run.model.layout
    gathered = iter_hf_tensors(run.model.chunks, run.model.architecture, *layout.weight_groups)
    tensors = {name: tensor.detach().clone() for name, tensor in gathered}
    if run.platform.is_main:
        save_file(tensors, run.folder.root / "weights.safetensors")
    parallel_state.destroy_model_parallel()
    platform.stop()


def main() -> None:
    rank = int(os.environ["RANK"])
    for number, plan in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        if rank < plan["processes"]:
            enter_group(number, plan["processes"])
            run_and_leave(load_config(plan["config"], [*plan["overrides"], f"run.dir={plan['folder']}"]).config)


if __name__ == "__main__":
    main()
