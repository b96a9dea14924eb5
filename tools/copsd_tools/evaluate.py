"""``copsd evaluate``: accuracy of a model on held-out problems, or scores of translations."""

from __future__ import annotations

import argparse
import json
import sys

from copsd_tools.command_line.arguments import add_configuration, new_parser, override, path
from copsd_tools.command_line.outputs import check_new_file
from megatron_copsd.records.disk import replace_text

EXAMPLES = """examples:
  copsd evaluate accuracy configs/demo_copsd.yaml --model runs/demo/copsd/hf
  copsd evaluate accuracy configs/demo_copsd.yaml eval.samples=12 eval.temperature=1.0 --model exported/step100
  copsd evaluate accuracy CONFIG rollout.engine=sglang --model exported/step100      answers from SGLang servers
  copsd evaluate translation --hypotheses out.sw --references flores.swh_Latn
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("evaluate", __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    accuracy = commands.add_parser("accuracy", help="grade sampled or greedy answers on the configuration's data.eval")
    add_configuration(
        accuracy,
        "YAML file whose data.eval, prompt, rollout and eval sections apply; the settings to "
        "change come before the options",
    )
    accuracy.set_defaults(run=_accuracy)
    accuracy.add_argument("--model", help="HF folder or hub name; the configuration's model.path by default")
    accuracy.add_argument("--out", type=path, help="write the numbers as JSON")
    translation = commands.add_parser("translation", help="BLEU and chrF++ of translated sentences, with SacreBLEU")
    translation.set_defaults(run=_translation)
    translation.add_argument("--hypotheses", type=path, required=True, help="one sentence a line")
    translation.add_argument(
        "--references", type=path, required=True, help="one sentence a line, or TSV source, reference"
    )
    translation.add_argument("--tokenizer", default="13a", help="SacreBLEU tokenizer: 13a, intl, char, zh, flores200")
    translation.add_argument("--out", type=path, help="write the numbers as JSON")
    args = parser.parse_args(argv)
    if args.out:
        check_new_file(args.out, "--out")
    numbers: dict[str, object] = args.run(args)
    if args.out:
        then = "take the numbers from above, or start the same command again"
        replace_text(args.out, json.dumps(numbers, indent=2) + "\n", then)
    return 0


def _translation(args: argparse.Namespace) -> dict[str, object]:
    from megatron_copsd.evaluate.translation import score_translation

    report = score_translation(args.hypotheses, args.references, tokenizer=args.tokenizer)
    print(report.summary())
    return report.numbers()


def _accuracy(args: argparse.Namespace) -> dict[str, object]:
    from megatron_copsd.config.check import check
    from megatron_copsd.config.load import load_config

    overrides = list(args.overrides)
    if args.model:
        overrides += [override("model.path", args.model), "model.init=weights", "model.revision=null"]
    if not any(given.startswith("eval.at_end=") for given in overrides):
        overrides.append("eval.at_end=true")  # so that a configuration without held-out data is refused
    loaded = load_config(args.config, overrides)
    check(loaded)
    config = loaded.config

    from megatron_copsd.hf.read import read_architecture
    from megatron_copsd.hf.weight_files import check_weights

    architecture = read_architecture(config.model.path, config.model.revision)
    if note := check_weights(config.model.path, architecture, config.rollout.dtype or config.model.dtype):
        print(f"model.path ({config.model.path}): {note}", file=sys.stderr, flush=True)

    from megatron_copsd import platform

    with platform.importing_megatron():
        from megatron_copsd.data.items import check_texts, load_held_out
        from megatron_copsd.engines import open_engine, take_folder_weights
        from megatron_copsd.evaluate.accuracy import evaluate_source
        from megatron_copsd.hf.texts.stops import stop_ids
        from megatron_copsd.hf.texts.tokenizer import load_tokenizer
        from megatron_copsd.run import sampling_for_evaluation

    check_texts(config, architecture)
    here = platform.start(config.parallel.timeout_s)
    tokenizer = load_tokenizer(config.model.path, config.model.revision, architecture.vocab_size)
    held_out = load_held_out(config, tokenizer, show=here.is_main)
    sampling = sampling_for_evaluation(config, stop_ids(config, tokenizer, architecture.vocab_size))
    engine = open_engine(config, config.rollout.engine, tokenizer, here, print if here.is_main else None)
    numbers: dict[str, object] = {}
    try:
        take_folder_weights(engine, config)
        for label, pairs in held_out.items():
            report = evaluate_source(engine, pairs, sampling, config.eval.samples, config.run.seed)
            print(f"{label}: {report.summary()}")
            numbers[label] = report.numbers()
    finally:
        engine.close()
    platform.stop()
    return numbers
