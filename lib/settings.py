"""Settings as a dataclass: one declaration gives default, type, help text, bounds and command-line flag."""

import argparse
import dataclasses
import math

from lib.runs import UserError


def option(default, help, *, choices=None, at_least=None, above=None, at_most=None):
    """A setting: its default, which also determines its type, its line in --help, and which values are allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "at_least": at_least,
                                                        "above": above, "at_most": at_most})


def check_value(field, value):
    """Raises UserError unless the value is one of the field's choices and within its bounds."""
    allowed, name = field.metadata, f"--{field.name}"
    if allowed["choices"] and value not in allowed["choices"]:
        raise UserError(f"{name} {value!r} is unknown; choose from {', '.join(allowed['choices'])}.")
    bounds = [(allowed["at_least"], lambda bound: value >= bound, "at least"),
              (allowed["above"], lambda bound: value > bound, "greater than"),
              (allowed["at_most"], lambda bound: value <= bound, "at most")]
    for bound, holds, words in bounds:
        if bound is not None and (value in (math.inf, -math.inf) or not holds(bound)):  # NaN holds nowhere
            raise UserError(f"{name} ({allowed['help']}) is {value}, but must be finite and {words} {bound}.")


def check_values(settings):
    for field in dataclasses.fields(settings):
        check_value(field, getattr(settings, field.name))


def add_options(parser, kind, names=None, tables=()):
    """A flag for each field of the dataclass `kind`, or for those in `names`; a flag that is not given leaves no trace.

    tables: {title: {setting: default}}, the defaults that replace a field's own somewhere, to be shown in --help.
    """
    for field in dataclasses.fields(kind):
        if names is not None and field.name not in names:
            continue
        of_type = type(field.default) if field.default is not None else str
        shown = [] if field.default is None else [f"default {field.default}"]
        shown += [f"{title} {values[field.name]}" for title, values in dict(tables).items() if field.name in values]
        text = field.metadata["help"] + (f" ({'; '.join(shown)})" if shown else "")
        how = {"action": argparse.BooleanOptionalAction} if of_type is bool else {"type": of_type}
        if field.metadata["choices"]:
            how["metavar"] = "|".join(field.metadata["choices"])
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)
