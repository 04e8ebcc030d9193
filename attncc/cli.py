"""The command line: what there is to type. What the commands do is in `attncc.commands`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attncc.diagnostics import AttnError, render
from attncc.errors import InternalError, NotEnoughMemory

# Wrong usage is 2, by argparse.
USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 1, 70, 130
DTYPES = ("f32", "bf16", "f16", "f64")

# Module and function of each command; imported when it is used, since most of them need PyTorch.
_COMMANDS = {
    "check": ("specs", "check"),
    "build": ("compiling", "build"),
    "emit": ("compiling", "emit"),
    "run": ("running", "run"),
    "verify": ("verifying", "verify"),
    "bench": ("measuring", "bench"),
    "fmt": ("specs", "fmt"),
    "explain": ("specs", "explain"),
}


# What the first option says already, the others cannot say again.
_CLASHES = {"input": ("shape", "dtype"), "png": ("head_dim",)}
# Options of `explain` that are those of the drawing alone.
_DRAWN = ("shape", "seed", "input", "batch", "head")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for a mistake of the user's, 2 for wrong usage, 70 for one of attncc's own.

    Messages go to stderr, and never as a traceback, unless ATTNCC_DEBUG is set.
    """
    arguments, rest = parser().parse_known_args(argv)
    if rest:
        arguments.refuse(f"unrecognized arguments: {' '.join(rest)}{_meant_by(rest[0], arguments)}")
    _refuse_clashes(arguments)
    module, name = arguments.command
    command: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f"attncc.commands.{module}"), name)
    try:
        return command(arguments)
    except AttnError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # Nothing may end in a traceback.
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            print(render(NotEnoughMemory(None, str(error).split("\n", 1)[0])), file=sys.stderr)
            return USER_ERROR
        if os.environ.get("ATTNCC_DEBUG"):
            raise
        print(render(InternalError(None, type(error).__name__, str(error))), file=sys.stderr)
        return INTERNAL_ERROR


def _meant_by(word: str, arguments: argparse.Namespace) -> str:
    """What may have been meant by NAME=VALUE, with or without dashes, where it means nothing."""
    name, equals, value = word.lstrip("-").partition("=")
    if not equals or not name.isidentifier():
        return ""
    if name in arguments and not word.startswith("-"):
        return f" (did you mean --{name} {value}?)"
    return f" (did you mean --set {name}={value}?)" if "set" in arguments else ""


def _refuse_clashes(arguments: argparse.Namespace) -> None:
    """Ends with status 2 where options contradict each other, or would mean nothing."""
    given: frozenset[str] = arguments.given
    clashes = [(other, first) for first, others in _CLASHES.items() for other in others if {first, other} <= given]
    for option, first in clashes:
        arguments.refuse(f"argument --{option.replace('_', '-')}: not allowed with argument --{first}")
    if getattr(arguments, "png", ...) is None:
        for option in sorted(given.intersection(_DRAWN)):
            arguments.refuse(f"argument --{option}: not allowed without argument --png")


class _Store(argparse.Action):
    """Stores the value of an option, and that it was given."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        del parser, option_string
        setattr(namespace, self.dest, values)
        namespace.given |= {self.dest}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="attncc", description="The attention compiler: from a few lines of mathematics to a fast, verified kernel."
    )
    top.add_argument("--version", action="version", version=f"attncc {_version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.register("action", None, _Store)
        command.set_defaults(command=_COMMANDS[name], refuse=command.error, given=frozenset())
        return command

    check = add("check", "parse and check specifications")
    check.add_argument("files", metavar="FILE", nargs="+")
    check.add_argument("--name", help="only the attention of this name")
    _set(check)

    build = add("build", "compile the kernels of a specification ahead of time")
    _spec(build)
    _kernel(build, default_target="cpp")
    build.add_argument("--backward", action="store_true", help="the kernels of the backward pass instead")
    build.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path("build"), help="folder to write to")

    emit = add("emit", "print a stage of the compiler")
    _spec(emit)
    _kernel(emit, default_target="cpp")
    emit.add_argument("--stage", choices=("ast", "ir", "plan", "source"), default="source")
    emit.add_argument("--backward", action="store_true", help="plan or source of the backward pass instead")
    emit.add_argument("--standalone", action="store_true", help="source that runs where attncc is not installed")
    emit.add_argument("-o", "--output", metavar="PATH", type=Path, help="file (a folder with --standalone) to write to")

    run = add("run", "run a specification on random or given inputs")
    _spec(run)
    _call(run)
    run.add_argument("--dtype", choices=DTYPES, default="f32")
    _input(run)
    run.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="safetensors to write o and lse, or the state, to"
    )

    verify = add("verify", "property-test a specification on every backend at hand against the reference")
    _spec(verify)
    verify.add_argument("--target", action="append", help="only this one; may be given several times")
    verify.add_argument("--dtype", choices=DTYPES, action="append", help="only this one; may be given several times")
    verify.add_argument("--examples", type=_positive, default=40, help="cases to draw for each target")
    verify.add_argument("--longest", type=_positive, default=300, help="most keys of a case")
    verify.add_argument("--seed", type=int, default=0)
    verify.add_argument("--forward-only", action="store_true", help="no gradients: those take most of the time")

    bench = add("bench", "time a specification beside PyTorch")
    _spec(bench)
    _call(bench)
    bench.add_argument(
        "--dtype", choices=DTYPES, action="append", help="may be given several times; f32 and bf16 if not"
    )
    bench.add_argument(
        "--against", metavar="PEER,…", help="among eager, sdpa, flex (default: all; of a recurrence eager and sdpa)"
    )
    bench.add_argument("--backward", action="store_true", help="with the gradients of q, k and v")
    bench.add_argument("--repeat", type=_positive, default=9, help="samples of each contender")
    bench.add_argument("--threads", type=_positive, help="of PyTorch; with 1, processor time is measured")
    bench.add_argument("--json", metavar="FILE", type=Path, help="file to write the results to, - for stdout")

    fmt = add("fmt", "format specifications in place")
    fmt.add_argument("files", metavar="FILE", nargs="+")
    fmt.add_argument("--check", action="store_true", help="change nothing; fail where something would change")

    explain = add("explain", "explain an error code, or what the compiler makes of a specification")
    explain.add_argument("what", metavar="CODE|FILE")
    _options_of_spec(explain)
    _kernel(explain, default_target="cpp")
    explain.add_argument("--png", metavar="FILE", type=Path, help="draw the mask with its tile classes")
    _operands(explain, "1,1,1,2048,2048,64")
    _input(explain)
    explain.add_argument("--batch", type=_index, default=0, help="which one to draw (default: %(default)s)")
    explain.add_argument("--head", type=_index, default=0, help="which one to draw (default: %(default)s)")
    return top


def _spec(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="a .attn file")
    _options_of_spec(command)


def _options_of_spec(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", help="which attention, where the file holds several")
    command.add_argument("--templates", metavar="DIR", action="append", default=[], help="templates to prefer")
    _set(command)


def _set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", metavar="NAME=VALUE", type=_setting, action="append", default=[], help="value of a scalar or constant"
    )


def _kernel(command: argparse.ArgumentParser, default_target: str) -> None:
    command.add_argument(
        "--target", default=default_target, help="cpp, cpp:avx2, triton:sm_90, … (default: %(default)s)"
    )
    command.add_argument("--dtype", choices=DTYPES, default="f32")
    command.add_argument(
        "--head-dim", metavar="D[,E]", type=_head_dims, default=(64, 64), help="widths of q and k, and of v"
    )


def _call(command: argparse.ArgumentParser) -> None:
    command.add_argument("--target", help="cpp, cpp:avx2, triton, … (default: what suits the machine)")
    _operands(command, "1,8,8,2048,2048,64")


def _operands(command: argparse.ArgumentParser, shape: str) -> None:
    sizes = "sizes of the inputs (default: %(default)s)"
    command.add_argument("--shape", metavar="B,H,HKV,M,N,D[,E]", type=_shape, default=shape, help=sizes)
    command.add_argument("--seed", type=int, default=0, help="of random inputs")


def _input(command: argparse.ArgumentParser) -> None:
    what = "safetensors with q, k, v and captured tensors by name, instead of random ones"
    command.add_argument("--input", metavar="FILE", type=Path, help=what)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers with commas between them") from None


def _shape(text: str) -> tuple[int, ...]:
    sizes = _integers(text)
    if len(sizes) == 6:
        sizes = (*sizes, sizes[-1])
    if len(sizes) != 7 or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,HKV,M,N,D or B,H,HKV,M,N,D,E")
    return sizes


def _head_dims(text: str) -> tuple[int, int]:
    sizes = _integers(text)
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not D or D,E")
    return sizes[0], sizes[-1]


def _setting(text: str) -> tuple[str, bool | int | float]:
    name, equals, value = text.partition("=")
    words = {"true": True, "false": False}
    if equals and name.isidentifier():
        if value.lower() in words:
            return name, words[value.lower()]
        for kind in (int, float):
            try:
                return name, kind(value)
            except ValueError:
                continue
    hint = ""
    if name == "name" and value:
        hint = f"; an attention is chosen by --name {value}"
    elif value.endswith(".safetensors"):
        hint = "; tensors come with q, k and v from a file: --input FILE"
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, with a number, true or false for VALUE{hint}")


def _positive(text: str) -> int:
    return _at_least(1, text)


def _index(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = _integers(text)
    if len(value) != 1 or value[0] < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")
    return value[0]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("attncc")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
