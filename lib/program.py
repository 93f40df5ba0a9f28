"""What every command line here shares: its errors, its exit status, and what it may write to a terminal."""

import contextlib
import json
import math
import os
import re
import sys
import warnings
import zlib
from importlib import import_module

AT_END = contextlib.ExitStack()  # what a program holds until it ends, such as the lock of its run folder
BROKEN_PIPE = 141  # what a shell reports of a program whose reader has gone


class UserError(Exception):
    """Bad input: printed as one sentence, without a traceback."""


class Diverged(UserError):
    """A model with these weights and settings samples nothing more."""


def describe(error):
    """One sentence about any exception: its first line, after its type where the line may not speak for itself
    (KeyError's is only the key), or its type alone if it has no text."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    said = " ".join(lines[:2 if lines[0].endswith(":") else 1]).rstrip(".!")
    if not said:
        return f"{type(error).__name__}."
    return f"{said}." if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}."


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

    Line breaks and tabs stay. What may be secret in an address is masked, as in `without_secrets`.
    """
    return OBEYED.sub(lambda c: c[0].encode("unicode_escape", "surrogatepass").decode(), without_secrets(text))


def without_secrets(text):
    """text in which user and password of each address, and its query, which may be a key, are ***.

    >>> without_secrets("https://me:secret@host:8000/retrieve?key=5 does not answer")
    'https://***@host:8000/retrieve?*** does not answer'
    """
    def masked(address):
        return re.sub(r"\?(?!\*\*\*).+", "?***", re.sub(r"^(\w://).*@", r"\1***@", address[0]))

    return re.sub(r"\w://\S+", masked, text)


def lacks_secrets(text):
    """Whether `without_secrets` took something out of a text."""
    return "//***@" in text or "?***" in text


def finite(value):
    """value, JSON-ready, with null for each number that JSON does not have (NaN and the infinities)."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value, **how):
    return json.dumps(finite(value), allow_nan=False, **how)


def mismatch(what, value, kinds, optional=()):
    """The first key of `kinds`, {key: type}, that a dict lacks or has of another type, in words; None: all there.
    optional: keys that may be absent or None."""
    if not isinstance(value, dict):
        return f"{what} is {value!r}"[:200]
    for key, kind in kinds.items():
        if key in optional and value.get(key) is None:
            continue
        if key not in value:
            return f"{what} has no {key}"
        if not is_of_kind(value[key], kind if isinstance(kind, tuple) else (kind,)):
            return f"{key} of {what} is {value[key]!r}"[:200]


def is_of_kind(value, kinds):
    """Whether a value has one of the types; a number must be within the range of a float, and True is not one."""
    return (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            and not (isinstance(value, int | float) and not abs(value) <= sys.float_info.max))


# ---------------------------------------------------------------------------------------------------------------- files

def check_regular(path, advice="give a file of another name"):
    """Raises UserError if what is at `path` is not a regular file: reading a FIFO waits, reading /dev/zero never ends,
    and a device must not be replaced."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'a device or a FIFO'}, not a regular file: "
                        f"{advice}.")


def write_atomically(files):
    """Writes {path: text} in UTF-8, first under hidden names, which no other program uses; all are renamed once all are
    written, so that a full disk leaves what was there. Raises OSError, or UserError where there is no regular file."""
    for path in files:
        check_regular(path)
    hidden = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, text in files.items():
            hidden[path].write_text(text, encoding="utf-8")
        for path in files:
            hidden[path].replace(path)
    finally:
        for path in hidden.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def crc32(path):
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def try_lock(descriptor):
    """Whether the lock on an open file or folder is ours now, until it is closed; False if another program holds it.

    True as well where there are no locks: without fcntl (Windows), and on some network drives.
    """
    try:
        import fcntl
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


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
            return refuse(f"{error.filename}: {error.strerror}." if error.filename else describe(error))
        if not out_of_memory(error):
            raise
        return refuse(f"There is not enough memory ({describe(error).rstrip('.')}): take a smaller model, or lower the "
                      "settings that bound a batch (see --help).")
    return 0


def refuse(sentence):
    with contextlib.suppress(OSError):
        print(f"error: {printable(' '.join(str(sentence).split(chr(10))))}", file=sys.stderr, flush=True)
    return 2
