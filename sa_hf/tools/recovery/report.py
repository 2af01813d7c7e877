"""The card of the grid, and its pictures, from the rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sa_hf.tools.recovery import grid
from sa_hf.tools.recovery.grid import (
    DENSE,
    ENOUGH,
    FROZEN_AFTER,
    MAX_DENSITY,
    NOT_SERVED,
    ONE_LAYER_DENSE,
    PARTS,
    PATTERNS,
    SEEDS,
    STEPS,
    UNTRAINED,
    Part,
)
from sa_hf.tools.recovery.intervals import COVERAGE, RESAMPLES, Interval
from sa_hf.tools.recovery.pictures import draw_curves, draw_heat_maps, draw_untrained
from sa_hf.tools.recovery.pooled import JUDGED, NO, Entry, pooled
from sa_hf.tools.recovery.rows import Rows

NAME = "recovery"
TAUGHT = "distill"  # the method of the README's table
_JUDGED = "; ".join(f"{part}: {', '.join(names)}" for part, names in JUDGED.items())
_SEARCHED = ", ".join(f"*{pattern}* after {steps} steps" for pattern, steps in FROZEN_AFTER.items())
INTRODUCTION = f"""# What a pattern loses, and after how many steps it is back

A trained dense model gets a pattern, at {MAX_DENSITY:.0%} of dense attention's pairs or less, and is trained on.
`python scripts/recovery.py --part decoder` (or `encoder`) runs the grid, cell by cell, and goes on where it was
stopped; [recovery.jsonl](results/recovery.jsonl) has a line for every cell, with versions, machine, date and settings.

- *Decoder*: a small Llama that the script itself trains dense on the standard library's source (`--base`; the weights
  that the figures are of lie in [recovery_base](recovery_base)), with lines `marker name key` in it of which each comes
  twice. Figures: bits per byte of held-out files; *passkey* (one line in the text, its key is asked for at the end) and
  *multi-needle* (eight lines, one is asked for), by length and depth.
- *Encoder*: the pretrained MiniLM, lengthened from 512 to 768 tokens. Documents are sections of held-out files of
  768 tokens from which a passage of 64 was cut out at a random depth; *recall@10*: how often the passage finds its
  document among the 500. *Agreement*: cosine similarity of a document's embedding to the dense lengthened model's.
- *Methods*: all weights trained on (plain), by the model's own dense attention as the teacher beside the task's loss
  (distill: `SparseTrainer(distill=...)`, the decoder's logits, the encoder's attention outputs), and LoRA of both.
- Learned masks are searched for, which runs dense, and then fixed (`freeze_masks`): {_SEARCHED}.
- Files to train on, to choose settings on and to report on are three splits without a common file; the settings of the
  methods are set by hand so far, none was chosen on figures. Intervals: {COVERAGE:.0%}, by
  {RESAMPLES:,} bootstrap samples of the items (prompts, chunks, documents), seeds averaged first.
- *Kept* is the figure over the untrained dense model's on the same items (bits per byte: dense over sparse);
  in brackets, over the dense model's after the same training. *98 %*: all judged figures
  ({_JUDGED}) are kept to 98 %, with the lower end of the interval ("yes"), in the mean alone, or not.
"""


def write(rows: Rows, cards: Path) -> None:
    """Write ``recovery.md`` and the pictures beside the rows."""
    cards.mkdir(parents=True, exist_ok=True)
    (cards / f"{NAME}.md").write_text(markdown(rows), "utf-8")
    for part in PARTS:
        entries = pooled(rows, part)
        folder, kinds = rows.path.parent, _drawn(entries)
        if "untrained" in kinds:
            draw_untrained(entries, folder / f"{NAME}_{part}_untrained.png")
        if "trained" in kinds:
            draw_curves(entries, folder / f"{NAME}_{part}.png")
        if kinds and part == "decoder":
            draw_heat_maps(entries, folder / f"{NAME}_needles.png")


def _drawn(entries: Sequence[Entry]) -> set[str]:
    """Of which rows there are besides the dense model's own."""
    return {"untrained" if entry.method == UNTRAINED else "trained" for entry in entries if entry.pattern != DENSE}


def markdown(rows: Rows) -> str:
    """The card."""
    blocks = [INTRODUCTION]
    for part in PARTS:
        blocks.append(f"## {part.capitalize()}\n")
        entries = pooled(rows, part)
        if not entries:
            blocks.append("Not measured yet.\n")
            continue
        blocks += [_measured(rows, entries, part), _summary(entries, part), _details(entries)]
    return "\n".join(blocks)


def _measured(rows: Rows, entries: Sequence[Entry], part: Part) -> str:
    """How much of the grid there is, and where it was measured."""
    of_part = [row for row in rows if row["part"] == part and row["split"] == "report"]
    several = len(PATTERNS[part])
    later = (len(grid.METHODS[part]) * several - 2) * len(SEEDS)
    whole = several + later * (len(STEPS) - 1)
    machines = Counter(
        f"{row['machine']['device']}, torch {row['machine']['torch']}, transformers {row['machine']['transformers']}, "
        f"{row['machine']['date']}"
        for row in of_part
    )
    seeds = sorted({seed for entry in entries if entry.step for seed in entry.seeds})
    trained = f"seeds of training: {seeds}" if seeds else "none after training yet"
    counts = ", ".join(f"{n} {name}" for name, n in of_part[0]["n"].items())
    kinds, pictures = _drawn(entries), []
    if "untrained" in kinds:
        pictures.append(f"![Kept before training](results/{NAME}_{part}_untrained.png)\n")
    if "trained" in kinds:
        pictures.append(f"![Kept against steps](results/{NAME}_{part}.png)\n")
    if kinds and part == "decoder":
        pictures.append(f"![Retrieval by length and depth](results/{NAME}_needles.png)\n")
    return "\n".join(
        [
            f"{len(of_part)} of the {whole} cells of the grid are measured ({trained}); items per cell: "
            f"{counts}. {'; '.join(f'{n} on {name}' for name, n in machines.items())}.\n",
            *pictures,
        ]
    )


def _summary(entries: Sequence[Entry], part: Part) -> str:
    """A row per pattern: the first step at which each method has 98 %."""
    methods = list(dict.fromkeys(e.method for e in entries if e.method != UNTRAINED))
    head = ("pattern", "density", "untrained", *methods)
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for pattern in PATTERNS[part]:
        if pattern == DENSE:
            continue
        of_pattern = [entry for entry in entries if entry.pattern == pattern]
        density = f"{of_pattern[-1].density:.1%}" if of_pattern else ""
        cells = [_first([e for e in of_pattern if e.method == method]) for method in (UNTRAINED, *methods)]
        lines.append(f"| {pattern} | {density} | {' | '.join(cells)} |")
    for pattern, why in NOT_SERVED[part].items():
        lines.append(f"| {pattern} | | not served: {why} |{' |' * len(methods)}")
    return "At which step 98 % of dense is kept:\n\n" + "\n".join(lines) + "\n"


def _first(entries: Sequence[Entry]) -> str:
    if not entries:
        return "not measured"
    for entry in sorted(entries, key=lambda e: e.step):
        if entry.reached != NO:
            over = f", but at {entry.density:.0%} density" if entry.density > MAX_DENSITY else ""
            return f"step {entry.step} ({entry.reached}){over}"
    last = max(entries, key=lambda e: e.step)
    shares = ", ".join(f"{_share(last.kept[name])} {name}" for name in JUDGED[last.part])
    return f"no; at step {last.step}: {shares}"


def _details(entries: Sequence[Entry]) -> str:
    """A row per entry, losing ones too."""
    names = list(entries[0].figures)
    judged = [name for name in names if name in entries[0].kept]
    head = ["pattern", "method", "step", "seeds", "density", *names, *(f"kept: {name}" for name in judged), "98 %"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    order = {name: at for at, name in enumerate(PATTERNS["encoder" if entries[0].part == "encoder" else "decoder"])}
    for entry in sorted(entries, key=lambda e: (order.get(e.pattern, len(order)), e.method, e.step)):
        kept = []
        for name in judged:
            beside = entry.kept_trained.get(name)
            kept.append(_interval(entry.kept[name], "{:.1%}") + (f" ({_share(beside)})" if beside else ""))
        is_reference = entry.pattern == DENSE and entry.method == UNTRAINED
        cells = [
            entry.pattern, entry.method, str(entry.step), ", ".join(map(str, entry.seeds)), f"{entry.density:.1%}",
            *(_interval(entry.figures[name], "{:.3f}") for name in names), *kept,
            "" if is_reference else entry.reached,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "All cells, seeds in one:\n\n" + "\n".join(lines) + "\n"


def headline(rows: Rows) -> str:
    """The README's table: each pattern beside one dense layer in the decoder, by steps of distillation; a row for each
    that was measured, and how many of the eight systems got there."""
    entries = [e for e in pooled(rows, "decoder") if e.pattern.endswith(ONE_LAYER_DENSE)]
    taught = [e for e in entries if e.method in (UNTRAINED, TAUGHT)]
    steps = sorted({entry.step for entry in taught})
    names = JUDGED["decoder"]
    head = ["pattern", "pairs kept", *(f"{step} steps" if step else "untrained" for step in steps)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    back: dict[str, int] = {}
    for pattern in dict.fromkeys(entry.pattern for entry in taught):
        by_step = {entry.step: entry for entry in taught if entry.pattern == pattern}
        shown = [" / ".join(_share(by_step[s].kept[name]) for name in names) if s in by_step else "" for s in steps]
        density = max(entry.density for entry in by_step.values())
        lines.append(f"| {pattern} | {density:.1%} | {' | '.join(shown)} |")
        there = [step for step, entry in by_step.items() if entry.reached != NO]
        if there and density <= MAX_DENSITY:  # of a system's several rows, the first to be there
            system = grid.system_of(pattern)
            back[system] = min(*there, back.get(system, there[0]))
    if not taught:
        return "Not measured yet."
    systems = [name for name in grid.SYSTEMS if name in back]
    seeds = sorted({seed for entry in taught if entry.step for seed in entry.seeds})
    return (
        f"Kept of the dense model's {', '.join(names)}, by steps of distillation (seeds {seeds or 'none yet'}):\n\n"
        + "\n".join(lines)
        + f"\n\n{ENOUGH:.0%} of all three, in the mean over the prompts, is kept by {len(systems)} of the eight systems"
        + (f" ({', '.join(f'{name} at {back[name]}' for name in systems)} steps)." if systems else ".")
    )


def _interval(interval: Interval, form: str) -> str:
    return f"{form.format(interval.value)} [{form.format(interval.low)}, {form.format(interval.high)}]"


def _share(interval: Interval) -> str:
    return f"{interval.value:.1%}"
