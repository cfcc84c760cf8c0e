"""The command line of a pretraining run.

`--config a.yaml --config b.yaml --section.field value`: files and flags merge in the order in
which they are written, the later one wins, and a key that no section knows is an error. Flags have
short names, too (flags.py). Relative paths, in files as on the command line, start at the
working directory, so that one recipe serves from wherever its data lies; `${config_dir}` at the
beginning of a value stands for the folder of the file that says it. Words are read as the field's
type wants them (yaml_files.py), not as YAML 1.1 does.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from megatron_dattn.config.flags import expand_short_flags, kind_at, refuse_unknown_flags
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.config.renamed_keys import RENAMED, current_name, with_current_keys
from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.log import give_up_unwritable_output
from megatron_dattn.yaml_files import (
    CONFIG_DIR,
    is_wordless,
    parse_yaml,
    plain_value,
    read_yaml,
)


@dataclass(frozen=True)
class CommandLine:
    """What the user asked for."""

    config: PretrainConfig
    dry_run: Literal["here", "elsewhere"] | None
    """Print the plan of the run (parameters, tokens, FLOPs, memory per rank) and stop: of a run on
    this machine, or of one on another whose packages and files are not here."""
    dry_run_rank: int | None = None
    """Build this rank, too, without memory and without the others."""


def parse_command_line(argv: Sequence[str], prog: str = "pretrain_vlm.py") -> CommandLine:
    """Read flags and files into a checked configuration.

    Raises:
        ConfigError: unknown key, value of the wrong type, values that cannot work; one line.
        SystemExit: after printing, for `--help`.
    """
    parser = _build_parser(prog)
    try:
        words = expand_short_flags(argv)
        refuse_unknown_flags(words, parser._option_string_actions)
        parsed = parser.parse_args(_values_as_meant(words))
        dry_run, rank = parsed.pop("dry_run"), parsed.pop("dry_run_rank")
        if rank is not None and dry_run is None:
            raise ConfigError(f"--dry-run-rank {rank} is a part of a dry run: add --dry-run")
        built = parser.instantiate(parsed)
        sections = {f.name: built[f.name] for f in dataclasses.fields(PretrainConfig)}
        return CommandLine(PretrainConfig(**sections), dry_run, rank)
    except ConfigError:
        raise
    except (argparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_one_line(str(error))) from error


def load_config(*paths: str | Path) -> PretrainConfig:
    """Merge YAML files as `--config` does."""
    argv = [item for path in paths for item in ("--config", str(path))]
    return parse_command_line(argv).config


def render_config(config: PretrainConfig) -> str:
    """The resolved configuration as YAML that serves as `--config` again."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _values_as_meant(argv: Sequence[str]) -> list[str]:
    """Rewrite values as the files' reader understands them, in JSON where that differs."""
    words: list[str] = []
    name = ""
    for token in argv:
        if not token.startswith("--"):
            words.append(_as_meant(token, name))
            name = ""
            continue
        flag, equals, value = token.partition("=")
        words.append(f"{flag}={_as_meant(value, flag)}" if equals else token)
        name = "" if equals else flag
    return words


def _as_meant(value: str, flag: str) -> str:
    name = flag.removeprefix("--").removesuffix("+")
    kind = kind_at(name)
    if kind is None:
        return value
    in_brackets = value.lstrip().startswith(("{", "["))
    if flag.endswith("+") and not value.lstrip().startswith("["):
        (kind,) = typing.get_args(kind) or (kind,)  # `--data.train+` adds one
    try:
        if in_brackets and is_wordless(kind):
            parsed = _parse_inline(value, kind)
            for old in (f"{name}.{key}" for key in parsed if isinstance(parsed, dict)):
                if old != current_name(old):
                    raise ConfigError(f"{old} is the old name of {current_name(old)}")
            return json.dumps(parsed)
        if value.startswith(CONFIG_DIR):
            raise ConfigError(f"{CONFIG_DIR} has a meaning in files only")
        meant = plain_value(value, kind)
    except ConfigError as error:
        raise ConfigError(f"--{name}: {error}") from None
    return json.dumps(meant) if isinstance(meant, bool | int | float) else value


def _parse_inline(text: str, kind: Any) -> Any:
    return parse_yaml(text, kind, source=f"'{text:.100}'", other_fields=_old_fields())


def _old_fields() -> dict[str, Any]:
    """The type of every renamed key, so that its words in a file are read as ever."""
    return {old: kind_at(current_name(old)) for old in RENAMED}


class _ConfigFile(jsonargparse.ActionConfigFile):
    """Hands a file to the parser as JSON, which has one meaning only."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        inline = value.lstrip().startswith("{")
        content = (
            _parse_inline(value, PretrainConfig)
            if inline
            else read_yaml(Path(value), PretrainConfig, other_fields=_old_fields())
        )
        if not isinstance(content, dict | None):
            raise ConfigError(f"'{value:.100}' must hold sections such as `training:`")
        try:
            text = json.dumps(with_current_keys(content or {}))
            jsonargparse.ActionConfigFile.apply_config(parser, cfg, dest, text)
        except TypeError as error:
            raise TypeError(f"'{value:.100}': {error}") from error


_HELP = """\
usage: {prog} [--config FILE]... [--dry-run [here | elsewhere]] [--SECTION.SETTING VALUE]...

Pretrain a vision-language model with Decomposed Attention.

  --config FILE
      A YAML file of the settings below; may be given repeatedly, and what is written later wins.
  --dry-run [here | elsewhere]
      Print the plan of the run and what would end its start, and stop. `elsewhere` plans for
      another machine: packages and files that are missing here are only mentioned.
  --dry-run-rank N
      Besides, build rank N of the environment's WORLD_SIZE and pass a micro-batch through it,
      without memory and without the other ranks. This machine is not checked then.

A setting's last part alone will do where only one section has it: --seed is --training.seed."""


class _Help(argparse.Action):
    """Explains every setting, in the words that stand beside its field."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        # Only here: reading the docstrings takes longer than reading the settings.
        from megatron_dattn.config.documentation import help_text

        # Whoever reads the first lines only, as `| head` does, has seen enough.
        with contextlib.suppress(BrokenPipeError):
            print(_HELP.format(prog=parser.prog), help_text(), sep="\n", flush=True)
        give_up_unwritable_output()
        parser.exit()


def _build_parser(prog: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        parser_mode="json",
        description="Pretrain a vision-language model with Decomposed Attention.",
        exit_on_error=False,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0)
    parser.add_argument("--config", action=_ConfigFile)
    parser.add_argument(
        "--dry-run",
        nargs="?",
        choices=["here", "elsewhere"],
        const="here",
    )
    parser.add_argument("--dry-run-rank", type=int)
    parser.add_class_arguments(PretrainConfig, None)
    return parser


def _one_line(message: str) -> str:
    """Join the parser's lines and spell its words as a user would."""
    text = " ".join(line.strip() for line in message.splitlines() if line.strip())
    text = text.replace("Parser key ", "").replace("Expected a typing.Literal", "Expected one of ")
    return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
