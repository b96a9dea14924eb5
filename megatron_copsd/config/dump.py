"""Writing a configuration: for the run's folder, and for people who ask where each value came from."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import BaseModel

from megatron_copsd.config.load import LoadedConfig
from megatron_copsd.config.reading.document import KeyPath
from megatron_copsd.config.reading.files import Places
from megatron_copsd.config.schema import Config, DataSource

_NEVER_FOLDED = 10**6


def dump_config(config: Config) -> str:
    """Return the whole configuration, defaults included, as YAML that ``load_config`` reads back."""
    return _dump(config, width=80)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration for a folder that may be used from elsewhere: local paths of model and data absolute."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if Path(path).exists() else path

    def moved(source: DataSource) -> DataSource:
        given = {name: getattr(source, name) for name in ("path", "english", "solutions")}
        return source.model_copy(update={name: absolute(path) for name, path in given.items() if path is not None})

    data = {name: tuple(map(moved, sources)) for name, sources in config.data.sources.items()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": absolute(config.model.path)}),
            "data": config.data.model_copy(update=data),
        }
    )


def annotate_config(loaded: LoadedConfig) -> str:
    """Return the same with the place where each value was written, as comments: file:line, command line or default."""
    text = _dump(loaded.config, width=_NEVER_FOLDED)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    comments: dict[int, str] = {}
    assert root is not None
    _comment(root, loaded.config, (), loaded.places, comments)
    lines = text.splitlines(keepends=True)
    return "".join(f"{line[:-1]}  # {comments[i]}\n" if i in comments else line for i, line in enumerate(lines))


def _dump(config: Config, width: int) -> str:
    values = config.model_dump(mode="json")
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text


def _comment(node: yaml.Node, value: object, key: KeyPath, places: Places | None, comments: dict[int, str]) -> None:
    """Note the place of every value under a node, by the line that the value ends on.

    Args:
        node: the YAML, as dumped.
        value: the settings that it was dumped from.
        key: where they stand in the configuration.
        places: where settings were written; None inside of what was left to its default.
        comments: what is noted.
    """
    if isinstance(node, yaml.MappingNode) and isinstance(value, BaseModel):
        for name_node, child in node.value:
            name = name_node.value
            given = places if name in value.model_fields_set else None
            _comment(child, getattr(value, name), (*key, name), given, comments)
    elif isinstance(node, yaml.SequenceNode) and isinstance(value, tuple) and value:
        for i, (child, item) in enumerate(zip(node.value, value, strict=True)):
            _comment(child, item, (*key, i), places, comments)
    else:
        comments[node.end_mark.line] = places.nearest(key).source if places else "default"


class _Dumper(yaml.SafeDumper):
    """Writes text so that it is read as the same: by us, and by readers of YAML 1.1."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escape a ``${``, which would be followed as a reference, and line breaks that YAML would take for plain ones."""
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
# Numbers of YAML 1.2 that are none in 1.1, which PyYAML's dumper goes by: text of these forms needs quotes.
for _kind, _form in {"float": r"[-+]?[0-9._]+[eE][-+]?[0-9]+", "int": r"0o[0-7]+|[-+]?[0-9]+"}.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_form})\Z"), list("-+.0123456789"))
