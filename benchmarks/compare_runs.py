"""A table of the results of several runs: `python benchmarks/compare_runs.py runs/*`.

Runs whose settings differ only in the seed form one row: mean ± standard deviation over the seeds. The row of a single
run shows the half widths of its 95% confidence intervals (bootstrap over images). The table is printed, not saved.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import exit_on_input_error  # noqa: E402
from utils.files import read_json  # noqa: E402

METRICS = [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)] + ["rsum"]
IGNORED = {"run", "seed", "resume", "cache_path", "num_workers", "save_every_minutes"}


def read_runs(folders):
    """[(name, settings, results)] of the folders with a results.json; raises InputError for a damaged file."""
    runs = []
    for folder in map(Path, folders):
        if not (folder / "results.json").exists():
            print(f"{folder} has no results.json and is skipped", file=sys.stderr)
            continue
        runs.append((folder.name, read_json(folder / "config.json"), read_json(folder / "results.json")))
    return runs


def group_runs(runs):
    """Lists of runs with the same settings and split, apart from the seed."""
    groups = {}
    for run in runs:
        settings = sorted((name, str(value)) for name, value in run[1].items() if name not in IGNORED)
        groups.setdefault((*settings, run[2]["split"]), []).append(run)
    return list(groups.values())


def describe(group, groups):
    """The names of the runs, and the settings in which the groups differ."""
    settings = [first[1] for first, *_ in groups]
    names = [name for name in settings[0] if name not in IGNORED and len({str(s.get(name)) for s in settings}) > 1]
    text = ", ".join(name for name, *_ in group)
    return text + "".join(f"; {name} {group[0][1].get(name)}" for name in names)


def format_metric(group, metric):
    values = [results[metric] for _, _, results in group]
    if len(values) > 1:
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    half_width = group[0][2].get("ci95", {}).get(metric)
    return f"{values[0]:.1f}" + (f" ± {half_width:.1f}" if half_width is not None else "")


def format_table(runs):
    """The table as Markdown."""
    groups = group_runs(runs)
    columns = ["run", "split", "seeds", *(metric.replace("_", " ") for metric in METRICS)]
    lines = [f"| {' | '.join(columns)} |", f"|---|---|{'---:|' * (len(columns) - 2)}"]
    for group in groups:
        results = group[0][2]
        cells = [describe(group, groups), f"{results['split']}, {results['images']:,} images", str(len(group))]
        lines.append(f"| {' | '.join([*cells, *(format_metric(group, metric) for metric in METRICS)])} |")
    return "\n".join(lines)


@exit_on_input_error
def main(argv=None):
    parser = argparse.ArgumentParser(description="Compare the results of trained runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    runs = read_runs(parser.parse_args(argv).runs)
    if runs:
        print(format_table(runs))
        print("± standard deviation over seeds; for one seed the 95% confidence interval over images")


if __name__ == "__main__":
    main()
