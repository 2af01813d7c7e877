"""The commands of ``sa-hf``: doctor, summary, preview, inspect, suggest, bench, convert, card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sa_hf.config import SparseAttentionConfig, available_patterns
from sa_hf.errors import SparseAttentionError
from sa_hf.tools.load import load_model, make_config, resolve
from sa_hf.tools.suggest import Suggestion, stacks_of, tokens_to_measure
from sa_hf.tools.suggest import suggest as rank_patterns

app = typer.Typer(
    help="Sparse attention for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
console = Console()
SHOWN_DENSITY = 0.4  # below it a preview has light and dark
PREVIEW_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # beyond, a picture of 62 columns loses thin lines

Model = Annotated[str, typer.Argument(help="hub name, folder, or 'minilm' (the embedded model)")]
Pattern = Annotated[str, typer.Argument(help="pattern name, e.g. bigbird")]
Options = Annotated[list[str] | None, typer.Option("--set", "-s", help="field=value of the config, repeatable")]
Preset = Annotated[str | None, typer.Option(help="a named preset of the pattern")]
Causal = Annotated[bool, typer.Option("--causal/--bidirectional", help="intersect with j <= i")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run the code that a checkpoint carries")]


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    drawn = Table(title=title, title_justify="left")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)


@app.command()
def doctor() -> None:
    """Check this machine: versions, devices, engines, parity with the oracle. Exit 1 where something is wrong."""
    from sa_hf.tools.doctor import examine

    findings = examine()
    marks = {None: "", True: "ok", False: "WRONG"}
    table("sa-hf doctor", ["what", "found", "", "advice"], [[f.what, f.found, marks[f.ok], f.advice] for f in findings])
    if any(f.ok is False for f in findings):
        raise typer.Exit(1)


@app.command()
def summary(
    model: Model,
    pattern: Annotated[
        str | None, typer.Option(help="patch with this pattern first; none for a sparse checkpoint")
    ] = None,
    options: Options = None,
    length: Annotated[int | None, typer.Option(help="tokens; default: the model's limit")] = None,
    layers: Annotated[str | None, typer.Option(help='layers to patch, e.g. "0-3,6"')] = None,
    trust: Trust = False,
) -> None:
    """What runs where in a patched model: pattern, density, engine, memory, per layer."""
    from sa_hf import patch_model
    from sa_hf import summary as summarise
    from sa_hf.hf.positions import lengthening

    loaded = load_model(model, trust_remote_code=trust)
    if pattern is not None:
        longer = lengthening(loaded, length)
        patch_model(loaded, make_config(pattern, options or []), layers=layers, max_length=longer)
    typer.echo(str(summarise(loaded, length)))


@app.command()
def preview(
    pattern: Pattern,
    length: Annotated[
        int | None, typer.Option(help="tokens; default: the first power of two from 256 on that shows a pattern")
    ] = None,
    options: Options = None,
    preset: Preset = None,
    causal: Causal = False,
    heads: Annotated[int, typer.Option(help="number of heads; the first is drawn in the terminal")] = 1,
    plot: Annotated[Path | None, typer.Option(help="write a picture to this file instead")] = None,
) -> None:
    """Draw a pattern's mask in the terminal, or to an image file."""
    config = make_config(pattern, options or [], preset)
    length = shown_length(config, causal, heads) if length is None else length
    if plot is not None:
        config.plot(plot, length, causal, num_heads=heads)
        console.print(f"wrote {plot}")
    else:
        typer.echo(config.preview(length, causal, num_heads=heads))


def shown_length(config: SparseAttentionConfig, causal: bool, heads: int) -> int:
    """The first power of two at which a preview is no solid block; the smallest where none is (dense attention)."""
    for length in PREVIEW_LENGTHS:
        if config.density(length, heads, causal=causal) < SHOWN_DENSITY:
            return length
    return PREVIEW_LENGTHS[0]


@app.command("inspect")
def inspect_command(folder: Annotated[Path, typer.Argument(help="a checkpoint folder")]) -> None:
    """What a saved checkpoint holds: patterns per layer, learned state, carried code. Exit 1 on problems."""
    from sa_hf.tools.inspect import inspect_checkpoint

    found = inspect_checkpoint(folder)
    console.print(f"{found.architecture}, sa_hf version {found.version}, {len(found.code_files)} code files")
    rows = [
        [stack, index, name, ", ".join(f"{k}={v}" for k, v in fields.items() if k not in {"name", "version"})]
        for stack, index, name, fields in found.layers
    ]
    table(str(folder), ["stack", "layer", "pattern", "config"], rows)
    if found.state:
        table(
            "learned state", ["tensor", "dtype", "shape"], [[n, d, str(list(s))] for n, (d, s) in found.state.items()]
        )
    for problem in found.problems:
        console.print(f"problem: {problem}", markup=False)
    if found.problems:
        raise typer.Exit(1)


@app.command()
def suggest(
    model: Model,
    length: Annotated[int, typer.Option(help="the length you want to run at")] = 4096,
    text: Annotated[
        Path | None, typer.Option(help="a text file: measure the attention mass that each pattern keeps")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens of the text to measure on (dense attention); default: 512, or the limit")
    ] = None,
    trust: Trust = False,
) -> None:
    """Rank the patterns for a model and a length: share of the dense pairs, and of the model's attention mass.

    With --text the order is by "gain": how far the mass exceeds that of as many pairs chosen blindly (0 by chance, 1
    for all of it), at the length that was measured.
    """
    from sa_hf import unpatch_model
    from sa_hf.hf.patching import patch_of
    from sa_hf.hf.positions import position_limit

    loaded = load_model(model, trust_remote_code=trust).eval()
    if patch_of(loaded) is not None:
        unpatch_model(loaded)
    input_ids, limit = None, position_limit(loaded)
    if text is not None:
        input_ids = text_ids(model, text, tokens_to_measure(limit, tokens))
    for stack in stacks_of(loaded, input_ids):
        found = rank_patterns(num_heads=stack.num_heads, causal=stack.causal, length=length, attention=stack.attention)
        kind = f"{stack.name}, {'causal' if stack.causal else 'bidirectional'}"
        table(f"{model}, {kind}, {length} tokens", *suggestion_rows(found, length))
        trivial = dict.fromkeys(s.config.name for s in found if s.measured is not None and s.measured.gain is None)
        if trivial and input_ids is not None:
            measured = input_ids.shape[1]
            more = "the model takes no more" if measured == limit else "measure on more, by a longer text and --tokens"
            typer.echo(f"{', '.join(trivial)}: nearly all pairs of {measured} tokens are kept, so no gain; {more}")


def text_ids(model: str, text: Path, tokens: int) -> Tensor:
    """The first tokens of a text file by a model's tokenizer, int64 ``[1, n]``."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(model))
    ids: Tensor = tokenizer(text.read_text(), return_tensors="pt", truncation=True, max_length=tokens).input_ids
    if ids.shape[1] < 2:
        raise SparseAttentionError(f"{text} holds {ids.shape[1]} tokens; there must be at least 2 to measure on")
    return ids


def suggestion_rows(found: list[Suggestion], length: int) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of suggestions; each share says at which length it was taken."""
    defaults = {name: cls().to_dict() for name, cls in available_patterns().items()}
    rows, at = [], None
    for s in found:
        changed = {k: v for k, v in s.config.to_dict().items() if v != defaults[s.config.name].get(k)}
        row = [s.config.name, ", ".join(f"{k}={v}" for k, v in changed.items()), f"{s.density:.3f}"]
        if s.measured is None:
            rows.append([*row, s.purpose])
            continue
        at, gain = s.measured.length, s.measured.gain
        figures = [f"{s.measured.density:.3f}", f"{s.measured.mass:.3f}", "-" if gain is None else f"{gain:.3f}"]
        rows.append([*row, *figures])
    columns = ["pattern", "set", f"pairs of dense at {length}"]
    return columns + (["made for"] if at is None else [f"at {at}: pairs", "mass", "gain"]), rows


@app.command()
def bench(
    pattern: Pattern,
    length: Annotated[int, typer.Option(help="tokens")] = 4096,
    options: Options = None,
    preset: Preset = None,
    causal: Causal = False,
    heads: Annotated[int, typer.Option()] = 8,
    head_dim: Annotated[int, typer.Option()] = 64,
) -> None:
    """Time one pattern against dense attention on this machine, forward and forward+backward, after a parity check."""
    from sa_hf.tools.bench.quick import compare

    rows = compare(
        make_config(pattern, options or [], preset), length, causal=causal, num_heads=heads, head_dim=head_dim
    )
    table(f"{pattern}, n = {length}", ["pass", "dense ms", "sparse ms", "first call ms", "speed-up"], rows)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a Hugging Face BigBird checkpoint: hub name or folder")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
    options: Options = None,
) -> None:
    """Convert a checkpoint of Hugging Face's own BigBird to a patched model with our kernels."""
    from sa_hf.tools.convert import convert_bigbird
    from sa_hf.tools.load import parse_options

    convert_bigbird(resolve(source), target, **parse_options(options or []))
    console.print(f"wrote {target}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder; its README.md is written")],
    base_model: Annotated[str | None, typer.Option(help="the model that it was made from")] = None,
    force: Annotated[bool, typer.Option(help="replace a README.md that is there")] = False,
) -> None:
    """Write a model card for a sparse checkpoint: what it is, how to load it, patterns per layer."""
    from sa_hf.tools.card import write_card

    console.print(f"wrote {write_card(folder, base_model=base_model, force=force)}")
