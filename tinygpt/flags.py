"""The flags of a command, made from its configurations; settings to JSON and back.

`--preset NAME` and `--config FILE` stand for the settings that they contain. Of two values of a
setting, the later one on the command line wins.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import NoReturn

from tinygpt.config import check_value, did_you_mean, kind_of, range_of
from tinygpt.hints import ALIASES, HINTS
from tinygpt.streams import print_error

TRUTHS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False,
          "on": True, "off": False}


class Settings(dict):
    """An instance of each dataclass, by its key. `given` are the fields that argv sets, also by
    --preset or --config; `typed` are those with a flag of their own in argv."""

    given: set[str]
    typed: set[str]


def parse_flags(classes: dict[str, type], argv: list[str], description: str,
                presets: dict[str, dict] | None = None,
                former: Callable[[argparse.Namespace], Path | None] | None = None) -> Settings:
    """Parses argv into an instance of each dataclass.

    Every flag can be written with `-` or `_`. With presets, there are also --preset and --config,
    and a default preset (see `_Parser.base`). former is called with the parsed flags and may return
    a JSON file, as of a run that is resumed, whose settings replace that default. Prints one line
    and exits with status 2 on a flag that does not exist or cannot be parsed; raises ValueError on
    a value out of range, or on a flag that has no effect.
    """
    parser = _Parser(classes, description, presets)
    words = parser.words(argv)
    read = parser.read(words, parser.base(words))
    if former and (path := former(read)):
        read = parser.read(words, read_settings(path, parser.settings))
    made = Settings({key: cls(**{f.name: getattr(read, f.name) for f in fields(cls)})
                     for key, cls in classes.items()})
    made.given, made.typed = read.given, read.typed
    for config in made.values():
        for f in fields(config):
            wanted, holds = f.metadata.get("needs", ("", None))
            if f.name in read.typed and holds and not holds(config):
                raise ValueError(f"--{f.name} has no effect without {wanted}: add it, or leave out "
                                 f"--{f.name}")
    return made


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line on stderr and exits with status 2."""

    def __init__(self, classes: dict[str, type], description: str, presets: dict | None):
        self.settings = {f.name: f for cls in classes.values() for f in _own_first(cls)}
        self.presets = presets or {}
        super().__init__(description=description.split("\n\n")[0], allow_abbrev=False,
                         add_help=False, formatter_class=_Help,
                         argument_default=argparse.SUPPRESS)
        general = self.add_argument_group("general")
        general.add_argument("-h", "--help", action=_ShowHelp, nargs=0,
                             help="show this help" + ("; with --preset, the defaults are the "
                                                      "preset's" if presets else ""))
        if presets:
            general.add_argument("--preset", action=_Preset, nargs="?", const="", metavar="NAME",
                                 help=f"a set of settings: {', '.join(presets)}")
            general.add_argument("--config", action=_Config, nargs="?", const="", metavar="FILE",
                                 help="settings from a JSON file, such as the config.json that a "
                                      "run saves with its checkpoints")
        for heading, settings in _sections(self.settings.values()).items():
            group = self.add_argument_group(heading)
            for f in settings:
                _add(group, f)
        positional = " ".join(f.name.upper() if how == "required" else f"[{f.name.upper()}]"
                              for f in self.settings.values()
                              if (how := f.metadata.get("positional")))
        self.usage = f"%(prog)s [--flag VALUE ...] {positional}".rstrip()

    def error(self, message: str) -> NoReturn:
        print_error(f"{self.prog}: {message} (--help lists the flags)")
        sys.exit(2)

    def words(self, argv: list[str]) -> list[str]:
        """argv with the names of its flags as they are declared, and --help at its end."""
        found, rest = [], list(argv)
        while rest:
            word = _underscored(rest.pop(0))
            name = word.removeprefix("--")
            f = self.settings.get(name) if word.startswith("--") else None
            if f and kind_of(f)[0] is bool and not (rest and rest[0].lower() in TRUTHS):
                word += "=true"  # the next word does not belong to this flag
            found.append(word)
        return sorted(found, key=lambda word: word in ("-h", "--help"))

    def base(self, words: list[str]) -> dict:
        """The preset that applies if argv names none: the first, or with --init_from the first that
        sets it."""
        names = {word.partition("=")[0] for word in words}
        if not self.presets or "--preset" in names:
            return {}
        return next(preset for preset in self.presets.values()
                    if "--init_from" not in names or "init_from" in preset)

    def read(self, words: list[str], base: dict) -> argparse.Namespace:
        """The value of every setting, and the names of those that are given and typed."""
        values = {f.name: f.default for f in self.settings.values()} | base
        start = argparse.Namespace(**values, given=set(), typed=set())
        found, extra = self.parse_known_intermixed_args(words, start)
        unknown = [word for word in extra if word.startswith("-") and word != "-"]
        if unknown:
            self.error(self._unknown(unknown[0].partition("=")[0]))
        if extra:
            self.error(f"{extra[0]!r} belongs to no flag: put text with spaces in quotes")
        return found

    def _unknown(self, flag: str) -> str:
        for hint in HINTS.get(flag.lstrip("-").lower(), ()):
            if set(re.findall(r"--(\w+)", hint)) <= self.settings.keys():
                return f"there is no flag {flag}: {hint}"
        known = [f.name for f in self.settings.values() if f.metadata.get("positional")
                 != "required"] + ["help"] + (["preset", "config"] if self.presets else [])
        return f"there is no flag {flag}{did_you_mean(flag.lstrip('-'), known, '--')}"


def _own_first(cls: type) -> list[Field]:
    """The fields of a dataclass, the inherited ones last."""
    return sorted(fields(cls), key=lambda f: f.name not in cls.__annotations__)


def _sections(settings: Iterable[Field]) -> dict[str, list[Field]]:
    """The settings under each heading of --help; the machine's come last."""
    found, heading = {}, ""
    for f in settings:
        heading = f.metadata.get("section", heading)
        found.setdefault(heading, []).append(f)
    machine = found.pop("machine", [])
    return found | {"machine": machine} if machine else found


def _add(group, f: Field) -> None:
    """Adds the flags of a field to a group of the parser."""
    kind, optional = kind_of(f)
    how = f.metadata.get("positional")
    text = f.metadata["help"].replace("%", "%%")
    choices = f.metadata.get("choices")
    metavar = f"{{{','.join(choices)}}}" if choices else {
        int: "INT", float: "FLOAT"}.get(kind, "TEXT")
    options = dict(action=_Set, type=lambda word: _converted(f, word), field=f)
    if how:
        group.add_argument(f.name, **options, metavar=f.name.upper(),
                           nargs="?" if how == "optional" else None,
                           help=text if how == "required" else f"the same as --{f.name}")
    if how == "required":
        return
    if kind is bool:
        group.add_argument(f"--{f.name}", f"--no_{f.name}", **options, nargs="?", const=True,
                           help=text, metavar="")
        group.add_argument(f"--no{f.name}", **options, nargs="?", const=True,
                           help=argparse.SUPPRESS)
    else:
        group.add_argument(f"--{f.name}", **options, metavar=metavar, help=text,
                           nargs="?" if optional else None)


class _Set(argparse.Action):
    """Stores the value of a flag, and that the flag was typed."""

    def __init__(self, field: Field, **options):
        super().__init__(**options)
        self.dest, self.field = field.name, field

    def __call__(self, parser, namespace, value, option_string=None):
        name = self.dest
        if not self.option_strings and name in namespace.typed:
            parser.error(f"{name} is given twice, by position and as --{name}")
        if option_string and option_string.startswith("--no") and option_string != f"--{name}":
            value = not value
        if value == "auto" and "auto" in self.field.metadata:
            name, value = self.field.metadata["auto"], True
        if kind_of(self.field)[0] is tuple:
            value = (*getattr(namespace, name), value)
        setattr(namespace, name, value)
        namespace.given.add(name)
        namespace.typed.add(name)


class _Preset(argparse.Action):
    """Stores the settings of a preset."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value not in parser.presets:
            raise ValueError(f"there is no preset {value!r}: choose one of "
                             f"{', '.join(parser.presets)}{did_you_mean(value, parser.presets)}")
        _take(namespace, parser.presets[value])


class _Config(argparse.Action):
    """Stores the settings of a JSON file."""

    def __call__(self, parser, namespace, value, option_string=None):
        if not value:
            raise ValueError("--config names no file: give one with settings in JSON")
        try:
            _take(namespace, read_settings(value, parser.settings))
        except ValueError as error:
            raise ValueError(f"--config: {error}") from error


def _take(namespace: argparse.Namespace, settings: dict) -> None:
    """Stores settings, which replace those typed before."""
    vars(namespace).update(settings)
    namespace.given |= settings.keys()
    namespace.typed -= settings.keys()


class _ShowHelp(argparse.Action):
    """Prints the help with the values that the words before it have set."""

    def __call__(self, parser, namespace, value, option_string=None):
        for action in parser._actions:
            if isinstance(action, _Set):
                action.default = getattr(namespace, action.dest)
        parser.print_help()
        sys.stdout.flush()
        parser.exit()


class _Help(argparse.HelpFormatter):
    """Each flag with its kind of value or its choices, its range and its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34,
                         width=min(100, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return action.metavar
        if action.metavar == "":  # a switch: the second form where it is on
            return ", ".join(action.option_strings[:2 if action.default is True else 1])
        values = f" {action.metavar}" if action.metavar else ""
        return ", ".join(action.option_strings) + values

    def _get_help_string(self, action):
        if not isinstance(action, _Set) or not action.option_strings:
            return action.help
        notes = [range_of(action.field)]
        if (default := action.default) not in (None, argparse.SUPPRESS, (), MISSING):
            shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else (
                default if str(default).isprintable() else repr(default))
            notes.append(f"default: {str(shown).replace('%', '%%')}")
        notes = "; ".join(filter(None, notes))
        return f"{action.help} ({notes})" if notes else action.help


def _converted(f: Field, word: str):
    """The value that a word on the command line stands for."""
    kind, _ = kind_of(f)
    if kind in (str, tuple) or (word == "auto" and "auto" in f.metadata):
        return word
    try:
        return TRUTHS[word.lower()] if kind is bool else kind(word)
    except (KeyError, ValueError):
        what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise argparse.ArgumentTypeError(f"{word!r} is not {what}") from None


def _underscored(word: str) -> str:
    """A flag with underscores in place of dashes, and ALIASES resolved; other words unchanged."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = name[2:].replace("-", "_")
    return "--" + ALIASES.get(name, name) + equals + value


def read_settings(path: str | Path, known: dict[str, Field]) -> dict:
    """The settings in a JSON file. Raises ValueError with its name if it cannot be read, or has a
    setting that is unknown or of the wrong type."""
    text = read_file(path)
    try:
        settings = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for settings") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object of settings")
    settings = {ALIASES.get(name, name): value for name, value in settings.items()}
    if settings.pop("decay_lr", True) is False:  # of files older than schedule=constant
        settings["schedule"] = "constant"
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{path}: there is no setting {name!r}{did_you_mean(name, known)}")
        try:
            settings[name] = check_value(known[name], value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return settings


def read_file(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ValueError with its name if it cannot be read, or if it is a
    pipe or a device, which might never end."""
    path = Path(path)
    try:
        if not path.is_file():
            kind = ("a folder" if path.is_dir() else "a pipe or a device") if path.exists() else ""
            raise ValueError(f"{path} is {kind}: name a file" if kind else f"there is no {path}")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error


def to_json(*configs) -> str:
    """Dataclasses as one flat JSON object, which `--config` reads back."""
    merged = {k: v for config in configs for k, v in asdict(config).items()}
    return json.dumps(merged, indent=2) + "\n"
