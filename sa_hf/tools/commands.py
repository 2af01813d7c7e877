"""The commands of ``sa-hf``: each reads its flags, calls the module that does the work, and prints what that found."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from sa_hf.config import available_patterns, pattern_class
from sa_hf.errors import SparseAttentionError
from sa_hf.tasks.load import check_place, load_model, resolve, text_ids
from sa_hf.tools.mixture import best_mixture, check_budget, ladder, write_mixture
from sa_hf.tools.options import make_config, parse_options
from sa_hf.tools.recovered import recovered
from sa_hf.tools.suggest import candidates, left_out, stacks_of, tokens_to_measure
from sa_hf.tools.suggest import suggest as rank_patterns
from sa_hf.tools.tables import (
    Cell,
    console,
    grouped_summary,
    pattern_name,
    say,
    shown_fields,
    shown_figure,
    suggestion_rows,
    table,
)  # fmt: skip

app = typer.Typer(
    help="Sparse attention for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


def at_least_one(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} must be at least 1; nearest: 1")
    return value


Model = Annotated[str, typer.Argument(help="hub name, folder, or 'minilm' (the embedded model)")]
Pattern = Annotated[str, typer.Argument(help="pattern name, e.g. bigbird; `sa-hf patterns` lists them")]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="a field of the config, repeatable; a sequence as 1,2"),
]
Preset = Annotated[str | None, typer.Option(help="a named preset of the pattern; --set changes single fields of it")]
Causal = Annotated[bool, typer.Option("--causal/--bidirectional", help="causal: a query reads no later position")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run the code that a checkpoint carries")]
Folder = Annotated[Path, typer.Argument(help="a checkpoint folder")]


def show_version(wanted: bool) -> None:
    if wanted:
        from sa_hf import __version__

        typer.echo(f"sa_hf {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version, and exit")
    ] = False,
) -> None:
    """Sparse attention for Hugging Face Transformers."""


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
def patterns(
    name: Annotated[str | None, typer.Argument(help="a pattern: its fields and presets; default: list all")] = None,
) -> None:
    """List the patterns; of one, its fields with type, default and meaning, and its presets."""
    from sa_hf.tools.describe import fields_of, kind_of, paper_of

    if name is None:
        found = sorted(available_patterns().items())
        rows: list[list[Cell]] = [
            [pattern_name(n), kind_of(cls), ", ".join(cls.presets()) or "-", paper_of(cls)] for n, cls in found
        ]
        table("patterns", ["name", "mask", "presets", "what it is"], rows)
        say("static: the mask follows from the config; learned: from training or data. Fields: sa-hf patterns NAME")
        return
    config = pattern_class(name)
    say(paper_of(config))
    fields = [[f.name, f.type, f.default, f.meaning.replace("``", "")] for f in fields_of(config)]
    table(f"{name}: fields, for --set", ["field", "type", "default", "meaning"], fields)
    presets = [[preset, shown_fields(fields)] for preset, fields in config.presets().items()]
    if presets:
        table(f"{name}: presets, for --preset", ["preset", "fields"], presets)


@app.command()
def summary(
    model: Model,
    pattern: Annotated[
        str | None, typer.Option(help="patch with this pattern first; none for a sparse checkpoint")
    ] = None,
    options: Options = None,
    preset: Preset = None,
    length: Annotated[
        int | None, typer.Option(callback=at_least_one, help="tokens; default: the model's limit")
    ] = None,
    layers: Annotated[str | None, typer.Option(help='layers to patch, e.g. "0-3,6"')] = None,
    trust: Trust = False,
) -> None:
    """What runs where in a patched model: pattern, density, engine, memory, per layer."""
    from sa_hf import patch_model
    from sa_hf import summary as summarise
    from sa_hf.hf.state.patch import patch_of
    from sa_hf.hf.state.positions import lengthening

    # Before a model is loaded, which may take long.
    config = None if pattern is None else make_config(pattern, options or [], preset)
    if config is None and (options or preset or layers):
        raise SparseAttentionError("--set, --preset and --layers say how to patch, and need --pattern NAME beside them")
    loaded = load_model(model, trust_remote_code=trust)
    if config is not None:
        longer = lengthening(loaded, length)
        with warnings.catch_warnings():
            # No text goes through a tokenizer here.
            warnings.filterwarnings("ignore", message=".*its tokenizer keeps its own limit")
            patch_model(loaded, config, layers=layers, max_length=longer)
    elif patch_of(loaded) is None:
        raise SparseAttentionError(f"{model!r} is not patched; add --pattern NAME (`sa-hf patterns` lists them)")
    found = summarise(loaded, length)
    rows, reasons = grouped_summary(found.layers)
    columns = ["stack", "layers", "pattern", "density", "engine", "memory of each"]
    table(f"{found.model} at {found.length} tokens", columns, rows)
    for reason in reasons:
        say(reason)


@app.command()
def preview(
    pattern: Pattern,
    length: Annotated[
        int | None,
        typer.Option(
            callback=at_least_one, help="tokens; default: the first power of two from 256 on that shows a pattern"
        ),
    ] = None,
    options: Options = None,
    preset: Preset = None,
    causal: Causal = False,
    heads: Annotated[
        int, typer.Option(callback=at_least_one, help="number of heads; the first is drawn in the terminal")
    ] = 1,
    plot: Annotated[Path | None, typer.Option(help="write a picture to this file instead")] = None,
) -> None:
    """Draw a pattern's mask in the terminal, or to an image file."""
    from sa_hf.patterns.drawing import PREVIEW_COLUMNS, preview_pattern, shown_length

    config = make_config(pattern, options or [], preset)
    length = shown_length(config, causal, heads) if length is None else length
    if plot is not None:
        config.plot(plot, length, causal, num_heads=heads)
        say(f"wrote {plot}")
    else:
        columns = max(1, min(PREVIEW_COLUMNS, console.width - 2))
        typer.echo(preview_pattern(config, length, causal, heads, 0, columns))


@app.command()
def plot(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="the picture to write")] = Path("attention.png"),
    text: Annotated[Path | None, typer.Option(help="a text file: what layers that follow the text read of it")] = None,
    tokens: Annotated[int, typer.Option(callback=at_least_one, help="tokens of the text to draw, at most")] = 256,
    length: Annotated[
        int | None,
        typer.Option(callback=at_least_one, help="tokens of the layers that need no text; default: 256 to 1,024"),
    ] = None,
    heads: Annotated[int, typer.Option(callback=at_least_one, help="heads to draw of each layer")] = 1,
    trust: Trust = False,
) -> None:
    """Draw what each layer of a checkpoint reads, learned masks, spans and clusters too, and print their figures."""
    from sa_hf import figures
    from sa_hf.hf.state.positions import position_limit
    from sa_hf.tools.inspect import inspect_checkpoint
    from sa_hf.tools.plot import plot_model

    if str(folder) in available_patterns() and not folder.is_dir():
        raise SparseAttentionError(f"{folder} is a pattern, not a folder: sa-hf preview {folder} --plot {out}")
    check_place(str(folder))
    found = inspect_checkpoint(folder)
    if not found.layers:
        raise SparseAttentionError(f"{folder}: {'; '.join(found.problems) or 'no sparse layers'}")
    loaded = load_model(str(folder), trust_remote_code=trust).eval()
    input_ids = None
    if text is not None:
        input_ids = text_ids(str(folder), text, min(tokens, position_limit(loaded) or tokens))
    for row in plot_model(loaded, out, input_ids=input_ids, length=length, heads=heads):
        say(f"not drawn: {row}: what it reads depends on the text; add --text FILE")
    say(f"wrote {out}")
    rows = [
        [str(layer), name, shown_figure(value)] for layer, of in figures(loaded).items() for name, value in of.items()
    ]
    if rows:
        table("learned", ["layer", "figure", "value"], rows)


@app.command("inspect")
def inspect_command(folder: Folder) -> None:
    """What a saved checkpoint or adapter holds: patterns per layer, learned state, carried code. Exit 1 on problems."""
    from sa_hf.tools.inspect import inspect_checkpoint

    found = inspect_checkpoint(folder)
    kind = f"{found.architecture}, sa_hf version {found.version}, {len(found.code_files)} code files"
    say(kind if found.base is None else f"an adapter; its base {found.base}: {kind}")
    rows: list[list[Cell]] = [
        [stack, layers, pattern_name(name), shown_fields(fields)] for stack, layers, name, fields in found.grouped()
    ]
    if rows:
        table(str(folder), ["stack", "layers", "pattern", "config"], rows)
    if found.state:
        state = [[name, dtype, shape] for name, dtype, shape in found.grouped_state()]
        table("learned state", ["tensor", "dtype", "shape"], state)
    for problem in found.problems:
        say(f"problem: {problem}")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def suggest(
    model: Model,
    length: Annotated[int, typer.Option(callback=at_least_one, help="the length you want to run at")] = 4096,
    text: Annotated[
        Path | None, typer.Option(help="a text file: measure the attention mass that each pattern keeps")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens of the text to measure on; default: 2,048, or the model's limit")
    ] = None,
    mixture: Annotated[
        Path | None, typer.Option(help="write the best mixture by layers to this YAML file; needs --text")
    ] = None,
    budget: Annotated[float, typer.Option(help="of the mixture: mean share of the dense pairs, at most")] = 0.25,
    trust: Trust = False,
) -> None:
    """Rank the patterns for a model and a length: share of the dense pairs, and of the model's attention mass.

    With --text the order is by "gain": how far the mass exceeds that of as many pairs chosen blindly (0 by chance, 1
    for all of it), at the length that was measured, in rows drawn from it. Patterns that learn are listed with the
    pairs that they can cost. The file of --mixture is for `sa-hf finetune --config` and (its "pattern") patch_model.
    """
    from sa_hf import unpatch_model
    from sa_hf.hf.state.patch import patch_of
    from sa_hf.hf.state.positions import position_limit

    if tokens is not None and text is None:
        raise SparseAttentionError(f"--tokens {tokens} is how much of a text to measure on; add --text FILE")
    if mixture is not None and text is None:
        raise SparseAttentionError(f"--mixture {mixture} goes by the attention mass on a text; add --text FILE")
    if mixture is not None:  # before the model runs
        check_budget(budget)
        if not mixture.parent.is_dir():
            raise SparseAttentionError(f"--mixture {mixture}: there is no folder {mixture.parent}; make it first")
    loaded = load_model(model, trust_remote_code=trust).eval()
    if patch_of(loaded) is not None:
        unpatch_model(loaded)
    input_ids, limit = None, position_limit(loaded)
    if text is not None:
        input_ids = text_ids(model, text, tokens_to_measure(limit, tokens))
    wanted = None
    if mixture is not None:
        wanted = [config for causal in (True, False) for config in (*ladder(causal), *candidates(causal))]
    stacks = stacks_of(loaded, input_ids, wanted)
    for stack in stacks:
        found = rank_patterns(num_heads=stack.num_heads, causal=stack.causal, length=length, measured=stack.measured())
        kind = f"{stack.name}, {'causal' if stack.causal else 'bidirectional'}"
        table(f"{model}, {kind}, {length} tokens", *suggestion_rows(found, length))
        steps = recovered(stack.causal)
        for name in dict.fromkeys(s.config.name for s in found if s.config.name in steps):
            say(f"98 % of dense attention's quality in model_cards/recovery.md: {name}: {steps[name]}")
        for name, reason in left_out(found, num_heads=stack.num_heads, causal=stack.causal, length=length):
            say(f"not ranked: {name}: {reason}")
        trivial = dict.fromkeys(s.config.name for s in found if s.measured is not None and s.measured.gain is None)
        if trivial and input_ids is not None:
            measured = input_ids.shape[1]
            more = "the model takes no more" if measured == limit else "measure on more, by a longer text and --tokens"
            say(f"{', '.join(trivial)}: nearly all pairs of {measured} tokens are kept, so no gain; {more}")
    if mixture is not None and input_ids is not None:
        best = [best_mixture(stack, length, budget) for stack in stacks]
        measured = input_ids.shape[1]
        write_mixture(mixture, best, model=model, length=length, measured=measured, budget=budget)
        for part in best:
            say(f"{part.stack}: {part.density:.3f} of the dense pairs, {part.mass:.3f} of the attention mass")
        say(f"wrote {mixture}")


@app.command()
def bench(
    pattern: Pattern,
    length: Annotated[int, typer.Option(callback=at_least_one, help="tokens")] = 4096,
    options: Options = None,
    preset: Preset = None,
    causal: Causal = False,
    heads: Annotated[int, typer.Option(callback=at_least_one, help="query and key heads")] = 8,
    head_dim: Annotated[int, typer.Option(callback=at_least_one, help="numbers per head")] = 64,
) -> None:
    """Time one pattern against dense attention on this machine, forward and forward+backward, after a parity check."""
    from sa_hf.tools.bench.quick import compare

    config = make_config(pattern, options or [], preset)
    found = compare(config, length, causal=causal, num_heads=heads, head_dim=head_dim)
    title = f"{pattern}, {'causal' if causal else 'bidirectional'}, n = {length}"
    table(title, ["pass", "dense ms", "sparse ms", "first call ms", "speed-up"], found.rows)
    say(found.machine)
    if found.note:
        say(f"{pattern} {found.note}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a Hugging Face BigBird checkpoint: hub name or folder")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
    options: Options = None,
    preset: Preset = None,
) -> None:
    """Convert a checkpoint of Hugging Face's own BigBird to a patched model with our kernels."""
    from sa_hf.patterns.bigbird import BigBirdAttentionConfig
    from sa_hf.tools.convert import convert_bigbird

    make_config(BigBirdAttentionConfig.name, options or [], preset)  # what is wrong with them, before anything loads
    fields = {} if preset is None else BigBirdAttentionConfig.presets()[preset]
    convert_bigbird(resolve(source), target, **{**fields, **parse_options(options or [])})
    say(f"wrote {target}")


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="a checkpoint folder; its README.md is written")],
    base_model: Annotated[str | None, typer.Option(help="the model that it was made from")] = None,
    license: Annotated[str | None, typer.Option(help="its licence, by the hub's name, e.g. apache-2.0")] = None,
    dataset: Annotated[str | None, typer.Option(help="the data set that it was trained on")] = None,
    force: Annotated[bool, typer.Option(help="replace a README.md that sa_hf has not written")] = False,
) -> None:
    """Write a model card for a sparse checkpoint: what it is, how to load it, patterns per layer."""
    from sa_hf.tools.card import write_card

    written = write_card(folder, base_model=base_model, license=license, dataset=dataset, force=force)
    say(f"wrote {written}")


# Their flags are read by the modules that the scripts of a clone run, too.
PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON, add_help_option=False)
def finetune(context: typer.Context) -> None:
    """Fine-tune a model with sparse attention on long inputs, save and verify it; --help lists the flags."""
    from sa_hf.tools import finetune as module

    module.main(context.args, prog="sa-hf finetune")


@app.command(context_settings=PASSED_ON, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Evaluate a saved model on a task's held-out rows, with the same data flags as finetune; --help lists them."""
    from sa_hf.tools import evaluate as module

    module.main(context.args, prog="sa-hf evaluate")
