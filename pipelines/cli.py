"""The command `shotloom`: names the jobs, reads their configuration, runs them. Imports a job only when called."""

from __future__ import annotations

import difflib
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click

from infra.knobs import describe


@dataclass(frozen=True)
class Job:
    """One command: `module.function(module.config)`, described by one line."""

    name: str
    module: str
    config: str
    function: str
    summary: str
    example: str


JOBS = (
    Job(
        "demo",
        "pipelines.demo",
        "DemoConfig",
        "run_demo",
        "The whole way on this machine: videos, dataset, fine-tuned model, scenes, one report.",
        "shotloom demo videos=my_videos",
    ),
    Job(
        "prepare",
        "pipelines.prepare",
        "PrepareConfig",
        "run_prepare",
        "Turn videos into a dataset of scenes: shots, captions, latents, in WebDataset shards.",
        "shotloom prepare sources=my_videos output=runs/dataset model=toyworld/weights/wan-small",
    ),
    Job(
        "train",
        "pipelines.train",
        "TrainConfig",
        "run_train",
        "Fine-tune a model on a prepared dataset; a run that was stopped goes on where it was.",
        "shotloom train dataset=runs/dataset model=toyworld/weights/wan-small run_dir=runs/train steps=200",
    ),
    Job(
        "sample",
        "pipelines.sample",
        "SampleConfig",
        "run_sample",
        "Generate multi-shot videos from storyboards.",
        "shotloom sample model=runs/train/model storyboards=examples/storyboards",
    ),
    Job(
        "serve",
        "pipelines.serve",
        "ServeConfig",
        "run_serve",
        "Serve a model over HTTP at /v1/videos, on this machine only unless told otherwise.",
        "shotloom serve model=runs/train/model",
    ),
    Job(
        "evaluate",
        "pipelines.evaluate",
        "EvaluateConfig",
        "run_evaluate",
        "Score generated ToyWorld scenes and pairs with the judge: identity, action, text, cuts, what was given.",
        "shotloom evaluate videos=runs/sample",
    ),
)

RENDER = Job(
    "render",
    "pipelines.toyworld_render",
    "RenderConfig",
    "run_render",
    "Render ToyWorld scenes to H.264 files with their ground truth and captions.",
    "shotloom toyworld render out=runs/toyworld count=24",
)

PAIRS = Job(
    "pairs",
    "pipelines.toyworld_pairs",
    "PairsConfig",
    "run_pairs",
    "Write ToyWorld pairs: references and the shot that should come of them, to train and to sample.",
    "shotloom toyworld pairs out=runs/pairs task=v2v_style count=20",
)


class JobCommand(click.Command):
    """A command whose keys are the fields of a config dataclass, from `--config FILE` and `KEY=VALUE` arguments."""

    def __init__(self, job: Job) -> None:
        self.job = job
        super().__init__(
            job.name,
            callback=self._run,
            short_help=job.summary,
            help=job.summary,
            params=[
                click.Option(["--config", "file"], type=click.Path(path_type=Path), help="YAML file of keys."),
                click.Option(["--traceback"], is_flag=True, help="On an error, show where in the code it arose."),
                click.Argument(["overrides"], nargs=-1, metavar="[KEY=VALUE]..."),
            ],
        )

    def _load(self) -> tuple[type, Any]:
        module = importlib.import_module(self.job.module)
        return getattr(module, self.job.config), getattr(module, self.job.function)

    def _run(self, file: Path | None, traceback: bool, overrides: tuple[str, ...]) -> None:
        from infra.config import ConfigError, load_config
        from infra.ray_session import SessionError

        config_class, function = self._load()
        try:
            result = function(load_config(config_class, file, overrides))
        except ConfigError as error:
            _fail(error, 2)
        except (ValueError, OSError, SessionError) as error:  # what our errors explain; anything else is a bug
            if traceback:
                raise
            _fail(f"{error}\n(--traceback shows where in the code this arose)", 1)
        if hasattr(result, "summary"):
            click.echo(result.summary())
        sys.exit(getattr(result, "exit_code", 0))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        config_class, _ = self._load()
        with formatter.section("Keys (as KEY=VALUE, or in the --config file)"):
            formatter.write_dl(
                [(row.key, f"{row.help} [{row.type}; {_default(row.default)}]") for row in describe(config_class)]
            )
        with formatter.section("Example"):
            formatter.write_text(self.job.example)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            keys = [row.key for row in describe(self._load()[0])]
            key = error.option_name.lstrip("-").replace("-", "_")
            if close := difflib.get_close_matches(key, keys, 1):
                error.message = (
                    f"There is no option {error.option_name}; keys are written without dashes: {close[0]}=VALUE"
                )
                error.possibilities = None
            raise


def _default(words: str) -> str:
    return words if words == "required" else f"default {words}"


def _fail(error: object, code: int) -> NoReturn:
    click.echo(f"{click.get_current_context().command_path}: {error}", err=True)
    sys.exit(code)


class _InOrder(click.Group):
    """Lists its commands in the order of the work, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="shotloom", prog_name="shotloom")
def main() -> None:
    """Raw video in, a scene-level, frame-controllable video generator out.

    Start with `shotloom demo`, or `shotloom doctor` if something does not run. `shotloom COMMAND --help` lists what a
    command can be told.
    """


for _job in JOBS:
    main.add_command(JobCommand(_job))


@main.group()
def toyworld() -> None:
    """The embedded world: procedural videos with full ground truth."""


@main.command(short_help="Print a task's noise plan as a table, and draw it.")
@click.argument("method")
@click.argument("task")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the plan, too: FILE.png, .svg or .pdf.")
def plan(method: str, task: str, overrides: tuple[str, ...], plot: Path | None) -> None:
    """Print the noise plan of a METHOD's TASK: the level of every latent frame before each step.

    \b
    Keys: shots=[3,3,3]  steps=10  shift=3  givens={head: 2}  options={lag: 2}  method_params={...}
    Example: shotloom plan fvdm diagonal shots=[7] "options={lag: 2}" --plot plan.png
    """
    from infra.config import ConfigError, load_config
    from pipelines.plan import PlanConfig, run_plan

    try:
        click.echo(run_plan(method, task, load_config(PlanConfig, None, overrides), plot))
    except ConfigError as error:
        _fail(error, 2)
    except (ValueError, OSError) as error:
        _fail(error, 1)


@main.command(short_help="Check every hash and count of a dataset; exits 1 naming each fault.")
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check the dataset in FOLDER: every hash of its index, every record, and the counts of frames, latents, captions.

    Prints each fault on a line of its own and exits 1 where there is one.
    """
    from preprocess.verify import verify as check

    verdict = check(folder)
    click.echo(verdict.summary())
    sys.exit(verdict.exit_code)


@main.command(short_help="Write the dataset card of a dataset: one HTML file to look through.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The file; default FOLDER/card.html.")
@click.option("--scenes", default=60, show_default=True, help="Scenes to show at most, evenly over the dataset.")
def inspect(folder: Path, out: Path | None, scenes: int) -> None:
    """Write an HTML card of the dataset in FOLDER: contact sheets, score histograms, what filters took, failures."""
    from pipelines.dataset_card import write_card

    try:
        click.echo(write_card(folder, out or folder / "card.html", scenes))
    except (ValueError, OSError) as error:
        _fail(error, 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def doctor(as_json: bool) -> None:
    """Check this machine: versions, cores, memory, disk, GPU, Ray, codecs; for each problem, its fix."""
    from infra.doctor import report
    from pipelines.shipped import SHIPPED_WAN

    sys.exit(report(SHIPPED_WAN, as_json))


toyworld.add_command(JobCommand(RENDER))
toyworld.add_command(JobCommand(PAIRS))

if __name__ == "__main__":
    main()
