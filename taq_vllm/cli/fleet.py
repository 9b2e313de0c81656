"""`taq fleet`: one specialised model per task, as one service."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from taq_vllm.cli.options import Json, out, print_json

if TYPE_CHECKING:
    from taq_vllm.fleet.memory import ServerMemory

fleet_app = typer.Typer(no_args_is_help=True, help=__doc__)

FleetFile = Annotated[Path, typer.Argument(metavar="fleet.yaml", help="Which checkpoint answers for which task.")]


@fleet_app.command()
def up(
    fleet_file: FleetFile,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="VLLM_API_KEY", help="Asked of every request; better given in VLLM_API_KEY."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Print what fits into memory and start nothing. Models of the hub are downloaded for it."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Start one vLLM server per task, and one OpenAI-compatible endpoint in front."""
    from taq_vllm.fleet import local, memory
    from taq_vllm.fleet.services import services
    from taq_vllm.fleet.spec import load_fleet

    fleet, device = load_fleet(fleet_file), memory.this_device()
    needs = memory.needs(fleet, device)
    if not as_json:
        _print_needs(needs)
    if not dry_run:
        if not (fleet.is_local or api_key):
            out.print(
                f"{fleet.host}: whoever reaches this port can ask the models, and register servers of his own with the "
                "router: give a key in VLLM_API_KEY",
                style="yellow",
            )
        say = (lambda text: None) if as_json else (lambda text: out.print(text, highlight=False))
        local.up(local.run_folder(fleet_file), services(fleet, needs, device), api_key, say)
    if as_json:
        print_json({name: need.__dict__ | {"tokens": need.tokens} for name, need in needs.items()})
    elif not dry_run:
        example = {"model": next(iter(fleet.tasks)), "prompt": "...", "max_tokens": 64}
        key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if api_key else ""
        out.print(
            f"ask it: curl http://{fleet.local_host}:{fleet.port}/v1/completions{key} "
            f"-H 'content-type: application/json' -d '{json.dumps(example)}'",
            highlight=False,
            soft_wrap=True,
        )


@fleet_app.command()
def status(fleet_file: FleetFile, as_json: Json = False) -> None:
    """What every process of the fleet does; exit code 1 if one does not answer."""
    from taq_vllm.fleet import local
    from taq_vllm.fleet.services import addresses
    from taq_vllm.fleet.spec import load_fleet

    processes = addresses(load_fleet(fleet_file))
    states = local.status(local.run_folder(fleet_file), processes)
    if as_json:
        print_json({"processes": [state.__dict__ for state in states]})
    else:
        table = Table()
        for column in ("process", "state", "answers", "pid", "up for", "url"):
            table.add_column(column)
        for state, address in zip(states, processes, strict=True):
            answers = "yes" if state.healthy else "no"
            table.add_row(state.name, state.state, answers, str(state.pid), f"{state.seconds:.0f} s", address.url)
        out.print(table)
    if not all(state.healthy for state in states):
        raise typer.Exit(1)


@fleet_app.command()
def down(fleet_file: FleetFile) -> None:
    """End all processes of the fleet."""
    from taq_vllm.fleet import local

    local.down(local.run_folder(fleet_file))
    out.print("the fleet is down")


@fleet_app.command()
def render(
    fleet_file: FleetFile,
    target: Annotated[str, typer.Option(help="k8s (manifests for kubectl apply) or ray (for serve deploy).")],
    image: Annotated[str | None, typer.Option(help="k8s: a container with vLLM and this project.")] = None,
    volume_claim: Annotated[str | None, typer.Option(help="k8s: PersistentVolumeClaim with the checkpoints.")] = None,
    key: Annotated[bool, typer.Option(help="k8s: ask for the key `api-key` of the Secret `taq-fleet`.")] = True,
) -> None:
    """Print the fleet for an engine that runs on many machines."""
    from taq_vllm.fleet import render as renderers
    from taq_vllm.fleet.spec import load_fleet

    fleet = load_fleet(fleet_file)
    if target == "ray":
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # vLLM's own is where the result goes
        typer.echo(renderers.ray_serve(fleet), nl=False)
    elif target == "k8s" and image:
        typer.echo(renderers.kubernetes(fleet, image, volume_claim, key), nl=False)
    elif target == "k8s":
        raise typer.BadParameter("k8s needs --image: a container with vLLM and this project")
    else:
        raise typer.BadParameter(f"got --target {target}; there are k8s and ray")


def _print_needs(needs: "dict[str, ServerMemory]") -> None:
    table = Table(title="memory")
    for column in ("task", "servers", "weights, GB", "KV cache, GB", "tokens in it", "a server, GB"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, need in needs.items():
        sizes = [f"{size / 1e9:.2f}" for size in (need.weight_bytes, need.cache_bytes, need.server_bytes)]
        table.add_row(name, str(need.servers), sizes[0], sizes[1], f"{need.tokens:,}", sizes[2])
    out.print(table)
