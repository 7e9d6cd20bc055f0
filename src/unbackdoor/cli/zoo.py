"""``unbackdoor zoo``: list the infected and clean models that come with the project, and check them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from unbackdoor.cli import options as o

if TYPE_CHECKING:
    from unbackdoor.bench.zoo import Entry

zoo = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show and verify a folder of trained models, such as the zoo/ of this project.",
)

Root = typer.Option(Path("zoo"), "--zoo", help="Folder of the zoo.")


@zoo.command("list")
def list_models(root: Path = Root, as_json: o.AsJson = False) -> None:
    """List the models: attack, rate, target, and what their cards claim."""
    import json

    from rich.markup import escape
    from rich.table import Table

    from unbackdoor.bench.zoo import entries
    from unbackdoor.catalogue import dashed
    from unbackdoor.cli import console

    found = entries(root)
    if as_json:
        console.print_text(json.dumps([{"name": e.name, **e.card} for e in found]))
        return
    table = Table(
        "model", "attack", "poisoned", "target", "CA", "ASR", "RA", "floor", "valid", box=None, pad_edge=False
    )
    for entry in found:
        rule = entry.card.get("label_rule", {})
        rates = ("clean_accuracy", "attack_success", "robust_accuracy", "natural_floor")
        values = [entry.rate(name) for name in rates]
        table.add_row(
            escape(entry.name),
            escape(dashed(entry.card.get("attack") or "-")),
            str(entry.card.get("poisoned", "-")),
            str(rule.get("target_class", rule.get("rule", "-"))),
            *("-" if value is None else f"{100 * value:.1f}" for value in values),
            {True: "yes", False: "no"}.get(entry.card.get("validity", {}).get("valid"), "-"),
        )
    console.print_table(table, whole=True)


@zoo.command()
def show(
    name: str = typer.Argument(help="A model of the zoo."), root: Path = Root, as_json: o.AsJson = False
) -> None:
    """Show what the card of a model claims, and how to train it again."""
    import json

    from unbackdoor.bench.zoo import entry_named, twin_folder
    from unbackdoor.catalogue import dashed
    from unbackdoor.cli import console
    from unbackdoor.cli import show as shown

    entry = entry_named(root, name)
    if as_json:
        console.print_text(json.dumps(entry.card))
        return
    out = console.results
    out.print(
        f"{entry.name}: {dashed(entry.card.get('attack') or 'a clean model')}", style="bold", markup=False
    )
    shown.claims(entry.card)
    shown.doubts(entry.card)
    out.print(f"files: {', '.join(sorted(path.name for path in entry.folder.iterdir()))}", markup=False)
    out.print(f"sha256 of the model: {entry.card.get('sha256')}", markup=False)
    out.print(f"seed {entry.card.get('seed')}; train it again with", markup=False)
    out.print(f"  {_again(entry, twin_folder(entry, root))}", markup=False, soft_wrap=True)


@zoo.command()
def verify(
    names: list[str] = typer.Argument(None, help="Models to check; all if none is named."),
    data: str = typer.Option(..., help="The data set whose test split the cards speak of."),
    split: o.Split = "test",
    root: Path = Root,
) -> None:
    """Check that files are those of the cards, and measure again what the cards claim.

    The exit code is 1 if a model is broken.
    """
    from unbackdoor.bench import zoo as models
    from unbackdoor.cli import console
    from unbackdoor.cli.inputs import DataOptions, read_data

    models.entries(root)  # before the data, which take a while to read
    test = read_data(DataOptions(data, split))

    def report(name: str, problems: list[str]) -> None:
        console.results.print(f"{name}: {'; '.join(problems) or 'as claimed'}", markup=False, soft_wrap=True)

    broken = models.verify(root, names or [], test, report=report)
    if broken:
        claim = (
            "model is not what its card claims" if broken == 1 else "models are not what their cards claim"
        )
        console.warn(f"{broken} {claim}.")
        raise typer.Exit(1)


def _again(entry: Entry, twin: Path | None) -> str:
    """Return the card's command, with a data set and a folder that the reader has to name."""
    try:
        words = shlex.split(str(entry.card.get("command", "")))
    except ValueError:  # cards may come from strangers
        return "- (the card's command cannot be read)"
    values = {"--data": "DATA", "--out": f"runs/{entry.name}"} | ({"--twin": str(twin)} if twin else {})
    for option, value in values.items():
        if option in words[:-1]:
            words[words.index(option) + 1] = value
        elif option == "--twin":
            words += [option, value]
    return shlex.join(words)
