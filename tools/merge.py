"""A checkpoint of a run with --lora_rank -> a whole model in fp32, the adapter merged into its weights.

    python -m tools.merge runs/webshop-sdar-0/checkpoint-150 merged
"""

import sys
from pathlib import Path

from lib import folders, lora, models
from lib.program import UserError, describe, exit_status
from lib.settings import Parser


def merge(checkpoint, folder):
    """Writes the whole model, with the tokenizer, to a new folder. Raises UserError."""
    if not lora.is_adapter(checkpoint):
        raise UserError(f"{checkpoint} is not the folder of an adapter (no {lora.CONFIG} alone): there is nothing to "
                        "merge.")
    model, tokenizer = models.read_model(checkpoint)
    try:
        folders.make_folder(Path(folder), exist_ok=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if models.is_bundled(checkpoint):  # its defaults hold for the merged model, too
            (Path(folder) / "clone.json").write_text('{"bundled": true}')
    except FileExistsError as error:
        raise UserError(f"{folder} is already there: give a folder that is not.") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {describe(error)}") from error


def command(argv):
    parser = Parser("python -m tools.merge CHECKPOINT FOLDER", __doc__).add_commands()
    parser.add_argument("CHECKPOINT", help="folder of an adapter: a checkpoint of a run, or what peft has saved")
    parser.add_argument("FOLDER", help="where the whole model is written")
    options = parser.parse_args(argv)
    merge(options.CHECKPOINT, options.FOLDER)
    print(f"saved in {options.FOLDER}; evaluate it: python eval.py {options.FOLDER}")


def main(argv=None):
    return exit_status(command, argv)


if __name__ == "__main__":
    sys.exit(main())
