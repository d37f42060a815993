"""Update the numbers in a text from the tables that table.py wrote. results/README.md is such a text.

    python examples/report.py                             update results/README.md from results/*/numbers.csv
    python examples/report.py --numbers runs/results --out mine.md      with your numbers where you have any

A comment behind each number, invisible on the rendered page, says which row of which table it comes from:

    0.96 ± 0.05<!--default: instruction task f1 layer 4-->

is the mean ± standard deviation over seeds in a row of default/numbers.csv. Split val, view raw and the last
step go without saying. In a Markdown table, the comment is in the first cell of a line, and a * in it stands
for the header of each column. A comment may end in `; null` for the harder null, `; beyond` for the number of
seeds in which the value beats its own null, `; all` for the mean and these two, or `; seeds` for the value of
each seed.
"""
import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import BadInput, Flags, command_line, spread, write

from table import ABOUT

NUMBER = r"(?:(?:-?[\d./]+|-)(?:, [\d.-]+)*(?: ± [\d.]+)?(?: \([^()]*\))?|\?)"
COMMENT = r"<!--([\w*-]+): ([^;]+?)(?:; (\w+))?-->"


def read_table(path):
    """Row name -> row of a table. Names say what a row is about, less `val`, `raw` and the last step."""
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = max(int(row["step"] or 0) for row in rows)
    named = {}
    for row in rows:
        words = []
        for key in ABOUT:
            if row[key] not in ("", "raw", "val") and (key, row[key]) != ("step", str(last)):
                words.append(f"{key} {row[key]}" if row[key].isdigit() else row[key])
        named[" ".join(words)] = row
    return named


def show(row, stat):
    """A row as text: mean ± standard deviation over seeds (left out if 0.00), or what `stat` asks for."""
    values = [float(row[key]) if row[key] else None for key in row if key.startswith("seed ")]
    digits = 2 if None in values or max(values) <= 2 else 0             # shares, or counts
    mean = spread(values, digits).removesuffix(" ± 0.00")
    null = row["regrouped_95"] or row["null_95"]
    null = f"{float(null):.2f}" if null else "-"
    beyond = f"{row['beyond']}/{sum(value is not None for value in values)}"
    each = ", ".join("-" if value is None else f"{value:.3g}" for value in values)
    shown = {None: mean, "null": null, "beyond": beyond, "all": f"{mean} ({null}; {beyond})", "seeds": each}
    if stat not in shown:
        raise BadInput(f"'; {stat}' is in a comment, it must be one of {', '.join(filter(None, shown))}")
    return shown[stat]


def fill(text, *folders):
    """Return the text with its numbers taken from FOLDER/*/numbers.csv.

    If several folders have a study, the last one counts. Raises BadInput for a number that no table has.
    """
    tables = {}
    for folder in folders:
        for path in Path(folder).glob("*/numbers.csv"):
            tables[path.parent.name] = read_table(path)

    def look_up(study, name, stat, header=""):
        study, name = study.replace("*", header), name.replace("*", header)
        if name not in tables.get(study, {}):
            raise BadInput(f"{study}/numbers.csv has no row {name!r}")
        return show(tables[study][name], stat)

    lines = []
    header = None
    for line in text.split("\n"):
        cells = line.split("|")
        if not line.startswith("|"):
            header = None
        elif header is None:                        # the first line of a table
            header = [cell.strip(" `") for cell in cells]
        of_all = re.search(COMMENT, cells[1]) if header else None
        if of_all:
            for i in range(2, len(cells) - 1):
                if cells[i] != " – ":               # a dash: no such number
                    cells[i] = f" {look_up(*of_all.groups(), header[i])} "
            line = "|".join(cells)
        else:
            line = re.sub(f"{NUMBER}({COMMENT})", lambda m: look_up(*m.groups()[1:]) + m[1], line)
        lines.append(line)
    return "\n".join(lines)


def main():
    """Update the numbers in a text, as the comments behind them say."""
    flags = Flags(description=main.__doc__)
    flags.add_argument("text", nargs="?", default="results/README.md",
                       help="text to update (default: results/README.md)")
    flags.add_argument("--numbers", help="folder with STUDY/numbers.csv that takes precedence")
    flags.add_argument("--out", help="output file (default: overwrite the text)")
    given = flags.parse_args()
    text = Path(given.text)
    folders = [text.parent]
    if given.numbers:
        folders.append(given.numbers)
    if not [*Path(folders[-1]).glob("*/numbers.csv")]:
        raise BadInput(f"{folders[-1]}: no STUDY/numbers.csv in it, make results writes them")
    write(given.out or text, fill(text.read_text(encoding="utf-8"), *folders))
    print(f"{given.out or text} now has its numbers from {' and '.join(map(str, folders))}")


if __name__ == "__main__":
    command_line(main)
