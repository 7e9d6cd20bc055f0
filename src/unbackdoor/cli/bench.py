"""``unbackdoor bench``: run a suite, here or on a cluster; started again it goes on where it was."""

from __future__ import annotations

from pathlib import Path

import typer

from unbackdoor.cli import options as o

EXIT_INCOMPLETE = 1


def bench(
    suite: str = typer.Argument(
        help="A suite of the package, or a .toml file of your own; `list` lists them."
    ),
    size: str = typer.Option("", help="Which size of the suite; its first if not given."),
    data: str = typer.Option("", help="The data set that the suite names, with splits train and test."),
    zoo: Path = typer.Option(Path("zoo"), help="Folder of trained models."),
    out: Path | None = typer.Option(None, help="Folder of the run; runs/SUITE-SIZE if not given."),
    models: Path | None = typer.Option(
        None, help="Where models are kept that have to be trained; `models` beside --out if not given."
    ),
    executor: o.Executor = "",
    jobs: o.Jobs = 1,
    address: o.Address = "",
    resource: o.Resources = None,
    device: str = typer.Option("auto", help="cpu, cuda, or auto."),
    part: list[str] = typer.Option([], help="Only this part of the suite; may be given again."),
    seeds: list[int] = typer.Option([], help="Only this draw; may be given again."),
    only: list[str] = typer.Option([], help="Only questions whose label fits a pattern, as 'badnets mnp*'."),
    train: bool = typer.Option(True, help="Train models that are missing, or leave their questions open."),
    reuse: list[Path] = typer.Option(
        [],
        help="Folder of another run: its answers to the same questions are taken over; may be given again.",
    ),
    retry_failed: bool = typer.Option(False, help="Ask again what failed before."),
    plan: bool = typer.Option(False, "--plan", help="Say what would be done, and leave."),
) -> None:
    """Measure methods on models as a suite asks; finished questions are never asked again.

    The exit code is 0 if every question has an answer, and 1 if some failed or are open.
    """
    from unbackdoor.bench.suite import Places, Plan, read_suite
    from unbackdoor.cli import benching, console

    if suite == "list":
        benching.list_suites()
        return
    chosen = read_suite(suite)
    named = size or next(iter(chosen.sizes))
    folder = out or Path("runs") / f"{chosen.name}-{named}"
    places = Places(zoo, models or folder.parent / "models")
    planned = Plan.of(chosen, named, places, data or benching.data_of(chosen), parts=part, seeds=seeds)
    if plan:
        benching.show_plan(planned, only)
        return
    wide_parts, wide_seeds = benching.asked_before(folder, chosen, named, part, seeds)
    shown = Plan.of(
        chosen, named, places, data or benching.data_of(chosen), parts=wide_parts, seeds=wide_seeds
    )
    complete = benching.carry_out(
        planned,
        folder,
        shown=shown,
        executor=executor or ("pool" if jobs > 1 else "inline"),
        jobs=jobs,
        address=address,
        resources=resource or (),
        data=data,
        device=device,
        only=only,
        reuse=reuse,
        train=train,
        retry=retry_failed,
    )
    console.note(f"tables, figures and a page: unbackdoor tables {folder}")
    if not complete:
        raise typer.Exit(EXIT_INCOMPLETE)
