"""Tables and plots of results that are written by hand: every cell is known."""

import builtins
import xml.etree.ElementTree as ET

import pytest

from specextend.eval import plots, report
from specextend.eval.papers import LONGSPEC, MODELS, SPECEXTEND
from specextend.eval.presets import PRESETS, find
from specextend.eval.records import Difference, Header, Needle, Run, Writer


def header(**changes) -> Header:
    settings = dict(stages=[], new_tokens=11, config={"budget": 512}, preset=None, synthetic=None)
    return Header(
        **{
            **dict(
                version="0.1.0", torch="2.13.0", transformers="5.23.0", python="3.11",
                machine={"processor": "Some CPU", "cores": 2, "isa": "avx2", "gpu": None},
                commit="abc1234", command="specextend eval --x a|b", device="cpu", threads=1,
                date="2026-11-21T16:00:00Z", target="lmsys/vicuna-7b-v1.5-16k",
                drafts={"model": "double7/vicuna-68m"}, dtype="float32", seed=3,
                peak_memory="resident",
            ),
            **changes,
            "settings": {**settings, **changes.get("settings", {})},
        }
    )  # fmt: skip


def run(method="plain", length=1024, speed=10.0, tau=1.0, repeat=0, **changes) -> Run:
    ours = not method.startswith("hf")
    drafted = method not in ("hf", "plain")
    values = dict(
        length=length, prompt_tokens=length, prompt="a|b", source="joined", method=method,
        draft="model" if drafted else None, sweep=None, repeat=repeat, new_tokens=11,
        prefill_seconds=0.5, draft_prefill_seconds=0.25 if drafted and ours else None,
        decode_seconds=10 / speed, tokens_per_second=speed, mean_acceptance_length=tau,
        acceptance_rate_per_position=[0.5, 0.25] if drafted and ours else [], rounds=10,
        seconds=dict(prefill=0.5, verify=0.6, draft=0.3, accept=0.1) if ours else None,
        peak_memory_bytes=2**30, exact=True if method != "plain" else None,
        retrieved_chunks=[[0, 1, 5], [0, 4, 5]] if method == "retrieval" else None,
    )  # fmt: skip
    return Run(**{**values, **changes})


RUNS = (
    run("hf", speed=5.0),
    *(run("plain", speed=speed, repeat=i) for i, speed in enumerate((8.0, 10.0, 12.0, 14.0))),
    run("standard", speed=20.0, tau=1.5, exact=False, first_difference=Difference(4, 0.0125)),
    run("retrieval", speed=22.0, tau=2.5),
    run("retrieval", 2048, speed=33.0, tau=2.0, needle=Needle(0.5, 2.0)),
    run("retrieval", 2048, 44.0, 2.0, prompt="c", needle=Needle(1.0, 8.0)),
    run("retrieval", 1024, 30.0, 2.7, sweep={"budget": 1024}),
    run("retrieval", 1024, 21.0, 2.2, sweep={"chunk_size": 8}),
)


def written(folder, head=None, runs=RUNS):
    with Writer(folder) as out:
        for record in (head or header(), *runs):
            out.write(record)
    return folder


def cells(text: str, title: str) -> dict[str, list[str]]:
    """Rows of the table below a title, by their first cell."""
    part = text.split(f"{title}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_every_table(tmp_path):
    text = report.write(written(tmp_path)).read_text()
    assert cells(text, "# Evaluation of lmsys/vicuna-7b-v1.5-16k")["commit"] == ["abc1234"]
    assert "`specextend eval --x a\\|b`" in text and "budget=512" in text
    assert cells(text, "### Speed and acceptance") == {
        "": ["1K", "2K"],
        ":--": ["--:", "--:"],
        "Hugging Face generate": ["1.00 / 5.0 / 1.00× / 0.45×", "-"],
        "plain decoding": [
            "1.00 / 11.0 / 2.20× / 1.00×<br><sub>1.00–1.00 / 9.5–12.5</sub>", "-",
        ],
        "tree speculation": ["1.50 / 20.0 / 4.00× / 1.82×", "-"],
        "+ cross-model retrieval": [
            "2.50 / 22.0 / 4.40× / 2.00×",
            "2.00 / 38.5 / - / -<br><sub>2.00–2.00 / 35.8–41.2</sub>",
        ],
    }  # fmt: skip
    assert cells(text, "### Phases")["tree speculation"] == ["30.00 / 60.00 / 10.00 / 0.00", "-"]
    assert "Hugging Face generate" not in cells(text, "### Phases")
    assert cells(text, "### Prefill")["tree speculation"] == ["0.500 / 0.250", "-"]
    assert cells(text, "### Prefill")["Hugging Face generate"] == ["0.500 / -", "-"]
    assert cells(text, "### Peak memory")["tree speculation"] == ["1.00", "-"]
    assert cells(text, "### Exactness")["tree speculation"] == ["0 of 1", "-"]
    assert "plain decoding" not in cells(text, "### Exactness")
    differences = cells(text, "### Differences")
    assert differences["tree speculation"] == ["1K", "a\\|b", "0", "4", "0.013"]
    assert cells(text, "### Needle")["+ cross-model retrieval"] == ["-", "0.750 / 4.000"]
    assert "plain decoding" not in cells(text, "### Needle")
    sweep = cells(text, "### Options: + cross-model retrieval, joined prompts of 1K")
    assert sweep["budget"] == ["τ / tok/s", "chunk_size", "τ / tok/s"]
    assert sweep["512 *"] == ["2.50 / 22.0", "8", "2.20 / 21.0"]
    assert sweep["1024"] == ["**2.70 / 30.0**", "32 *", "**2.50 / 22.0**"]
    assert "synthetic" not in text and "Beside" not in text


def test_tables_without_anything_in_them_are_left_out(tmp_path):
    text = report.write(written(tmp_path, runs=[run("hf", peak_memory_bytes=None)])).read_text()
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert titles == ["### Speed and acceptance", "### Prefill", "### Exactness"]


# ---- synthetic acceptance ------------------------------------------------------------------------

SYNTHETIC = {"acceptance": 0.7}


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    head = header(settings={"synthetic": SYNTHETIC, "preset": "paper-table2"})
    folder = tmp_path_factory.mktemp("synthetic")
    runs = [run(m, n, 20.0, 2.0, synthetic=SYNTHETIC, exact=None)
            for m in ("plain", "retrieval") for n in (1024, 2048)]  # fmt: skip
    return written(folder, head, runs)


def test_synthetic_results_say_so_everywhere(synthetic_folder):
    file = report.write(synthetic_folder)
    assert file.name == "results-synthetic-acceptance-0.7.md"
    text = file.read_text()
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert len(titles) >= 6 and all(t.endswith("(synthetic acceptance 0.7)") for t in titles)
    assert "Exactness" not in text
    # Their shape is the paper's, they are not: random weights are nobody's model.
    assert "its figures are not printed beside these" in text and "128.59" not in text
    files = plots.write(synthetic_folder)
    assert len(files) == 4
    for file in files:
        assert "synthetic-acceptance-0.7" in file.name and file.suffix == ".svg"
        assert "synthetic acceptance 0.7" in file.read_text()


# ---- plots ---------------------------------------------------------------------------------------

TITLES = {
    "speed-and-acceptance": "Speed and acceptance",
    "phases": "Phases of a token",
    "acceptance-by-position": "Acceptance by position",
    "retrieved-chunks": "Chunks retrieved over time",
}


def test_plots_are_pictures_with_their_text(tmp_path):
    files = plots.write(written(tmp_path))
    assert [file.name for file in files] == [f"{stem}-joined.svg" for stem in TITLES]
    for file in files:
        texts = [part.text for part in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]
        stem = file.stem.removesuffix("-joined")
        assert f"{TITLES[stem]}, lmsys/vicuna-7b-v1.5-16k, joined prompts" in texts
        assert any("cross-model retrieval" in text for text in texts)


def test_results_that_have_nothing_for_a_plot_have_none_and_plots_are_reproducible(tmp_path):
    files = plots.write(written(tmp_path, runs=[run("hf")]))
    assert [file.name for file in files] == ["speed-and-acceptance-joined.svg"]
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in plots.write(tmp_path)] == before  # the same bytes again


def test_without_matplotlib_there_is_a_line_and_no_plot(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert plots.write(written(tmp_path)) == []
    line = "no plots: they need matplotlib, pip install specextend[eval]\n"
    assert capsys.readouterr().err == line


# ---- beside the papers ---------------------------------------------------------------------------


def beside(folder, **changes) -> str:
    changes.setdefault("settings", {"preset": "paper-table2"})
    text = report.write(written(folder, header(**changes))).read_text()
    return text.split("## Beside ", 1)[1]


def test_the_papers_cells_stand_beside_ours_with_its_models(tmp_path):
    text = beside(tmp_path, command="specextend eval --prompts data/govreport_1K.jsonl")
    table = cells(text, "SpecExtend, Table 2: GovReport, V-7B / V-68M")
    lengths = ["1K", "2K", "4K", "8K", "16K"]
    assert table[""] == lengths
    assert table["SpecExtend: yes (paper)"][0] == "3.80 / 128.59 / 2.28"
    assert table["SpecExtend: no (paper)"][4] == "1.59 / 16.56 / 1.38"
    # 11 tokens in 0.5 + 0.25 + 10 / 22 seconds; Hugging Face's in 0.5 + 2
    assert table["→ ours"][0] == "2.50 / 9.13 / 2.08"
    assert table["→ ours"][2:] == ["-", "-", "-"]
    assert "PG-19" not in text and "repeat acceptance lengths" in text


@pytest.mark.parametrize(
    "changes",
    [
        dict(target="the embedded target"),
        dict(drafts={"model": "someone/vicuna-68m-mine"}),
        dict(drafts={}),
    ],
)
def test_the_papers_cells_are_not_beside_other_models(tmp_path, changes):
    text = beside(tmp_path, **changes)
    assert "its figures are not printed beside these" in text
    assert "128.59" not in text and "V-7B / V-68M" in text


def test_names_are_compared_by_their_last_component_in_lower_case():
    rows = find("paper-table2").rows_for(
        header(target="/models/Vicuna-7B-v1.5-16k/", drafts={"model": "./VICUNA-68M"})
    )
    assert {(row.target, row.draft) for row in rows} == {("V-7B", "V-68M")}
    assert len(rows) == 6


def test_sweeps_and_data_sets_beside_the_papers(tmp_path):
    text = beside(tmp_path / "8", settings={"preset": "paper-table8", "config": {"budget": 512}})
    part = text.split("Table 8: GovReport at 8K", 1)[1]
    assert "| chunk (paper) | - / 31.05 / -" in text and part
    assert cells(text, "SpecExtend, Table 8: GovReport at 8K, V-7B / V-68M")["→ ours"]
    head = dict(
        target="lmsys/vicuna-7b-v1.5-16k", settings={"preset": "longspec-table1"},
        drafts={"model": "x", "longspec": "sail/longspec-vicuna-7b-v1.5-16k"},
    )  # fmt: skip
    table = cells(beside(tmp_path / "l", **head), "LongBench, V-7B / V-7B LongSpec")
    assert table[""][:2] == ["these prompts", "GovReport"]
    assert table["LongSpec (paper)"] == [
        "-", "3.57 / 102.23 / 2.23", "3.14 / 88.87 / 2.04", "3.51 / 100.55 / 1.80",
        "3.73 / 107.30 / 1.99", "3.86 / 110.76 / 2.38",
    ]  # fmt: skip
    assert table["→ ours"][0] == "1.00 / 11.00 / 1.00"  # plain, the last row of ours


def test_presets():
    with pytest.raises(ValueError, match="a preset is one of paper-table1, .*, got 'paper-table7'"):
        find("paper-table7")
    for name, preset in PRESETS.items():
        assert name.split("-")[-1] == preset.table.replace(", Table ", "table").lower()[-6:]
        assert preset.notes and preset.config_for("eagle1")
        for row in preset.rows:
            assert row.target in MODELS and (row.draft is None or row.draft in MODELS)
    # The papers' settings, and what a working cache is to a draft of a kind.
    config = find("paper-table2").config_for("model")
    assert [config[f"tree_{key}"] for key in ("nodes", "depth", "threshold")] == [50, 10, 0.7]
    assert find("paper-table2").config_for("eagle1")["budget"] == 2 * config["budget"] == 2048
    stage = find("paper-table2").stage
    assert (stage.lengths, stage.count, stage.runs) == ((1024, 2048, 4096, 8192, 16384), 20, 2)


def test_the_papers_tables_agree_with_what_they_say_of_themselves():
    """Figures that the papers state as quotients of others, against slips in our copies."""
    by = {(r.draft, r.title): r.cells[16384] for r in SPECEXTEND["5"]}
    yes, no = (by["L3.1-8B EAGLE-3", f"SpecExtend: {on}"] for on in ("yes", "no"))
    assert round(yes.tokens_per_second / no.tokens_per_second, 2) == 2.84
    assert round(yes.acceptance / no.acceptance, 2) == 2.55
    for row in LONGSPEC["1"]:  # speed-ups are over flash attention
        flash = next(
            r for r in LONGSPEC["1"] if (r.target, r.title) == (row.target, "Vanilla FA")
        ).cells
        for data, cell in row.cells.items():
            if cell.speedup is not None:
                quotient = cell.tokens_per_second / flash[data].tokens_per_second
                assert cell.speedup == pytest.approx(quotient, abs=0.011)
    first, *others = SPECEXTEND["4"]
    apart = {(31.08, 1.14), (37.11, 1.47)}  # whose quotients are 1.13 and 1.35
    for row in others:  # over the first row
        for length, cell in row.cells.items():
            if (cell.tokens_per_second, cell.speedup) not in apart:
                quotient = cell.tokens_per_second / first.cells[length].tokens_per_second
                assert cell.speedup == pytest.approx(quotient, abs=0.011)
