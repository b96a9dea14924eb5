"""``copsd plan``: whether a configuration fits on so many GPUs, how long its steps last, which layout is best."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from copsd_tools.command_line.arguments import add_configuration, new_parser, positive, share
from copsd_tools.command_line.terminal import number_table
from megatron_copsd.config.check import expert_problems
from megatron_copsd.config.load import load_config
from megatron_copsd.config.reading.files import Places
from megatron_copsd.config.settings import Problem
from megatron_copsd.errors import UserError, describe
from megatron_copsd.plan.hardware import GPUS, Assumptions
from megatron_copsd.plan.memory import PHASES, MemoryPlan, memory_plan, verdict
from megatron_copsd.plan.published import known_architecture
from megatron_copsd.plan.search import Ranked, SearchResult, SearchSpace, scaling_table, search
from megatron_copsd.plan.steptime import StepTime, step_time
from megatron_copsd.plan.workload import layout_from, layout_problems, unplanned, workload_from

EXAMPLES = """examples:
  copsd plan configs/qwen3_8b.yaml --gpus 8 --gpu h100-80
  copsd plan configs/qwen3_8b.yaml --gpus 16 --gpu h200-141 parallel.tensor=2 optimizer.micro_batch_size=2
  copsd plan configs/qwen3_32b.yaml --gpus 64 --search
  copsd plan configs/qwen3_32b.yaml --gpus 1024 --search rollout.prompts_per_step=1024 --json
  copsd plan configs/qwen3_32b.yaml --scale 8 64 512 --gpu h200-141

Memory is for the longest sequences that the configuration admits; time for --fill times them.
Nothing is started and nothing downloaded: model.path is a folder, or one of the published Qwen3 models.
"""
_GIB = 1 << 30
_SHOWN = 10


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code: 0 the layout fits, or some layout does, 1 it does not."""
    args = _parser().parse_intermixed_args(argv)
    loaded = load_config(args.config, args.overrides)
    config, places = loaded.config, loaded.places
    model, work = known_architecture(config.model.path), workload_from(config, args.gpus or 0, args.fill)
    _refuse(places, [*unplanned(config), *expert_problems(config, model.experts > 0)])
    gpu, assumed = GPUS[args.gpu], Assumptions()
    about = {"config": args.config, "model": config.model.path, "gpus": args.gpus, "gpu": args.gpu, "fill": args.fill}
    if args.scale:
        print(scaling_table(model, args.scale, work, gpu, assumed))
        return 0
    if args.search:
        result = search(model, args.gpus, work, gpu, assumed, SearchSpace())
        if args.json:
            print(json.dumps({**about, **_search_as_data(result)}, indent=2))
        else:
            _show_search(Console(), result, f"{config.model.path} on {args.gpus} {args.gpu}")
        return 0 if result.ranked else 1
    layout = layout_from(config, args.gpus)
    _refuse(places, layout_problems(model, layout))
    memory = memory_plan(model, layout, work, gpu, assumed)
    time = step_time(model, layout, work, gpu, assumed)
    if args.json:
        print(json.dumps({**about, **_as_data(Ranked(layout, memory, time))}, indent=2))
    else:
        _show(Console(), Ranked(layout, memory, time), f"{config.model.path} on {args.gpus} {args.gpu}")
    return 0 if memory.fits else 1


def _refuse(places: Places, problems: Sequence[Problem]) -> None:
    if problems:
        raise UserError("\n".join(describe(places.named(name), *rest) for name, *rest in problems))


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("plan", __doc__, EXAMPLES)
    add_configuration(parser)
    numbers = parser.add_mutually_exclusive_group(required=True)
    numbers.add_argument("--gpus", type=positive, help="GPUs of the trainer")
    numbers.add_argument(
        "--scale",
        type=positive,
        nargs="+",
        metavar="N",
        help="print the best of all layouts for each number of GPUs, as Markdown; a GPU gets at least a sequence, and "
        "rollouts come from servers on half as many further GPUs",
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100-80", help="which (default h100-80)")
    parser.add_argument("--search", action="store_true", help="rank all layouts by predicted step time")
    parser.add_argument(
        "--fill",
        type=share,
        default=1.0,
        help="typical lengths as a share of the longest, for the time (default 1)",
    )
    parser.add_argument("--json", action="store_true", help="print data")
    return parser


def _show(console: Console, plan: Ranked, title: str) -> None:
    memory = plan.memory
    table = number_table(f"{title}: GiB on a GPU of stage {memory.stage}", ["part"], PHASES)
    table.caption = plan.layout.describe()
    for part in memory.parts:
        table.add_row(part.name, *(_gib(part.bytes) if phase in part.phases else "" for phase in PHASES))
    table.add_section()
    table.add_row("together", *(_gib(memory.in_phase(phase)) for phase in PHASES))
    console.print(table)
    console.print(f"host memory for each GPU: {_gib(memory.host)} GiB", highlight=False)
    for line in verdict(memory):
        console.print(line, highlight=False, markup=False)
    time = plan.time
    table = number_table("predicted seconds of a step", [], [*time.seconds, "together"])
    table.add_row(*(f"{seconds:.2f}" for seconds in (*time.seconds.values(), time.total)))
    console.print(table)
    console.print(
        f"MFU {time.mfu:.1%}, HFU {time.hfu:.1%}, pipeline bubble {time.bubble:.1%}, collectives "
        f"{time.communication:.1%}; {time.tokens_per_second_per_gpu:,.0f} response tokens/s/GPU over {time.gpus} GPUs",
        highlight=False,
    )


def _show_search(console: Console, result: SearchResult, title: str) -> None:
    if result.ranked:
        words = ("layout", "microbatch", "recompute")
        numbers = ("step s", "teacher s", "student s", "MFU", "bubble", "peak GiB", "left")
        table = number_table(f"{title}: {len(result.ranked)} layouts fit, the fastest", words, numbers)
        for column in table.columns[: len(words)]:
            column.no_wrap = True
        for plan in result.ranked[:_SHOWN]:
            time, memory = plan.time, plan.memory
            table.add_row(
                plan.layout.cuts(),
                str(plan.layout.micro_batch),
                plan.layout.recompute,
                *(f"{s:.2f}" for s in (time.total, time.seconds["teacher"], time.seconds["student"])),
                f"{time.mfu:.1%}",
                f"{time.bubble:.1%}",
                _gib(memory.peak),
                _gib(memory.margin),
            )
        console.print(table)
    for reason, count in sorted(result.rejected.items(), key=lambda item: -item[1]):
        console.print(f"{count} layouts: {reason}", highlight=False)
    if result.smallest:
        layout, memory = result.smallest
        console.print(f"{title}: no layout fits; the closest is {layout.describe()}", highlight=False)
        for line in verdict(memory):
            console.print(line, highlight=False, markup=False)
    elif not result.ranked:
        console.print(f"{title}: no layout cuts this model over so many GPUs", highlight=False)


def _as_data(plan: Ranked) -> dict[str, Any]:
    return {
        "layout": {**dataclasses.asdict(plan.layout), "data": plan.layout.data},
        "memory": _memory_as_data(plan.memory),
        "time": _time_as_data(plan.time),
    }


def _memory_as_data(memory: MemoryPlan) -> dict[str, Any]:
    parts = [{"name": part.name, "bytes": part.bytes, "phases": part.phases} for part in memory.parts]
    numbers = {"stage": memory.stage, "peak": memory.peak, "capacity": memory.capacity, "host": memory.host}
    return {**numbers, "fits": memory.fits, "phase": memory.fullest_phase, "parts": parts}


def _time_as_data(time: StepTime) -> dict[str, Any]:
    return {**dataclasses.asdict(time), "total": time.total}


def _search_as_data(result: SearchResult) -> dict[str, Any]:
    ranked = [_as_data(plan) for plan in result.ranked[:_SHOWN]]
    return {"fitting": len(result.ranked), "ranked": ranked, "rejected": result.rejected}


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f}"
