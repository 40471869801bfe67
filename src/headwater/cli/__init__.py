"""The command `headwater`: words to calls, and errors to one sentence. What the commands do stands elsewhere.

Each command imports what it needs when it runs, so that `--help` and the small ones answer at once.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence

import typer

from headwater.cli import database, run, watch
from headwater.cli.shared import debugging, fail
from headwater.errors import HeadwaterError, SettingsError

app = typer.Typer(
    name="headwater",
    help="Runs long AI work in the background and streams it to people without losing a word.\n\n"
    "`headwater up` starts everything on this machine. The settings come from the environment and from `.env` in the "
    "current folder.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
run.register(app)
app.add_typer(database.db, name="db")
app.add_typer(database.journal, name="journal")
app.add_typer(watch.monitor, name="monitor")
watch.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or these arguments. Exit code 2 for what the caller must mend, 1 for what failed."""
    try:
        app(arguments)
    except HeadwaterError as error:
        if debugging():
            traceback.print_exc()
        fail(str(error), 2 if isinstance(error, SettingsError) else 1)
    except Exception as error:
        if debugging():
            raise
        logging.getLogger(__name__).debug("unexpected", exc_info=True)
        what = str(error).splitlines()[0] if str(error) else "no message"
        fail(f"headwater failed in a way it does not know: {type(error).__name__}: {what}. DEBUG=1 shows where.", 1)
    except KeyboardInterrupt:
        sys.exit(130)
