"""Settings as a dataclass: one declaration gives default, type, help text, bounds and command-line flag."""

import argparse
import dataclasses
import difflib
import math
import textwrap

from lib.program import UserError, lacks_secrets

LARGEST = {int: 2**40, float: 1e9}  # settings that fp32 and 64-bit integers hold, products of a few of them too


def option(default, help, *, group=None, choices=None, at_least=None, above=None, at_most=None, resume=False,
           words=None):
    """A setting: its default, which also determines its type, its line in --help, and which values are allowed.

    at_most: None for LARGEST of a number's type. group: title in --help from this setting on. resume: whether a run
    that goes on may change it: it bounds, reports or places the work, and the method stays the same. words: {word: the
    number that it stands for}.
    """
    return dataclasses.field(default=default, metadata={
        "help": help, "group": group, "choices": choices, "at_least": at_least, "above": above, "at_most": at_most,
        "resume": resume, "words": words or {}})


def changeable(kind):
    """Names of the settings that a resumed run may change."""
    return [field.name for field in dataclasses.fields(kind) if field.metadata["resume"]]


def set_by_hand(settings, make, recipe):
    """The settings of a dataclass that nothing else implies, {name: value}.

    recipe: names of the settings that defaults of others follow from; these are always included. make({name: value} of
    the recipe) -> the dataclass with those defaults; what differs from it was set by hand. The folder `out`, which
    belongs to one run, is left out.
    """
    chosen = {name: getattr(settings, name) for name in recipe}
    implied = vars(make(chosen))
    return chosen | {name: value for name, value in vars(settings).items() if value != implied[name] and name != "out"}


def check_value(field, value):
    """Raises UserError unless the value is one of the field's choices and within its bounds."""
    allowed, name = field.metadata, f"--{field.name}"
    if allowed["choices"] and value not in allowed["choices"]:
        raise UserError(f"{name} {value!r} is unknown; choose from {', '.join(allowed['choices'])}.")
    if isinstance(value, str) and lacks_secrets(value):
        raise UserError(f"{name} {value} lacks its password or key, which no run folder stores: give {name} again.")
    most = LARGEST.get(type(field.default)) if allowed["at_most"] is None else allowed["at_most"]
    bounds = [(allowed["at_least"], lambda bound: value >= bound, "at least"),
              (allowed["above"], lambda bound: value > bound, "greater than"),
              (most, lambda bound: value <= bound, "at most")]
    for bound, holds, words in bounds:
        if bound is not None and (value in (math.inf, -math.inf) or not holds(bound)):  # NaN holds nowhere
            raise UserError(f"{name} ({allowed['help']}) is {value}, but must be finite and {words} {bound:.15g}.")


def check_values(settings):
    for field in dataclasses.fields(settings):
        check_value(field, getattr(settings, field.name))


# --------------------------------------------------------------------------------------------------------- command line

COMMANDS = {
    "resume": ("RUN", "go on with the run in this folder from its newest checkpoint, or from the checkpoint given"),
    "config": ("FILE", "start a new run with the settings of another (RUN/config.json) and the flags given on top")}


class Parser(argparse.ArgumentParser):
    """argparse, with a UserError for what it does not understand: one line, with the closest names of a wrong flag.

    --help shows the groups in the order in which they were made, and the description last. A flag that is not given
    leaves no trace.
    """

    def __init__(self, usage, description):
        super().__init__(usage=usage, epilog=description, add_help=False, allow_abbrev=False,
                         formatter_class=HelpFormatter, argument_default=argparse.SUPPRESS)

    def add_commands(self, *names, version=None):
        """The first group, with what is not a setting: --help, those named in COMMANDS, --version -> the parser."""
        group = self.add_argument_group("commands")
        group.add_argument("-h", "--help", action="help", help="show this and exit")
        one = group.add_mutually_exclusive_group()
        for name in names:
            metavar, text = COMMANDS[name]
            one.add_argument(f"--{name}", metavar=metavar, default=None, help=text)
        if version:
            group.add_argument("--version", action="version", version=version, help="print the version and exit")
        return self

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(self.unexpected(unknown[0]))
        for name, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):
                flag = f"--{name}" if f"--{name}" in self._option_string_actions else name.upper()
                raise UserError(f"{flag} is empty: give a value, or leave it out.")
        return args

    def unexpected(self, word):
        """A sentence about an argument that nobody expects."""
        flag, known = word.split("=")[0], [name for name in self._option_string_actions if name.startswith("--")]
        if not flag.startswith("-"):
            return f"{shorten(word)!r} is not expected here: values follow a flag, as in --steps 10."
        close = difflib.get_close_matches(flag.lower().replace("-", "_").replace("__", "--", 1), known, n=3, cutoff=0.7)
        return f"{shorten(flag)} is not a flag: " + (f"the closest is {' or '.join(close)}." if close else
                                                     "--help lists them.")

    def error(self, message):
        raise UserError(message.removeprefix("argument ")[:300].rstrip(".") + ".")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog, **how):
        super().__init__(prog, max_help_position=32, **how)


def shorten(text):
    return textwrap.shorten(text, 60) if len(text) > 60 and " " in text else text[:60] + "..." * (len(text) > 60)


def number(of_type, special=()):
    """A function from a flag's text to its value; argparse puts the flag before what it complains about.

    special: {word: value} of words that may stand for a number.
    """
    words = {int: "a whole number", float: "a number"}

    def read(text):
        try:
            return special[text] if text in special else of_type(text)
        except (ValueError, OverflowError) as error:
            raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not {words[of_type]}") from error

    return read


def add_options(parser, kind, names=None, tables=()):
    """A flag for each field of the dataclass `kind`, or for those in `names`, in groups of the fields' titles.

    tables: {title: {setting: default}}, the defaults that replace a field's own somewhere, to be shown in --help.
    """
    groups, title = {group.title: group for group in parser._action_groups}, "settings"
    for field in dataclasses.fields(kind):
        title = field.metadata["group"] or title
        if names is not None and field.name not in names:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        of_type = type(field.default) if field.default is not None else str
        shown = [] if field.default is None else [f"default {field.default}"]
        shown += [f"{name} {values[field.name]}" for name, values in dict(tables).items() if field.name in values]
        text = field.metadata["help"] + (f" ({'; '.join(shown)})" if shown else "")
        how = {"action": argparse.BooleanOptionalAction} if of_type is bool else (
            {"type": str if of_type is str else number(of_type, field.metadata["words"]),
             "metavar": "|".join([of_type.__name__.upper(), *field.metadata["words"]])})
        if field.metadata["choices"]:
            how["metavar"] = "|".join(field.metadata["choices"])
        groups[title].add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)
