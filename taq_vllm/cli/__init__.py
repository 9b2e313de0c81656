"""The command `taq`: one function per step that reads arguments, calls one function and prints.

Exit codes: 0 done, 1 failed (the message says what to do), 2 bad usage. Progress goes to stderr; `--json` prints one
JSON object to stdout. Each module of this package holds the commands that it is named after.
"""

import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from taq_vllm import __version__
from taq_vllm.cli.doctor import doctor
from taq_vllm.cli.evaluate import compare, evaluate
from taq_vllm.cli.fleet import fleet_app
from taq_vllm.cli.plan import plan_app
from taq_vllm.cli.quantize import quantize, verify
from taq_vllm.cli.score import score
from taq_vllm.cli.scores import scores
from taq_vllm.cli.specialize import specialize
from taq_vllm.cli.tune import tune

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.command()(score)
app.add_typer(plan_app, name="plan")
app.command()(quantize)
app.command()(verify)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(specialize)
app.command()(tune)
app.command()(doctor)
app.add_typer(scores, name="scores")
app.add_typer(fleet_app, name="fleet")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"taq-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Task-specialised mixed-precision deployments of a large language model, served by vLLM."""


def main() -> None:
    """Entry point: errors at the doors become one message on stderr and exit code 1."""
    # Before torch is imported. With other work on the machine, threads that spin while they wait cost a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except (ValueError, OSError) as error:
        _fail(str(error))
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # commands that do not need it have not waited for it
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        _fail(
            f"the GPU's memory is full ({str(error).splitlines()[0]}): give less of it to hidden states "
            "(--hidden-memory), run smaller batches (--set max_tokens=256, --set batch_size=1), or use --device cpu"
        )


def _fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", highlight=False, markup=False, style="red")
    sys.exit(1)
