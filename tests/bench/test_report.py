"""What all benchmarks share: options, and where results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report
from bench.report import new_parser, publish

BENCH = Path(report.__file__).parent
TOOLS = {
    "gpu": "runs the others",
    "kernel_fits": "answers kernel_search and kernel_tune, under another Triton",
    "kernel_search": "writes what the kernels are compiled with: kernels/configs.json",
    "timing": "what the others time with; by itself it prints what timing nothing takes",
}


def test_every_benchmark_has_both_options() -> None:
    scripts = {
        path.stem: text for path in BENCH.glob("*.py") if 'if __name__ == "__main__"' in (text := path.read_text())
    }
    assert len(scripts) > 18 and scripts.keys() >= TOOLS.keys()
    assert {name for name, text in scripts.items() if "new_parser(__doc__" not in text} == TOOLS.keys()
    assert all("publish(" in text for name, text in scripts.items() if name not in TOOLS)


@pytest.mark.parametrize(("words", "written"), [
    ([], "bench/results/a.json"), (["--quick"], None), (["--json", "b.json"], "b.json"),
    (["--quick", "--json", "b.json"], "b.json"),
])  # fmt: skip
def test_a_quick_run_writes_only_where_it_is_told(
    words: list[str],
    written: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", Path("bench/results"))
    options = new_parser(None, "less").parse_args(words)
    publish("a", {"one": 1}, "# one", options.json, options.quick, "<svg/>")
    files = {path.as_posix() for path in Path().rglob("*") if path.is_file()}
    expected = set() if written is None else {written.replace(".json", suffix) for suffix in (".json", ".md", ".svg")}
    assert files == expected and capsys.readouterr().out == "# one\n"
