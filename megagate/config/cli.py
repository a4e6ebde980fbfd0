"""argv -> RunConfig, and RunConfig -> YAML.

jsonargparse merges files and overrides in their order of appearance, converts values, and serves `--help`. Keys are checked here
*before* it runs, because it accepts a few mistakes in silence (a number where a group belongs is ignored, `null` passes as any
type, a prefix passes as a key) and names neither line nor remedy for the others.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from megagate.config.keys import all_keys, from_dict, to_dict, unknown_key, wrong_type
from megagate.config.paper import decided
from megagate.config.run import RunConfig
from megagate.errors import ConfigError

_COMMAND_LINE = "on the command line"
_VALUED_OPTIONS = ("config", "preset")
_FLAGS = ("help", "print_config")
_OWN_OPTIONS = (*_VALUED_OPTIONS, *_FLAGS)
_LAUNCHER_OPTIONS = ("--local_rank", "--local-rank")
_TYPE_ERROR = re.compile(r'Parser key "(?P<key>[\w.]+)":.*Got value: (?P<value>.*)', flags=re.DOTALL)

Origins = dict[str, list[str]]
"""Where each key is set, in order of appearance: `my.yaml line 3`, `on the command line`."""


def parse(argv: Sequence[str], *, prog: str) -> RunConfig:
    """The config that a command line describes: defaults, then presets, `--config` files and `--key value` overrides in their order.

    `--help` and `--print_config` write to stdout and leave with exit code 0. The rules between keys are
    `megagate.config.rules.check`.

    Args:
        argv: The arguments, without the program's name. The launcher's `--local_rank=N` is ignored.
        prog: The command that `--help` shows.

    Raises:
        ConfigError: A preset is unknown, a file is missing or broken, a key is unknown, or a value is of the wrong type.
    """
    own = _without_launcher_options(argv)
    origins = _origins(own)
    try:
        namespace = _parser(prog).parse_args(_presets_as_files(own))
    except argparse.ArgumentError as error:
        raise ConfigError(_explain(str(error), origins)) from None
    settings = namespace.as_dict()
    del settings["config"], settings["preset"]
    print_config = settings.pop("print_config")
    config = from_dict(settings, places={name: ", ".join(places) for name, places in origins.items()})
    if print_config:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def to_yaml(config: RunConfig) -> str:
    """The complete config as YAML, itself a valid `--config`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _parser(prog: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--preset NAME] [--config F] [--KEY VALUE] ...",
        description="Keys are set by a preset (--preset paper/table1/row05, a whole run), in a YAML file (--config F, several), or as "
        "--key value; the last one counts.",
        exit_on_error=False,
        default_env=False,
        print_config=None,  # jsonargparse's own prints what precedes it and one file more, not the whole command line
    )
    parser.add_argument("--config", action="config", metavar="F", help="A YAML file of settings. Can be given several times.")
    parser.add_argument("--preset", metavar="NAME", help="A row of the paper, such as paper/table1/row05; see tools/count_params.py --all.")
    parser.add_argument("--print_config", action="store_true", help="Print the merged config as YAML and exit.")
    for key in all_keys().values():
        parser.add_argument(f"--{key.name}", type=key.type, default=key.default, help=key.help.replace("%", "%%"))
    return parser


def _without_launcher_options(argv: Sequence[str]) -> list[str]:
    """`argv` without `--local_rank=N`, which launchers hand to every script; the rank comes from the environment."""
    kept: list[str] = []
    skip_value = False
    for token in argv:
        if skip_value:
            skip_value = False
        elif token in _LAUNCHER_OPTIONS:
            skip_value = True
        elif not token.startswith(tuple(f"{option}=" for option in _LAUNCHER_OPTIONS)):
            kept.append(token)
    return kept


def _presets_as_files(argv: Sequence[str]) -> list[str]:
    """`argv` with each `--preset NAME` as a `--config` of its settings in its place (jsonargparse takes YAML text for a path)."""
    tokens: list[str] = []
    for option, value in _options(argv):
        if option == "preset":
            tokens.append(f"--config={yaml.safe_dump(decided(value))}")
        else:
            tokens.append(f"--{option}" if option in _FLAGS and not value else f"--{option}={value}")
    return tokens


def _origins(argv: Sequence[str]) -> Origins:
    """Where every key of the command line and its files is set.

    Raises:
        ConfigError: A file cannot be read, or a key does not exist.
    """
    origins: Origins = {}
    for option, value in _options(argv):
        if option == "config":
            for name, line in _keys_of_file(value):
                origins.setdefault(name, []).append(f"{value} line {line}")
        elif option == "preset":
            for name in decided(value):
                origins.setdefault(name, []).append(f"preset {value}")
        elif option in all_keys():
            origins.setdefault(option, []).append(_COMMAND_LINE)
        elif option not in _OWN_OPTIONS:
            raise ConfigError(unknown_key(option, where=_COMMAND_LINE, mark="--"))
    return origins


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option of `argv` (without its dashes) with its value, which is empty where it takes none."""
    tokens = iter(range(len(argv)))
    for index in tokens:
        token = argv[index]
        if token == "-h":
            token = "--help"
        if not token.startswith("--") or token == "--":
            raise ConfigError(f"{token!r} {_COMMAND_LINE} belongs to no option; settings are written as --key value")
        option, equals, value = token[2:].partition("=")
        if not equals and (option in _VALUED_OPTIONS or option in all_keys()):
            position = next(tokens, None)
            if position is None or argv[position].startswith("--"):
                raise ConfigError(f"--{option} {_COMMAND_LINE} needs a value; write --{option} VALUE or --{option}=VALUE")
            value = argv[position]
        yield option, value


def _keys_of_file(path: str) -> list[tuple[str, int]]:
    """The dotted keys that a YAML file sets, each with its line.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or holds a key that is unknown, empty or set twice.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path} is not text in UTF-8; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(explain_yaml(error, where=f"--config {path}")) from None
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise ConfigError(f"--config {path} holds no settings; write keys such as `train: {{steps: 100}}`")
    lines: dict[str, int] = {}
    for name, line in _leaves_of_node(root, prefix="", path=path):
        if name in lines:
            raise ConfigError(f"{name} is set twice in {path} (lines {lines[name]} and {line}); keep one of them")
        lines[name] = line
    return list(lines.items())


def _leaves_of_node(node: yaml.MappingNode, *, prefix: str, path: str) -> Iterator[tuple[str, int]]:
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        key = all_keys().get(name)
        is_group = any(known.startswith(f"{name}.") for known in all_keys())
        if is_group and isinstance(value_node, yaml.MappingNode):
            yield from _leaves_of_node(value_node, prefix=f"{name}.", path=path)
        elif key is None:
            raise ConfigError(unknown_key(name, where=f"{path} line {line}"))
        elif value_node.tag == "tag:yaml.org,2002:null":
            raise ConfigError(wrong_type(key, None, where=f"{path} line {line}"))
        else:
            yield name, line


def explain_yaml(error: yaml.YAMLError, *, where: str) -> str:
    """What is wrong with a file, and in which line."""
    mark = getattr(error, "problem_mark", None)
    place = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or str(error)
    return f"{where}{place} is not valid YAML: {problem}; mend that line"


def _explain(message: str, origins: Origins) -> str:
    """jsonargparse's message about a value in this project's words; another message passes unchanged."""
    match = _TYPE_ERROR.search(message)
    key = all_keys().get(match["key"]) if match else None
    if match is None or key is None:
        return message
    value: Any = match["value"].strip()
    return wrong_type(key, value, where=", ".join(origins.get(key.name, [])))
