"""`python -m bench peers`: this package beside other implementations of the same methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bench.inputs import WORKLOADS
from bench.paths import RESULTS
from bench.peer_rows import PeerBenchmark
from bench.peer_tables import peer_line, peer_tables
from bench.peers import SELECTORS, Peer, find_peers
from bench.planning import check_memory, head_shape, make_plan
from bench.spec import parse_lengths, parse_list, parse_selector
from bench.terminal import one_line_errors, plain, record
from flexprefill_fa.tools.loading import UsageError
from flexprefill_fa.tools.reporting import open_console
from flexprefill_fa.tools.rows import Row, require_appendable


def peers(
    package: Annotated[
        Path | None, typer.Option(help="Folder with another implementation's Python package; its code is run.")
    ] = None,
    module: Annotated[
        str | None, typer.Option(help="Comma-separated dotted names of the only modules in --package to look at.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = "4096,16384,65536",
    selectors: Annotated[
        str, typer.Option(help="Comma-separated; name or name:field=value+field=value. Peers get the same settings.")
    ] = "flexprefill,flashprefill",
    backends: Annotated[
        str | None, typer.Option(help="Default: auto and what the device has of FLASH, TRITON and CPU.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads, 32 by default.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads, 8 by default.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=16, help="128 by default.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    workload: Annotated[str, typer.Option(help=f"One of {', '.join(WORKLOADS)}.")] = WORKLOADS[0],
    layer: Annotated[int, typer.Option(min=0, help="Of the needle model, for that workload.")] = 2,
    device: Annotated[str, typer.Option(help="auto (the GPU if there is one), cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each time.")] = 20,
    seconds: Annotated[float, typer.Option(min=0, help="Fewer repeats where they would take longer.")] = 5.0,
    out: Annotated[Path, typer.Option(help="JSON lines; rows are added.")] = RESULTS / "peers.jsonl",
    as_json: Annotated[bool, typer.Option("--json", help="Print each row on stdout too, the table on stderr.")] = False,
) -> None:
    """Time the published functions of another implementation beside this package's selectors, on the same inputs.

    Finds `flex_prefill_attention` and `flash_prefill` by name in the modules under --package; tests are left out, and
    modules in a package come before loose files. Without a folder, only this package and dense attention are measured.
    Exits with 1 if an output of this package was wrong and with 2 if a peer's was, or something could not run.
    """
    console = open_console(stderr=True)
    with one_line_errors():
        if module is not None and package is None:
            raise UsageError("module needs package, the folder that holds it")
        modules = parse_list("module", module) if module is not None else []
        plan = make_plan(
            configs=[parse_selector(spec) for spec in parse_list("selectors", selectors)],
            densities=[],
            backends=backends,
            shape=head_shape(workload, layer, heads, kv_heads, head_dim),
            batch=1,
            dtype=dtype,
            workload=workload,
            layer=layer,
            device=device,
            seed=seed,
            repeats=repeats,
            seconds=seconds,
            dense=True,
        )
        wanted = parse_lengths(lengths)
        check_memory(plan, wanted)
        require_appendable(out)
    found = _look_for_peers(package, modules, [config.name for config in plan.configs], plain(console))
    benches: dict[int, PeerBenchmark] = {}  # their inputs stay in memory for the peers, who come after every length

    def ours(length: int) -> Iterator[Row]:
        bench = PeerBenchmark(plan, length, plain(console))
        yield from bench.rows()
        benches[length] = bench

    measure = partial(record, out=out, as_json=as_json, console=console, line=peer_line)
    rows, failed = measure(wanted, ours, plan.steps())
    if package is not None and found:
        theirs, broken = measure(benches, lambda length: benches[length].peer_rows(package, found), len(plan.configs))
        rows, failed = rows + theirs, failed or broken
    if rows:
        typer.echo(peer_tables(rows), err=as_json)
    if any("error" in row and row["path"] != "peer" for row in rows):
        raise typer.Exit(1)
    if failed or (package is not None and not found) or any("error" in row for row in rows):
        raise typer.Exit(2)


def _look_for_peers(
    package: Path | None, modules: Sequence[str], selectors: Sequence[str], note: Callable[[str], None]
) -> list[Peer]:
    """The peers of these selectors under a folder; says what was found, and what is missing."""
    alone = "this package and dense attention are measured alone"
    if package is None:
        note(f"no --package folder with another implementation: {alone}")
        return []
    if not package.is_dir():
        note(f"error: there is no folder {package}: {alone}")
        return []
    wanted = [function for function, selector in SELECTORS.items() if selector in selectors]
    found = [peer for peer in find_peers(package, modules) if peer.function in wanted]
    if not wanted:
        note(f"error: {' and '.join(SELECTORS.values())} alone have published functions: {alone}")
    elif not found:
        note(f"error: no module in {package} defines {' or '.join(wanted)}: {alone}")
    for peer in found:
        others = f"; also in {', '.join(str(file) for file in peer.also)}" if peer.also else ""
        note(f"{peer.function}: {peer.module} ({peer.file}){others}")
        wanted.remove(peer.function)
    if found and wanted:
        note(f"no module in {package} defines {wanted[0]}: {SELECTORS[wanted[0]]} is measured without it")
    return found
