"""Skill files: what a folder of skills must hold."""

from pathlib import Path

from lib.program import UserError, describe


class Skills(dict):
    """{task type: text}; asking for another type is a UserError."""

    def __missing__(self, kind):
        raise UserError(f"The environment reports the task type {kind!r:.100}, which is not among its task_types "
                        f"({', '.join(self)}), so that no skills are known for it.")


def read_skills(folder, task_types):
    """A folder of general.md and a Markdown file per task type -> (general text, {task type: text}).

    Raises UserError if a file is missing or not UTF-8 text.
    """
    folder = Path(folder)

    def read(name):
        path = folder / f"{name}.md"
        if not path.is_file():
            raise UserError(f"The skills folder {folder} has no {path.name}: it needs general.md and a file for each "
                            f"of {', '.join(task_types)}.")
        try:
            return path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not UTF-8 text that can be read: {describe(error)}") from error

    return read("general"), {kind: read(kind) for kind in task_types}
