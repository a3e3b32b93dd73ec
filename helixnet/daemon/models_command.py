"""`helixnet models pull|list|info`: what is in the cache and how it gets there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from helixnet.core.model import DTYPE_BYTES
from helixnet.daemon.wording import size
from helixnet.engine.weights.catalog import DEFAULT_MODEL, list_prepared, prepare
from helixnet.engine.weights.keeping import ADAPTER_HELP, QUANTIZATIONS, QUANTIZE_HELP

if TYPE_CHECKING:
    from helixnet.engine.weights.prepared import PreparedModel


def add_models_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `models` command; its namespace has `func=run_models`."""
    parser = subparsers.add_parser("models", help="pull, list and describe models")
    parser.set_defaults(func=run_models)
    actions = parser.add_subparsers(dest="models_action", required=True, metavar="{pull,list,info}")
    actions.add_parser("list", help="what is prepared in the cache").set_defaults(func=run_models)
    for action, text in (("pull", "fetch, verify and prepare a model"), ("info", "describe a model")):
        command = actions.add_parser(action, help=text)
        command.add_argument(
            "model",
            nargs="?",
            help=f"folder with safetensors, GGUF file, hub id (owner/name) or name; default {DEFAULT_MODEL}",
        )
        command.add_argument("--dtype", choices=sorted(DTYPE_BYTES), help="what to serve it in")
        command.add_argument("--quantize", choices=QUANTIZATIONS, help=QUANTIZE_HELP)
        command.add_argument("--adapter", metavar="DIR", help=ADAPTER_HELP)
        command.set_defaults(func=run_models)


def run_models(args: argparse.Namespace) -> int:
    """Run the chosen action and return the exit code; a HelixError is left to the command line to print."""
    console = Console()
    if args.models_action == "list":
        _print_list(console)
    elif args.models_action == "pull":
        model = pull(args.model, console, dtype=args.dtype, quantize=args.quantize, adapter=args.adapter)
        console.print(f"[bold]{model.manifest.name}[/] is ready ({size(_weights_bytes(model), 'B')} as served)")
    else:
        model = prepare(args.model, dtype=args.dtype, quantize=args.quantize, adapter=args.adapter)
        _print_info(console, model)
    return 0


def pull(
    name: str | None,
    console: Console,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    adapter: str | None = None,
) -> PreparedModel:
    """Prepare a model while a progress bar shows what is fetched and hashed."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    hidden = not console.is_terminal  # a log file gets no bar, and no blank lines instead of one
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"Preparing {name or DEFAULT_MODEL}", total=None)
        return prepare(
            name,
            dtype=dtype,
            quantize=quantize,
            adapter=adapter,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _print_list(console: Console) -> None:
    models = list_prepared()
    if not models:
        console.print("No model is prepared yet; `helixnet models pull` fetches the default one.")
        return
    table = Table("name", "layers", "weights", "size", "manifest", box=box.SIMPLE_HEAD)
    for model in models:
        manifest = model.manifest
        row = (manifest.name, str(manifest.layers), _weights(model))
        table.add_row(*row, size(_weights_bytes(model), "B"), manifest.hash[:12])
    console.print(table)


def _print_info(console: Console, model: PreparedModel) -> None:
    manifest = model.manifest
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in (
        ("name", manifest.name),
        ("manifest", manifest.hash),
        ("architecture", manifest.architecture),
        ("layers", f"{manifest.layers}, {size(manifest.layer_bytes, 'B')} each"),
        ("embedding, head", f"{size(manifest.embedding_bytes, 'B')}, {size(manifest.head_bytes, 'B')}"),
        ("context", f"{manifest.context_tokens} tokens"),
        ("KV", f"{size(manifest.kv_bytes * manifest.layers, 'B')} a token in all layers"),
        ("activation", f"{size(manifest.activation_bytes, 'B')} a token and hop"),
        ("weights", _weights(model)),
        ("source", f"{manifest.source_format}, SHA-256 {manifest.weights_sha256}"),
        ("chat", "has a chat template" if model.chat.template else "base model, no chat template"),
        ("folder", str(model.folder)),
    ):
        table.add_row(key, value)
    console.print(table)


def _weights(model: PreparedModel) -> str:
    manifest = model.manifest
    return f"{manifest.quantization}, computed in {manifest.dtype}" if manifest.quantization else manifest.dtype


def _weights_bytes(model: PreparedModel) -> int:
    return model.manifest.span_bytes(0, model.manifest.layers)
