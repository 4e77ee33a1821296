"""`cispo generate PATH [PROMPT ...]`: a policy answers prompts of the command line, of a file, of stdin, or typed."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cispo.errors import DataError

if TYPE_CHECKING:
    from cispo.generate import GenerationOptions, GenerationStream, Policy
    from cispo.generation import Generation, Piece, PromptLike, Usage

USAGE = "cispo generate PATH [PROMPT ...] [options]"
EPILOG = """\
prompts: those given, else those of --file, else all of stdin as one; at a terminal a conversation, ended by Ctrl-D.
A .jsonl file holds an object a line, with `prompt` (text), `messages` or `token_ids`; others are one prompt.
"""
KEYS = ("prompt", "messages", "token_ids")


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.usage, command.epilog = USAGE, EPILOG
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("policy", metavar="PATH", help="policy folder, or bundled:tiny")
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the user says")
    command.add_argument("--file", type=Path, metavar="FILE", help="read prompts from a file")
    command.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    command.add_argument("--raw", action="store_true", help="take prompts as they stand, without the chat template")
    command.add_argument("--json", action="store_true", help="print a line of JSON for each completion")

    drawing = command.add_argument_group("how tokens are drawn")
    drawing.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    drawing.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus (default: 1, all)")
    drawing.add_argument("--top-k", type=int, default=0, metavar="K", help="likeliest tokens kept (default: 0, all)")
    drawing.add_argument("--min-p", type=float, default=0.0, metavar="P", help="least share of the likeliest token's")
    drawing.add_argument("--completions", type=int, default=1, metavar="N", help="of each prompt (default: 1)")
    drawing.add_argument("--seed", type=int, default=0, help="the same seed gives the same answers (default: 0)")

    ends = command.add_argument_group("what ends a completion")
    ends.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens (default: 256)")
    ends.add_argument("--stop", action="append", default=[], metavar="TEXT", help="text to stop before; repeatable")
    ends.add_argument("--stop-id", action="append", default=[], type=int, metavar="ID", help="token id to stop after")
    ends.add_argument("--thinking-budget", type=int, metavar="N", help="tokens after which thinking is interrupted")
    ends.add_argument("--thinking-end", metavar="TEXT", help="what ends thinking (default: </think>)")
    ends.add_argument("--interruption", metavar="TEXT", help="what is put in where the budget is spent")
    ends.add_argument("--repetition-tokens", type=int, metavar="N", help="stop after N almost certain tokens in a row")
    ends.add_argument("--repetition-probability", type=float, metavar="P", help="above which they are (default: 0.99)")

    policy = command.add_argument_group("the policy")
    policy.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    policy.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: auto")
    policy.add_argument("--expert-threshold", type=float, default=0.0, metavar="P", help="drop experts of less weight")
    policy.add_argument("--log-routing", action="store_true", help="say which experts the tokens went to")


def run(options: argparse.Namespace) -> int:
    """Answer, text on stdout and usage on stderr; GenerationError, after the answers, for what could not be."""
    settings = _settings(options)
    prompts = _prompts(options)
    from cispo.generate import Policy

    policy = Policy.load(options.policy, device=options.device, dtype=options.dtype)
    if prompts is None:
        _converse(policy, options, settings)
        return 0
    asked = [_asked(policy, prompt, options) for prompt in prompts]
    stream = policy.generate(asked, stream=True, **settings)
    show = _print_json if options.json else _print_text
    try:
        show(stream, len(asked) * options.completions > 1)
    finally:
        _print_usage(stream.usage)
    return 0


def _settings(options: argparse.Namespace) -> "GenerationOptions":
    """The options of `Policy.generate`. DataError for texts of a budget or rule that is not on."""
    for name, needed in (
        ("thinking_end", "thinking_budget"),
        ("interruption", "thinking_budget"),
        ("repetition_probability", "repetition_tokens"),
    ):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            flags = [f"--{one.replace('_', '-')}" for one in (name, needed)]
            raise DataError(f"command line: {flags[0]} does nothing without {flags[1]}; give both")
    from cispo.rollout.request import Repetition, ThinkingBudget

    thinking = repetition = None
    if options.thinking_budget is not None:
        texts = {"end": options.thinking_end, "interruption": options.interruption}
        given = {name: text for name, text in texts.items() if text is not None}
        thinking = ThinkingBudget(options.thinking_budget, **given)
    if options.repetition_tokens is not None:
        probability = options.repetition_probability
        repetition = Repetition(options.repetition_tokens, *([] if probability is None else [probability]))
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "stop": (*options.stop, *options.stop_id),
        "thinking_budget": thinking,
        "repetition": repetition,
        "expert_threshold": options.expert_threshold,
        "log_routing": options.log_routing,
        "seed": options.seed,
        "completions": options.completions,
    }


def _prompts(options: argparse.Namespace) -> list[Any] | None:
    """Prompts of the command line, the file or stdin; None at a terminal, where they are typed."""
    if options.prompts and options.file is not None:
        raise DataError("command line: give prompts or --file, not both")
    if options.system is not None and options.raw:
        raise DataError("command line: --system needs the chat template, which --raw leaves out; drop one")
    if options.prompts:
        return list(options.prompts)
    if options.file is not None:
        return _read_file(options.file)
    return None if sys.stdin.isatty() else [sys.stdin.read().removesuffix("\n")]


def _read_file(path: Path) -> list[Any]:
    """DataError for what cannot be read or holds no prompt, with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); name another file") from error
    if path.suffix != ".jsonl":
        return [text.removesuffix("\n")]
    prompts = [_of_line(line, f"{path}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not prompts:
        raise DataError(f"{path} has no lines; write an object with `prompt` on each")
    return prompts


def _of_line(line: str, place: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON ({error}); write one object a line") from error
    found = [key for key in KEYS if isinstance(row, dict) and key in row]
    if len(found) != 1:
        raise DataError(f"{place}: needs one of prompt, messages and token_ids, has {', '.join(found) or 'none'}")
    value = row[found[0]]
    wanted = {"prompt": (str, str), "messages": (list, dict), "token_ids": (list, int)}[found[0]]
    if not isinstance(value, wanted[0]) or any(not isinstance(item, wanted[1]) for item in value):
        kind = {"prompt": "text", "messages": "a list of objects", "token_ids": "a list of whole numbers"}[found[0]]
        raise DataError(f"{place}: {found[0]} must be {kind}")
    return value


def _asked(policy: "Policy", prompt: Any, options: argparse.Namespace) -> "PromptLike":
    """A prompt as the options want it: raw, or after a system message."""
    if options.raw and isinstance(prompt, str):
        return policy.tokenizer.encode(prompt)
    if options.system is None or (prompt and isinstance(prompt[0], int)):
        asked: PromptLike = prompt
        return asked
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": options.system}, *messages]


def _print_text(stream: "GenerationStream", is_titled: bool) -> None:
    """Completions one below the other, each as it comes; those that come meanwhile wait for their turn."""
    waiting: dict[tuple[int, int], list[Piece]] = {}
    ended: set[tuple[int, int]] = set()
    current: tuple[int, int] | None = None
    for piece in stream:
        key = piece.prompt_number, piece.completion_index
        waiting.setdefault(key, []).append(piece)
        while waiting:
            if current is None:
                current = min(waiting)
                if is_titled:
                    print(f"[prompt {current[0]}, completion {current[1]}]")
            for one in waiting.pop(current, []):
                print(one.text, end="", flush=True)
                if one.generation is not None:
                    print(flush=True)
                    ended.add(current)
            if current not in ended:
                break
            current = None
    _print_routing(stream.generations)


def _print_json(stream: "GenerationStream", _: bool) -> None:
    """A line for each completion as it ends, then one for each prompt that failed."""
    from cispo.generation import GenerationError

    try:
        for piece in stream:
            if piece.generation is not None:
                print(json.dumps(_record(piece.generation), ensure_ascii=False), flush=True)
    except GenerationError as error:
        for failure in error.failures:
            print(json.dumps({"prompt_number": failure.prompt_number, "error": failure.message}, ensure_ascii=False))
        raise


def _record(generation: "Generation") -> dict[str, Any]:
    routing = generation.routing
    record = {
        "prompt_number": generation.prompt_number,
        "completion_index": generation.completion_index,
        "text": generation.text,
        "stop_reason": str(generation.stop_reason),
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "token_ids": generation.token_ids,
        "is_sampled": generation.is_sampled,
        "logprobs": generation.logprobs,
    }
    if routing is not None:
        record |= {"routing": {"tokens": routing.tokens_LE, "mean_entropy": routing.mean_entropy_L}}
    return record


def _print_routing(generations: "Sequence[Generation]") -> None:
    for generation in generations:
        if generation.routing is None or generation.completion_index:
            continue
        uses = zip(generation.routing.tokens_LE, generation.routing.mean_entropy_L, strict=True)
        for layer, (tokens_E, entropy) in enumerate(uses):
            counts = " ".join(map(str, tokens_E))
            print(
                f"prompt {generation.prompt_number}, router {layer}: tokens by expert {counts}; entropy {entropy:.3f}",
                file=sys.stderr,
            )


def _print_usage(usage: "Usage") -> None:
    forked = f", {usage.forked_prompt_tokens} more forked" if usage.forked_prompt_tokens else ""
    print(
        f"{usage.prompt_tokens} prompt tokens{forked}; {usage.completion_tokens} completion tokens in "
        f"{usage.seconds:.2f} s, {usage.tokens_per_s:,.0f} tokens/s",
        file=sys.stderr,
    )


def _converse(policy: "Policy", options: argparse.Namespace, settings: "GenerationOptions") -> None:
    """A conversation at the terminal: every answer is the first completion, and goes on what was said before."""
    from cispo.generation import GenerationError

    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages: list[dict[str, str]] = list(system)
    for line in _lines(input):
        messages.append({"role": "user", "content": line})
        asked = policy.tokenizer.encode(line) if options.raw else messages
        stream = policy.generate(asked, stream=True, **settings)
        try:
            _print_text(stream, options.completions > 1)
        except GenerationError as error:
            print(error, file=sys.stderr)
            messages.pop()
            continue
        _print_usage(stream.usage)
        messages.append({"role": "assistant", "content": stream.generations[0].text})


def _lines(read: Callable[[str], str]) -> Iterator[str]:
    """What is typed, until the end of input; with the keys of a line editor where there is one."""
    with suppress(ImportError):
        import readline  # noqa: F401 - its import gives `input` the keys
    while True:
        try:
            line = read("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line
