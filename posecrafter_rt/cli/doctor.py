"""`posecrafter-rt doctor`: what this machine can run, what is missing, and the command that mends it.

Layer 8: arguments, one call, the printed result.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from posecrafter_rt import __version__
from posecrafter_rt.cli.checks import Finding, Status, run_checks
from posecrafter_rt.cli.output import print_heading, print_json, print_table

app = typer.Typer()

MARKS: dict[Status, Text] = {"ok": Text("ok", "green"), "absent": Text("-", "yellow"), "failed": Text("FAILED", "red")}


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """List what this machine can run and why the rest cannot; ends with 1 where the main path cannot run.

    `ok` can be used, `-` is missing and not needed, `FAILED` is missing and needed.
    """
    sections = run_checks()
    failed = [finding for findings in sections.values() for finding in findings if finding.status == "failed"]
    if as_json:
        found = {title: [asdict(finding) for finding in findings] for title, findings in sections.items()}
        print_json({"version": __version__, "usable": not failed, "sections": found})
    else:
        print_findings(sections)
        print_heading(f"{len(failed)} needed and missing: see FAILED above" if failed else "This machine is ready.")
    if failed:
        raise typer.Exit(1)


def print_findings(sections: dict[str, list[Finding]]) -> None:
    """Print each section as a table; below a finding, the command that mends it."""
    for title, findings in sections.items():
        print_heading(title)
        rows: list[tuple[str | Text, ...]] = []
        for finding in findings:
            rows.append((MARKS[finding.status], finding.name, finding.detail))
            if finding.mend is not None:
                rows.append(("", "", Text(finding.mend, "cyan")))
        print_table(rows)
        typer.echo()
