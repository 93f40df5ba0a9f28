"""Result files of eval.py: written, read and checked."""

import json
from pathlib import Path

from lib.episodes import episodes_beside
from lib.program import UserError, check_regular, mismatch, to_json, write_atomically

FORMAT = "sdar eval 2"  # marks result files
PARTS = {"model": str, "evaluation_set": str, "conditions": list, "sampling": dict, "config": dict, "summary": dict,
         "outcomes": dict}
SAMPLING_KINDS = {"split": str, "tasks": int, "repeats": int, "seed": int, "temperature": (int, float)}
OUTCOME = {"task_id": int, "task_type": str, "won": (bool, int), "score": (int, float), "turns": int, "invalid": int,
           "done": (bool, int)}  # of an episode


def write_result(out, result, lines):
    """Writes a result and the lines of the file of episodes beside it; where that fails, both stay as they were.
    Raises UserError."""
    try:
        write_atomically({episodes_beside(out): "".join(lines), out: to_json(result, indent=1)})
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another file with --out.") from error


def read_result(path):
    """A result file -> dict. Raises UserError if it cannot be read or this program did not write it."""
    try:
        check_regular(Path(path))
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The result file {path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file, so not a result of eval.py ({error}).") from error
    wrong = what_is_wrong(result)
    if wrong:
        raise UserError(f"{path} was not written by this version of eval.py ({wrong}).")
    return result


def what_is_wrong(result):
    """Why a JSON value is not a result, a clause, or None."""
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        return f"format {FORMAT!r}"
    checks = [("it", result, PARTS)]
    if not mismatch("it", result, PARTS):
        checks += [("sampling", result["sampling"], SAMPLING_KINDS), ("config", result["config"], {"env": str})]
        for name in result["conditions"]:
            outcomes = result["outcomes"].get(name) if isinstance(name, str) else None
            if not isinstance(outcomes, list) or not outcomes:
                return f"no outcomes of condition {name!r}"
            checks += [(f"outcome {number} of {name!r}", outcome, OUTCOME) for number, outcome in enumerate(outcomes)]
    return next((found for check in checks if (found := mismatch(*check))), None)
