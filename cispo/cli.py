"""The command line: `cispo train|sft|eval|export|generate|reward|view|replay|inspect|recipes|version`.

Commands import what they need when they run, so that help is instant.
"""

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import cispo
from cispo import cli_generate
from cispo.errors import CispoError, RecipeError

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130

EXAMPLES = """\
examples:
  cispo recipes                                     what comes with the package
  cispo train code --dry-run                        every setting, where it comes from, and the plan
  cispo train code --name first learner.learning_rate=1e-4
  cispo train code --name first --resume            go on where it stopped
  cispo eval code --policy runs/first/checkpoints/step_000010/policy
  cispo export runs/first my_policy                 the newest policy, for transformers and for another run
  cispo generate bundled:tiny 'Write a function f(x) that returns x + 1.' --temperature 0
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for rewards that failed, 2 for a mistake of the user's, 130 when
    interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, extra = _parser().parse_known_args(given)
    takes_more = "words" in options or "prompts" in options
    unknown = [argument for argument in extra if argument.startswith("-") or not takes_more]
    if unknown:
        _parser().error(f"unrecognised arguments: {' '.join(unknown)}")
    command: Callable[[argparse.Namespace], int] = options.command
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        # argparse takes only the words before the first option; those after it are left over.
        if "words" in options:
            _split_words(options, [*options.words, *extra])
        elif takes_more:
            options.prompts = [*options.prompts, *extra]
        return command(options)
    except CispoError as error:
        _print_error(error)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print(f"interrupted{_resume_hint(options, given)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def train(options: argparse.Namespace) -> int:
    """Train a policy by a recipe, in a run folder."""
    from cispo.memory import refuse_what_cannot_fit
    from cispo.recipe.load import load_train
    from cispo.recipe.show import annotated_yaml, train_plan

    loaded = load_train(options.recipe, _overrides(options))
    if options.dry_run:
        print(f"{annotated_yaml(loaded)}\n\n{train_plan(loaded.recipe)}")
        refuse_what_cannot_fit(loaded.recipe)
        return 0
    from cispo.run_folder import RunFolder

    refuse_what_cannot_fit(loaded.recipe)

    path = options.run_dir or Path("runs") / loaded.recipe.name
    use = RunFolder.open_for_resume if options.resume else RunFolder.create
    folder: RunFolder = use(path, loaded.recipe)
    try:
        from cispo.loop import run_training

        print(f"run folder: {folder.path}")
        print(train_plan(loaded.recipe), flush=True)
        run_training(loaded.recipe, folder, resume=options.resume)
    except CispoError:
        if not options.resume:
            folder.discard_unused()
        raise
    finally:
        folder.close()
    return 0


def sft(options: argparse.Namespace) -> int:
    """Train a policy on prompts with their completions."""
    from cispo.recipe.load import load_sft
    from cispo.recipe.show import annotated_yaml, sft_plan

    loaded = load_sft(options.recipe, _overrides(options))
    if options.dry_run:
        print(f"{annotated_yaml(loaded)}\n\n{sft_plan(loaded.recipe)}")
        return 0
    from cispo.sft import run_sft

    run_sft(loaded.recipe, resume=options.resume)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Measure a policy on a recipe's evaluation prompts."""
    from cispo.recipe.load import load_evaluation
    from cispo.recipe.show import annotated_yaml

    overrides = list(options.overrides)
    if options.policy:
        local = Path(options.policy)
        overrides.append(f"policy.path={local.resolve() if local.exists() else options.policy}")
    loaded = load_evaluation(options.recipe, overrides)
    if options.dry_run:
        print(annotated_yaml(loaded))
        return 0
    from cispo.loop import run_evaluation

    run_evaluation(loaded.recipe)
    return 0


def export(options: argparse.Namespace) -> int:
    """Write the policy of a run's checkpoint as a folder in Hugging Face layout."""
    from cispo.export import export_policy

    checkpoint = export_policy(options.run, options.target, step=options.step, best=options.best)
    print(f"{options.target}: the policy after step {checkpoint.step} of {options.run}")
    return 0


def reward(options: argparse.Namespace) -> int:
    """Run one reward over a file of completions, and show what it says of each."""
    from rich.console import Console

    from cispo.reward_run import parse_pairs, print_results, run_reward

    results = run_reward(
        options.reward,
        options.data,
        args=parse_pairs(options.arg, "--arg"),
        columns={key: str(value) for key, value in parse_pairs(options.column, "--column").items()},
        json_columns=options.json_column,
        limit=options.limit,
        max_completion_tokens=options.max_completion_tokens,
        timeout_s=options.timeout_s,
    )
    return print_results(results, Console(highlight=False, soft_wrap=True))


def replay(options: argparse.Namespace) -> int:
    """Do an update of a run that sampled ahead again, and compare its weights."""
    from cispo.replay import replay as replay_steps

    is_same = True
    for replayed in replay_steps(options.run, options.step):
        print(replayed, flush=True)
        is_same = is_same and replayed.expected in (None, replayed.checksum)
    return 0 if is_same else 1


def view(options: argparse.Namespace) -> int:
    """Show what a step of a run sampled, group by group."""
    from rich.console import Console

    from cispo.views.rollouts import print_rollouts

    print_rollouts(options.run, options.step, options.limit, Console())
    return 0


def inspect(options: argparse.Namespace) -> int:
    """Count what a model holds and costs, from its configuration alone."""
    from rich.console import Console

    from cispo.model_report import draw_report, find_config, print_report

    config = find_config(options.model)
    print_report(options.model, config, Console(highlight=False))
    if options.plot:
        draw_report(options.model, config, options.plot)
        print(f"plot: {options.plot}")
    return 0


def recipes(options: argparse.Namespace) -> int:
    """List the packaged recipes, or print one of them."""
    from cispo.resources import find_recipe, packaged_recipes

    if options.name:
        sys.stdout.write(find_recipe(options.name).read_text(encoding="utf-8"))
        return 0
    packaged = packaged_recipes()
    width = max(len(name) for name in packaged)
    for name, path in packaged.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.lstrip('# ')}")
    print("\ncopy one to change it: cispo recipes code > mine.yaml, then cispo train mine.yaml")
    return 0


def version(_: argparse.Namespace) -> int:
    """Print the version."""
    print(cispo.__version__)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cispo",
        description="Reinforcement-learning fine-tuning of mixture-of-experts policies with CISPO.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    command = _add(commands, "train", train, "train a policy by a recipe")
    _add_recipe(command)
    command.add_argument("--name", help="name of the run, in place of the recipe's; its folder is runs/NAME")
    command.add_argument("--run-dir", type=Path, metavar="PATH", help="run folder, in place of runs/NAME")
    _add_resume(command, "go on with the run of this name from its newest checkpoint")

    command = _add(commands, "sft", sft, "train a policy on prompts with their completions")
    _add_recipe(command)
    command.add_argument("--name", help="name of the run, in place of the recipe's")
    _add_resume(command, "go on from the newest checkpoint")

    command = _add(commands, "eval", evaluate, "measure a policy: pass@1 with its 95%% interval")
    _add_recipe(command, default="code")
    command.add_argument("--policy", metavar="PATH", help="policy folder to measure, in place of the recipe's")

    command = _add(commands, "export", export, "write a run's policy in Hugging Face layout")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command.add_argument("target", type=Path, metavar="PATH", help="folder to write, which must not exist")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint after this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the best one by checkpoint.keep_best, or pass@1 held out")

    command = _add(commands, "generate", cli_generate.run, "let a policy answer prompts")
    cli_generate.add_options(command)

    command = _add(commands, "reward", reward, "run one reward over a file of completions")
    command.add_argument("reward", metavar="REWARD", help="FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, or a built-in")
    command.add_argument("--data", required=True, metavar="FILE", help="rows with prompt, completion and other columns")
    command.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="an argument of the reward")
    command.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="a column's other name")
    command.add_argument("--json-column", action="append", default=[], metavar="NAME", help="a column of JSON text")
    command.add_argument("--limit", type=int, help="the first rows only")
    command.add_argument("--max-completion-tokens", type=int, default=1024, help="told to the reward (default: 1024)")
    command.add_argument("--timeout-s", type=float, default=60.0, help="seconds for one call (default: 60)")

    command = _add(commands, "view", view, "show what a step of a run sampled, with rewards and verdicts")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command.add_argument("--step", type=int, help="step to show (default: the last one)")
    command.add_argument("--limit", type=int, default=5, help="groups to show (default: 5)")

    command = _add(commands, "replay", replay, "do an update of a run that sampled ahead again, from its log")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command.add_argument("step", type=int, metavar="STEP", help="step to do again")

    command = _add(commands, "inspect", inspect, "count a model's parameters, operations and state by length")
    command.add_argument("model", metavar="PATH|PRESET", help="policy folder, config.json, or minimax-m1")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures (png, svg, pdf)")

    command = _add(commands, "recipes", recipes, "list the packaged recipes, or print one")
    command.add_argument("name", nargs="?", help="packaged recipe to print")

    _add(commands, "version", version, "print the version")
    return parser


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text.capitalize())
    command.set_defaults(command=run)
    return command


def _add_recipe(command: argparse.ArgumentParser, default: str | None = None) -> None:
    text = "recipe file, or the name of a packaged recipe"
    recipe = "RECIPE" if default is None else "[RECIPE]"
    command.usage = f"{command.prog} {recipe} [key=value ...] [options]"
    text += f" (default: {default})" if default else ""
    command.add_argument("words", nargs="*", metavar="RECIPE", help=text)
    command.add_argument_group("key=value", "settings in place of the recipe's, such as learner.learning_rate=1e-5")
    command.set_defaults(default_recipe=default)
    command.add_argument("--dry-run", action="store_true", help="print every setting with its origin, then stop")


def _add_resume(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--resume", action="store_true", help=text)


def _split_words(options: argparse.Namespace, words: list[str]) -> None:
    """Tell the recipe from the overrides: the latter have an equals sign."""
    options.overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise RecipeError(
            f"command line: expected key=value, got '{names[1]}'; for instance learner.learning_rate=1e-5"
        )
    options.recipe = names[0] if names else options.default_recipe
    if options.recipe is None:
        raise RecipeError("command line: no recipe is named; `cispo recipes` lists those that come with the package")


def _overrides(options: argparse.Namespace) -> list[str]:
    return [*options.overrides, *([f"name={options.name}"] if options.name else [])]


def _print_error(error: CispoError) -> None:
    # An error that crossed a process border comes wrapped, with the traceback as its text; the cause is what it says.
    cause = getattr(error, "cause", None)
    for line in str(cause if isinstance(cause, CispoError) else error).splitlines():
        print(line, file=sys.stderr)


def _resume_hint(options: argparse.Namespace, given: Sequence[str]) -> str:
    if options.command not in (train, sft) or options.dry_run:
        return ""
    arguments = [argument for argument in given if argument != "--resume"]
    return f"; continue with: cispo {shlex.join([*arguments, '--resume'])}"


def _terminate(number: int, frame: FrameType | None) -> None:
    """End on SIGTERM as on Ctrl-C, so that actors are stopped and nothing is left behind."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
