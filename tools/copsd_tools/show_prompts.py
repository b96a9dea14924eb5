"""``copsd show-prompts``: what both roles read of the first problems of each source, as the model's tokens say it."""

from __future__ import annotations

from copsd_tools.command_line.arguments import add_configuration, new_parser, positive
from copsd_tools.command_line.terminal import say
from megatron_copsd.errors import UserError, describe

EXAMPLES = """examples:
  copsd show-prompts configs/smollm2_mgsm_sw.yaml
  copsd show-prompts configs/smollm2_mgsm_sw.yaml prompt.teacher_thinking=empty --rows 1
  copsd show-prompts CONFIG --held-out                          what is asked in evaluation
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("show-prompts", __doc__, EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--rows", type=positive, default=3, help="problems of each source (default 3)")
    parser.add_argument("--held-out", action="store_true", help="of data.eval, as evaluation asks them")
    args = parser.parse_intermixed_args(argv)

    from megatron_copsd.config.load import load_config
    from megatron_copsd.config.sections.data import makes_teacher_prompts
    from megatron_copsd.data.problems import load_problems
    from megatron_copsd.data.prompts import PromptBuilder
    from megatron_copsd.hf.read import read_architecture
    from megatron_copsd.hf.texts.tokenizer import load_tokenizer

    config = load_config(args.config, args.overrides).config
    architecture = read_architecture(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(config.model.path, config.model.revision, architecture.vocab_size)
    builder = PromptBuilder(tokenizer, config.evaluation_prompt if args.held_out else config.shown_prompt)
    section = "eval" if args.held_out else "train"
    if not config.data.sources[section]:
        rule = "the configuration has no held-out problems"
        raise UserError(describe("data.eval", None, rule, "Give it some, or leave --held-out away."))
    both = makes_teacher_prompts(config) and not args.held_out
    for i, source in enumerate(config.data.sources[section]):
        for problem in load_problems(source, f"data.{section}.{i}").problems[: args.rows]:
            if both:
                pair = builder.pair(problem)
                prompts = {"student": pair.student_prompt, "teacher": pair.teacher_prompt} if pair else {}
            else:
                alone = builder.student_prompt(problem)
                prompts = {"student": alone} if alone else {}
            if not prompts:
                say(f"=== {problem.id}: dropped, a prompt is over its limit")
            for role, ids in prompts.items():
                say(f"=== {problem.id}, {role}: {len(ids)} tokens\n{tokenizer.decode(ids)}")
    return 0
