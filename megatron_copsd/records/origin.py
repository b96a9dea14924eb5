"""What a checkpoint says about where it is from: its settings, the model's files beside the weights, its tokenizer.

So a run is continued with the model it began with, and exported as that model, whatever has become of ``model.path``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_copsd.architecture import Architecture
from megatron_copsd.config.resume import changes
from megatron_copsd.config.schema import Config
from megatron_copsd.errors import UserError, describe
from megatron_copsd.hf.outputs import is_copied
from megatron_copsd.hf.read import read_architecture
from megatron_copsd.records.disk import read_text

STATE_FILE = "trainer.json"
"""Of a checkpoint: the step, and what is compared before a run is continued from it."""

_HF = "hf"
_CONFIG = "config.json"
_ANEW = "Continue with what the run began with, or give another run.dir to start anew."


@dataclass(frozen=True)
class Origin:
    """What every checkpoint of a run carries beside its tensors.

    Attributes:
        settings: ``Config.model_dump(mode="json")``.
        tokenizer: see ``tokenizer_digest``.
        rows: number of problems of each source that is trained on.
        files: configuration, tokenizer and the like of the model that is trained, by name.
    """

    settings: Mapping[str, Any]
    tokenizer: str
    rows: tuple[int, ...]
    files: Mapping[str, bytes]

    def facts(self) -> dict[str, Any]:
        """Return what ``trainer.json`` says of it."""
        return {"settings": self.settings, "tokenizer": self.tokenizer, "rows": list(self.rows)}

    def write_files(self, checkpoint: Path) -> None:
        """Write the model's files into a checkpoint."""
        folder = checkpoint / _HF
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def require_same(self, checkpoint: Path) -> None:
        """Refuse to go on from a checkpoint with another tokenizer, or with data of other sizes.

        Raises:
            UserError: naming what differs.
        """
        saved = read_facts(checkpoint)
        if saved.get("tokenizer", self.tokenizer) != self.tokenizer:
            rule = f"{checkpoint} was trained with another tokenizer: the same text would be other tokens"
            raise UserError(describe("model.path", self.settings["model"]["path"], rule, _ANEW))
        if saved.get("rows", list(self.rows)) != list(self.rows):
            rule = f"{checkpoint} was trained on sources of {saved['rows']} problems: some would come twice"
            raise UserError(describe("data.train (problems of each source)", list(self.rows), rule, _ANEW))


def origin_of(config: Config, tokenizer: PreTrainedTokenizerBase, rows: tuple[int, ...], folder: Path) -> Origin:
    """Return the origin of a run that trains the model in a folder; reads its small files."""
    kept = [file for file in sorted(folder.iterdir()) if file.name == _CONFIG or is_copied(file)]
    files = {file.name: file.read_bytes() for file in kept}
    return Origin(config.model_dump(mode="json"), tokenizer_digest(tokenizer), rows, files)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of what turns text into tokens: vocabulary, merges, normalisation, added tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tree: Any = [sorted(tokenizer.get_vocab().items()), type(tokenizer).__name__]
    else:
        tree = json.loads(backend.to_str())
        # How the last call padded and cut is no property of the tokenizer.
        tree = {name: value for name, value in tree.items() if name not in ("padding", "truncation")}
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_facts(checkpoint: Path) -> Mapping[str, Any]:
    """Read what a checkpoint's ``trainer.json`` says.

    Raises:
        UserError: it can't be read, or is no JSON object with a step.
    """
    path = checkpoint / STATE_FILE
    try:
        found = json.loads(read_text(path))
        if isinstance(found, dict) and type(found.get("step")) is int:
            return found
        rule = "is not a JSON object with a step"
    except (OSError, ValueError, RecursionError) as error:
        rule = f"can't be read ({type(error).__name__})"
    remedy = "Move the checkpoint away to continue from the one before."
    raise UserError(describe(str(path), path.name, rule, remedy))


def model_folder(checkpoint: Path) -> Path | None:
    """Return the folder of the model's files in a checkpoint; None in one of before they were kept."""
    folder = checkpoint / _HF
    return folder if (folder / _CONFIG).is_file() else None


def architecture_of(config: Config, checkpoint: Path | None = None) -> Architecture:
    """Return the model's architecture: as a checkpoint that says it has it, or as the folder does."""
    folder = model_folder(checkpoint) if checkpoint else None
    if folder:
        return read_architecture(str(folder), None)
    return read_architecture(config.model.path, config.model.revision)


@dataclass(frozen=True)
class Comparison:
    """A checkpoint against the settings that it would be continued with.

    Attributes:
        problems: why it can't be, one text each.
        notes: what changes, for the user to know.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]


def compare(checkpoint: Path, config: Config) -> Comparison:
    """Compare settings and the model's shape with those of a checkpoint.

    Raises:
        UserError: the checkpoint's files, or the model's configuration, can't be read.
    """
    saved = read_facts(checkpoint)
    problems = list(_other_shape(checkpoint, config))
    notes = []
    for change in changes(saved.get("settings", {}), config):
        if change.refused:
            rule = f"{checkpoint} was trained with {change.before!r}, and {change.refused}"
            problems.append(describe(change.setting, change.after, rule, _ANEW))
        else:
            notes.append(f"{change.setting}: {change.before!r} before, {change.after!r} from step {saved['step'] + 1}")
    return Comparison(tuple(problems), tuple(notes))


def _other_shape(checkpoint: Path, config: Config) -> Iterator[str]:
    folder = model_folder(checkpoint)
    if folder is None:
        return
    then = dataclasses.asdict(read_architecture(str(folder), None))
    now = dataclasses.asdict(read_architecture(config.model.path, config.model.revision))
    for name in then:
        if then[name] != now[name]:
            rule = f"{checkpoint} is of a model with {then[name]!r}"
            yield describe(f"model.path ({config.model.path}): {name}", now[name], rule, _ANEW)
