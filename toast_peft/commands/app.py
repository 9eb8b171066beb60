"""`toast-peft`, the command line: what an adapter is, whether it works, and where it looks."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

import toast_peft

from .loaded import load, load_base, load_classifier, report_on
from .saved import describe
from .versions import versions

Adapter = Annotated[str, typer.Argument(help="Folder of the adapter, or its id on the Hub.", show_default=False)]
BaseModel = Annotated[
    str | None, typer.Option(help="Folder or id of the base model.", show_default="the one that the adapter names")
]
Image = Annotated[Path | None, typer.Option(help="An image to run the model on.", exists=True, show_default=False)]
Text = Annotated[str | None, typer.Option(help="A text to run the model on.", show_default=False)]
_FORMATS = (".png", ".pdf", ".svg", ".html")

app = typer.Typer(
    name="toast-peft",
    help="Adapters that steer attention (TOAST), as a method of Hugging Face PEFT.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error comes from.")] = False,
) -> None:
    warnings.showwarning = lambda message, *where: typer.echo(f"Warning: {message}", err=True)
    if not debug:  # an error is printed by `main`; what libraries say in between is for programmers
        warnings.filterwarnings("ignore", module="(?!toast_peft)")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


@app.command()
def info(
    adapter: Adapter, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False
) -> None:
    """Say what an adapter is: its base model, options, sizes, and whether its weights are sane."""
    description = describe(adapter)
    typer.echo(json.dumps(description.as_dict(), indent=1) if as_json else description.as_text())
    _end_with(description.problems)


@app.command()
def check(adapter: Adapter, base_model: BaseModel = None, image: Image = None, text: Text = None) -> None:
    """Load an adapter on its base model, run it, and say whether it does anything.

    Without an image or a text it runs on random inputs.
    """
    _check_one(image, text)
    loaded = load(adapter, base_model)
    lines, problems = report_on(loaded, loaded.inputs(image, text))
    typer.echo("\n".join(lines))
    _end_with(problems)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of the official code.", exists=True)],
    base_model: Annotated[str, typer.Option(help="Folder or id of the base model, a ViT, ConvNeXt or LLaMA.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    lora_merged: Annotated[
        bool, typer.Option("--lora-merged", help="Of Lite: the low-rank product has been added to the matrices.")
    ] = False,
    num_labels: Annotated[
        int | None, typer.Option(help="Number of classes, to take the head of an image classifier over.")
    ] = None,
) -> None:
    """Make an adapter of a checkpoint of the official code."""
    base = load_base(base_model) if num_labels is None else load_classifier(base_model, num_labels)
    model = toast_peft.from_official_checkpoint(base, checkpoint, lora_merged=lora_merged)
    model.save_pretrained(str(output))
    typer.echo(f"Saved to {output}.")


@app.command()
def card(adapter: Adapter, base_model: BaseModel = None) -> None:
    """Write the model card of an adapter: how to load it, and how it was made. Other text in it is kept."""
    if not Path(adapter).is_dir():
        raise ValueError(f"{adapter!r} is no folder; download the adapter, and name the folder that it is in.")
    load(adapter, base_model).model.create_or_update_model_card(adapter)
    typer.echo(f"Wrote {Path(adapter, 'README.md')}.")


@app.command()
def explain(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Where to save the picture (.png, .pdf) or page (.html).")],
    base_model: BaseModel = None,
    image: Image = None,
    text: Text = None,
    stack: Annotated[
        str | None, typer.Option(help="Of several stacks of blocks with feedback, which.", show_default=False)
    ] = None,
) -> None:
    """Draw what an adapter selects in an image or a text, and what its feedback changes."""
    _check_one(image, text)
    if image is None and text is None:
        raise typer.BadParameter("There is nothing to explain; give --image or --text.")
    if output.suffix.lower() not in _FORMATS or not output.parent.is_dir():
        raise typer.BadParameter(
            f"--output is {str(output)!r}; expected the name of a {', '.join(_FORMATS)} in a folder that is there."
        )
    loaded = load(adapter, base_model)
    toast_peft.explain(loaded.model, loaded.inputs(image, text), loaded.processor, stack=stack).save(output)
    typer.echo(f"Saved to {output}.")


@app.command()
def env() -> None:
    """Print the versions that a report of a bug should have."""
    for name, version in versions().items():
        typer.echo(f"- {name}: {version}")


def _check_one(image: Path | None, text: str | None) -> None:
    if image is not None and text is not None:
        raise typer.BadParameter("Both --image and --text were given; expected one of them.")


def _end_with(problems: list[str]) -> None:
    for problem in problems:
        typer.echo(f"Problem: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line. It ends with 0, with 1 after an error or a failed check, with 2 if it was used wrongly."""
    try:
        app()
    except Exception as error:  # whatever it is, one sentence says more than a page of code
        if sys.argv[1:2] == ["--debug"]:
            raise
        typer.echo(f"{type(error).__name__}: {error}\n`toast-peft --debug ...` shows where it comes from.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
