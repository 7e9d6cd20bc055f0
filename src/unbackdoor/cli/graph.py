"""``unbackdoor graph``: backdoors in graph networks, attacked, found, removed and measured."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o

graph = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Backdoors in node classification: poison a graph, find poisoned nodes, train in spite of them.",
)

EXIT_CODES = {"clean": 0, "backdoored": 1, "inconclusive": 3}

GraphPath = typer.Argument(
    help="graph.safetensors, a folder with Planetoid files (DIR or DIR/cora), or a made-up graph (cora-like)."
)


@graph.command()
def attack(
    name: str = typer.Argument(help="sba, ugba, or none for a clean twin."),
    data: str = typer.Option("cora-like", help="A preset, Planetoid files or a graph, all nodes labelled."),
    out: Path = typer.Option(..., help="Folder for the poisoned graph, the trigger, the network and a card."),
    settings: o.Settings = None,
    paper: bool = typer.Option(False, "--paper", help="Start from the settings of the attack's paper."),
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
) -> None:
    """Poison a graph, train a network on it, and measure what the trigger does.

    graph.safetensors is what a defender gets; laboratory.safetensors and trigger.safetensors are to measure.
    """
    import json

    from unbackdoor.cli import console, graphwork, show

    with console.progress_bar(hidden=as_json) as progress:
        card = graphwork.attack(name, data, out, settings or [], paper=paper, seed=seed, progress=progress)
    if as_json:
        console.print_text(json.dumps(card))
    else:
        show.card(card, out)


@graph.command()
def scan(
    graph: str = GraphPath,
    settings: o.Settings = None,
    paper: bool = typer.Option(False, "--paper", help="Start from the settings of the method's paper."),
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
    report: o.ReportPath = None,
) -> None:
    """Say whether a training graph is poisoned, towards which class, and which nodes are (RIGBD).

    Exit code: 0 no evidence of a backdoor, 1 backdoored, 3 inconclusive, 2 error.
    """
    from unbackdoor.cli import console, graphwork, show

    show.check_folder(report, Path(graph))
    with console.progress_bar(hidden=as_json) as progress:
        document = graphwork.scan(graph, settings or [], paper=paper, seed=seed, progress=progress)
    show.finish(document, as_json=as_json, report=report)
    raise typer.Exit(EXIT_CODES[document.verdict])


@graph.command()
def purify(
    graph: str = GraphPath,
    out: Path = typer.Option(..., help="New .safetensors file for the network."),
    method: str = typer.Option("rigbd", help="rigbd, or for comparison plain, drop-edge, prune."),
    hold_out: float = typer.Option(
        0.2, min=0.0, max=0.9, help="Share of the labels kept back, to measure accuracy on."
    ),
    settings: o.Settings = None,
    paper: bool = typer.Option(False, "--paper", help="Start from the settings of the method's paper."),
    seed: o.Seed = 0,
    force: bool = typer.Option(False, "--force", help="Overwrite an existing output file."),
    as_json: o.AsJson = False,
    report: o.ReportPath = None,
) -> None:
    """Train a network on a suspect graph so that it does not learn the backdoor."""
    from unbackdoor.cli import console, graphwork, show

    show.check_output(out, Path(graph), force=force)
    show.check_folder(report, Path(graph), out)
    with console.progress_bar(hidden=as_json) as progress:
        document = graphwork.purify(
            graph, out, method, settings or [], paper=paper, hold_out=hold_out, seed=seed, progress=progress
        )
    show.finish(document, as_json=as_json, report=report)


@graph.command()
def evaluate(
    network: Path = typer.Argument(help="A network that `graph purify` or `graph attack` wrote."),
    infected: Path = typer.Option(..., help="Folder that `graph attack` wrote."),
    label: str = typer.Option("", help="How the report calls this network."),
    as_json: o.AsJson = False,
    report: o.ReportPath = None,
) -> None:
    """Measure clean accuracy, attack success and robust accuracy on nodes that were unseen in training."""
    from unbackdoor.cli import graphwork, show

    show.check_folder(report, network)
    show.finish(graphwork.evaluate(network, infected, label), as_json=as_json, report=report)
