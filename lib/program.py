"""What every command line here shares: its errors, its exit status, and what it may write to a terminal."""

import contextlib
import json
import math
import os
import re
import sys
import warnings
from importlib import import_module

AT_END = contextlib.ExitStack()  # what a program holds until it ends, such as the lock of its run folder
BROKEN_PIPE = 141  # what a shell reports of a program whose reader has gone


class UserError(Exception):
    """Bad input: printed as one sentence, without a traceback."""


def first_sentence(error):
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def optional(module, package):
    """An optional library, imported where it is used. Raises UserError with the pip line if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: pip install {package}.") from error


# ----------------------------------------------------------------------------------------------------- text and numbers

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """text with what a terminal would obey, control and bidirectional characters and surrogates, as \\x1b, \\u202e, ...

    Line breaks and tabs stay. Users and passwords in addresses (//user:password@host) are masked.
    """
    return OBEYED.sub(lambda c: c[0].encode("unicode_escape", "surrogatepass").decode(), without_password(text))


def without_password(text):
    """text in which what stands before the host of an address, a user and a password, is ***."""
    return re.sub(r"(\w://)[^/\s]+@", r"\1***@", text)


def finite(value):
    """value, JSON-ready, with null for each number that JSON does not have (NaN and the infinities)."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value, **how):
    return json.dumps(finite(value), allow_nan=False, **how)


# ------------------------------------------------------------------------------------------------------- memory and end

def out_of_memory(error):
    """Whether an exception says that memory, of the machine or of a GPU, has run out: torch has no one type for it."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory"))


class Output:
    """Standard output that can't end a program halfway: what can't be written is noted, and said by exit_status.

    An evaluation whose reader has gone (`| head -1`) is written all the same; a run is saved and stops. Text is made
    printable, and characters that the encoding lacks are escaped.
    """

    def __init__(self, stream):
        self.stream, self.failed = stream, None

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try("write", printable(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self):
        self._try("flush")

    def _try(self, method, *args):
        if self.failed or self.stream is None:  # closed from the start
            return
        try:
            getattr(self.stream, method)(*args)
        except OSError as error:
            self.failed = error
            with contextlib.suppress(OSError, ValueError):  # or the interpreter tries to write the rest once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def reader_gone():
    """Whether what reads standard output, such as `head -1`, has ended."""
    return isinstance(getattr(sys.stdout, "failed", None), BrokenPipeError)


def exit_status(program, argv):
    """Runs program(argv) -> 0; 2 after a UserError, one sentence on standard error; 130 after Ctrl-C; 141 if the reader
    of standard output has gone."""
    output, shown = Output(sys.stdout), warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        with contextlib.redirect_stdout(output), AT_END:
            status = run(program, argv)
            output.flush()
    finally:
        warnings.formatwarning = shown
    if isinstance(output.failed, BrokenPipeError):
        return BROKEN_PIPE
    if output.failed and status == 0:
        return refuse(f"Standard output could not be written ({output.failed.strerror}); everything else was done.")
    return status


def run(program, argv):
    try:
        program(argv)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:  # what was done is saved
        return 130
    except SystemExit as end:  # argparse's, after --help and --version
        return end.code if isinstance(end.code, int) else refuse(end.code) if end.code else 0
    except Exception as error:
        if isinstance(error, OSError):
            return refuse(f"{error.filename or type(error).__name__}: {error.strerror or first_sentence(error)}.")
        if not out_of_memory(error):
            raise
        return refuse(f"There is not enough memory ({first_sentence(error).rstrip('.')}): take a smaller model, or "
                      "lower --rollout_batch and --micro_tokens.")
    return 0


def refuse(sentence):
    with contextlib.suppress(OSError):
        print(f"error: {printable(' '.join(str(sentence).split(chr(10))))}", file=sys.stderr, flush=True)
    return 2
