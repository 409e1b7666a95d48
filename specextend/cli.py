"""The command line: ``specextend generate | chat | demo | eval | train | info``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import platform
import re
import sys
import types
import typing
from importlib import metadata
from pathlib import Path

import torch

from . import _C, __version__, assets
from .config import SpecConfig
from .eval.options import add_options as eval_options
from .train.options import add_options as train_options

# What the caller can put right is told in one line; all else is a bug, and shows itself whole.
EXPECTED = (ValueError, OSError, ImportError)
WORDS = ("ngram", "self")  # drafts that are no files
DTYPES = ("auto", "float32", "bfloat16", "float16")


class UsageError(ValueError):
    """Options that do not go together, or out of range."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, _error_line(message))


def _error_line(message: object) -> str:
    return f"specextend: error: {' '.join(str(message).split())}\n"


# ---- options ---------------------------------------------------------------------------------


def config_docs() -> tuple[dict[str, str], dict[str, str]]:
    """Section and text of each field of :class:`SpecConfig`, from its docstring."""
    sections, texts, section, names = {}, {}, "", []
    for line in inspect.cleandoc(SpecConfig.__doc__ or "").splitlines():
        if re.fullmatch(r"\S.*:", line):
            section, names = line[:-1], []
        elif entry := re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            sections.update(dict.fromkeys(names, section))
            texts.update(dict.fromkeys(names, entry[2]))
        elif line.startswith("        "):
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    clean = {name: text.replace("``", "").replace("%", "%%") for name, text in texts.items()}
    return sections, clean


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _integer_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


_integers.__name__, _integer_or_none.__name__ = "comma-separated integers", "integer or none"


def add_config_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """An option for every field of :class:`SpecConfig` but some."""
    sections, texts = config_docs()
    hints = typing.get_type_hints(SpecConfig)
    groups = {}
    for field in dataclasses.fields(SpecConfig):
        if field.name in without:
            continue
        section = sections.get(field.name, "options")
        group = groups.setdefault(section, None) or parser.add_argument_group(section)
        groups[section] = group
        hint = hints[field.name]
        default = field.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        how: dict = {"help": f"{texts.get(field.name, '')} [{default}]"}
        if typing.get_origin(hint) is typing.Literal:
            how["choices"] = typing.get_args(hint)
        elif hint is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            how.update(type=_integers, metavar="N,N")
        elif typing.get_origin(hint) in (typing.Union, types.UnionType):
            how.update(type=_integer_or_none, metavar="N")
        else:
            how.update(type=hint, metavar="N" if hint is int else "X")
        group.add_argument(
            f"--{field.name.replace('_', '-')}", dest=f"config_{field.name}",
            default=argparse.SUPPRESS, **how,
        )  # fmt: skip


def config_from(args: argparse.Namespace, **defaults) -> SpecConfig:
    """The configuration that the options ask for."""
    given = {k[len("config_") :]: v for k, v in vars(args).items() if k.startswith("config_")}
    if args.target is None and args.draft in (None, *WORDS, *assets.DRAFTS):
        defaults = {**assets.SETTINGS, **defaults}
    try:
        return SpecConfig(**{**defaults, **given})
    except ValueError as error:
        raise UsageError(error) from error


def _words(names) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _add_models(parser: argparse.ArgumentParser, dtype: str | None, several: bool = False) -> None:
    group = parser.add_argument_group("models")
    group.add_argument(
        "--target", metavar="MODEL", help="folder or hub id of a causal LM [the embedded target]"
    )
    group.add_argument(
        "--draft", metavar="DRAFT", action="append" if several else "store",
        help="folder or hub id of a causal LM with the same tokenizer or of a trained head (EAGLE, "
        'LongSpec); "ngram": look-up in the text; "self": the target on a part of its cache; '
        f'"none": plain decoding; {_words(assets.DRAFTS)}: embedded ones [model]'
        + "; may be repeated, for drafts of other kinds" * several,
    )  # fmt: skip
    group.add_argument(
        "--dtype", choices=DTYPES, default=dtype,
        help='"auto": as the checkpoint is '
        f"[{dtype or 'float32; on a GPU as the preset or the checkpoint is'}]",
    )  # fmt: skip
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with")
    if not several:
        group.add_argument("--device", help='[a GPU if there is one, else "cpu"]')


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="[256]")
    group.add_argument(
        "--temperature", type=float, metavar="X",
        help="0: greedy; above: sample [0; 1 with another option of sampling]",
    )  # fmt: skip
    group.add_argument("--top-k", type=int, metavar="N", help="sample from the N likeliest tokens")
    group.add_argument(
        "--top-p", type=float, metavar="X", help="sample from the likeliest tokens of this mass"
    )
    group.add_argument(
        "--min-p", type=float, metavar="X",
        help="sample from the tokens at least X times as likely as the likeliest",
    )  # fmt: skip
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end after this text; may be repeated"
    )
    group.add_argument(
        "--highlight", action="store_true",
        help="on a terminal with colours, tell accepted tokens from the target's own",
    )  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="specextend", description="Lossless long-context speculative decoding.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"specextend {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("generate", generate, "continue a text")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompt-file", metavar="FILE", help='"-": standard input, the default')
    sub.add_argument(
        "--chat", action="store_true", help="put the prompt into the tokenizer's chat template"
    )
    sub.add_argument(
        "--compare", action="store_true",
        help="decode plainly as well, report speed and equality; a difference is an error",
    )  # fmt: skip
    sub.add_argument(
        "--json", action="store_true", help="print one JSON object: text, tokens, statistics"
    )
    _add_generation(sub)
    _add_models(sub, "auto")
    add_config_options(sub)

    sub = command("chat", chat, "talk with a model; /reset begins anew, end of input ends")
    sub.add_argument("--system", metavar="TEXT", help="system message, for a chat template")
    _add_generation(sub)
    _add_models(sub, "auto")
    add_config_options(sub)

    sub = command("demo", demo, "continue a long document in several ways, and compare them")
    sub.add_argument("--tokens", type=int, metavar="N", help="length of the prompt [16000]")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="[256]")
    sub.add_argument("--short", action="store_true", help="2000 tokens and 48 new ones")
    sub.add_argument("--document", metavar="FILE", help="[modules of Python's standard library]")
    group = sub.add_argument_group("page")
    group.add_argument(
        "--web", action="store_true",
        help="serve a page: a text of one's own, plain decoding and SpecExtend side by side, live",
    )  # fmt: skip
    group.add_argument("--host", metavar="ADDRESS", help="to serve it on [127.0.0.1]")
    group.add_argument("--port", type=int, metavar="N", help="0: any that is free [8765]")
    _add_models(sub, "float32")
    add_config_options(sub, without=("draft_cache", "gate", "seed"))

    sub = command("eval", evaluate, "measure speed, acceptance and exactness over lengths")
    eval_options(sub)
    _add_models(sub, None, several=True)
    add_config_options(sub, without=("draft_cache", "tree_attention", "gate", "seed"))

    sub = command("train", train, "train a draft for a model: a LongSpec block or an EAGLE-3 head")
    train_options(sub)

    sub = command("info", info, "say what was built, and what it runs on")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


# ---- models ----------------------------------------------------------------------------------


def load_pair(args: argparse.Namespace):
    """Target, draft as ``SpecExtend`` takes it, and the tokenizers of both, None without.

    Raises:
        ValueError: a model or the device is not there, or only one of a pair was named.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    target, draft = args.target, args.draft
    if target is None:
        if not (assets.target_path() / "config.json").exists():
            raise ValueError(
                f"the embedded models are not in {assets.target_path().parent}: name others with "
                "--target and --draft"
            )
        target, draft = assets.target_path(), draft or "model"
        if draft in assets.DRAFTS:
            draft = assets.draft_path(draft)
    elif draft is None:
        raise UsageError(
            "--target needs --draft: a model with the same tokenizer, a head trained for it, "
            "ngram, self, or none for plain decoding"
        )

    device = _device(args.device)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    target = _located(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval().to(device)
    if str(draft).lower() == "none":
        return model, None, tokenizer, None
    draft, draft_tokenizer = named_draft(draft)
    return model, draft, tokenizer, draft_tokenizer


def _device(name: str | None) -> torch.device:
    """The device of ``--device``, once it is known that models can run there."""
    from .machine import default_device

    try:
        device = torch.device(name or default_device())
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda":
        if not _C.has_cuda:
            raise UsageError(
                f"--device {name}: specextend was built without CUDA kernels; install it with "
                "nvcc and SPECEXTEND_CUDA=ON"
            )
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: torch sees {count} GPUs")
    return device


def _located(name) -> str | Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        raise ValueError(f"there is no folder {name}")
    return str(name)


def named_draft(draft: str | Path):
    """A draft as ``SpecExtend`` takes it, and its tokenizer, None without."""
    from transformers import AutoTokenizer

    from .draft.checkpoint import Checkpoint

    if draft in WORDS:
        return draft, None
    draft = _located(draft)
    folder = Checkpoint.open(draft).folder
    if not (folder / "tokenizer_config.json").exists():  # as trained heads come
        return draft, None
    return draft, AutoTokenizer.from_pretrained(folder)


def _generation_options(args: argparse.Namespace, tokenizer) -> dict:
    """Arguments of ``SpecExtend.stream``."""
    filters = {k: getattr(args, k) for k in ("top_k", "top_p", "min_p")}
    filters = {k: v for k, v in filters.items() if v is not None}
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if filters else 0.0
    if temperature < 0:
        raise UsageError(f"--temperature must not be negative, got {temperature}")
    if filters and not temperature:
        option = next(iter(filters)).replace("_", "-")
        raise UsageError(f"--{option} has no meaning with --temperature 0, which is greedy")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    options: dict = {"max_new_tokens": args.max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, **filters)
    if args.repetition_penalty is not None:
        options["repetition_penalty"] = args.repetition_penalty
    if args.stop:
        options.update(stop_strings=args.stop, tokenizer=tokenizer)
    return options


def _template(tokenizer, messages: list[dict]) -> torch.Tensor:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]


def _encode(tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer(text).input_ids
    if not ids:
        raise ValueError("the prompt is empty")
    return torch.tensor([ids])


# ---- commands --------------------------------------------------------------------------------


def _summary(stats) -> str:
    """One line about a generation."""
    seconds = stats.seconds
    parts = [f"{stats.num_emitted_tokens} tokens", f"{stats.tokens_per_second:.1f} tokens/s"]
    if stats.num_draft_tokens:
        parts.append(f"mean acceptance length {stats.mean_acceptance_length:.2f}")
    prefill = f"prefill of {stats.num_prompt_tokens:,} tokens {seconds['prefill']:.1f} s"
    if "draft_prefill" in seconds:
        prefill += f" + draft {seconds['draft_prefill']:.1f} s"
    return " | ".join([*parts, prefill])


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file not in (None, "-"):
        return Path(args.prompt_file).read_text(encoding="utf-8")
    if args.prompt_file is None and sys.stdin.isatty():
        raise UsageError("a prompt is wanted: --prompt, --prompt-file, or standard input")
    return sys.stdin.read()


def _run(spec, ids: torch.Tensor, options: dict, live, meter) -> list[int]:
    """Generate, showing what comes."""
    tokens: list[int] = []
    try:
        for step in spec.stream(ids, **options):
            meter.close()
            live.add(step.tokens, step.num_accepted)
            tokens += step.tokens
    finally:
        meter.close()
        live.end()
    return tokens


def generate(args: argparse.Namespace) -> int:
    from . import SpecExtend
    from .terminal import LiveText, Meter, standard_error, standard_output

    config = config_from(args)
    text = _read_prompt(args)
    target, draft, tokenizer, draft_tokenizer = load_pair(args)
    options = _generation_options(args, tokenizer)
    if options["do_sample"] and config.seed is None:  # so that a comparison draws the same
        config = config.replace(seed=int(torch.randint(1 << 62, ())))
    if args.chat:
        if not tokenizer.chat_template:
            raise ValueError("the target's tokenizer has no chat template: leave out --chat")
        ids = _template(tokenizer, [{"role": "user", "content": text}])
    else:
        ids = _encode(tokenizer, text)
    ids = ids.to(target.device)

    notes = standard_error()
    meter = Meter(notes)
    spec = SpecExtend(
        target, draft, config, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, progress=meter
    )
    prompt = ids[0].tolist()
    live = LiveText(None if args.json else standard_output(), tokenizer, prompt, args.highlight)
    tokens = _run(spec, ids, options, live, meter)
    result = {
        "text": live.text,
        "tokens": tokens,
        "stats": spec.stats.as_dict(),
        "target": str(args.target or "embedded"),
        "draft": None if draft is None else str(args.draft or "embedded"),
        "dtype": str(target.dtype).removeprefix("torch."),
        "seed": config.seed if options["do_sample"] else None,
    }
    if not args.json:
        notes.line(_summary(spec.stats), "dim")
    difference = None
    if args.compare:
        result["plain"], difference = _compare(
            SpecExtend(target, None, config, progress=meter), ids, options, tokenizer, result, meter
        )
        if not args.json:
            plain = result["plain"]
            notes.line(
                f"plain decoding {plain['stats']['tokens_per_second']:.1f} tokens/s | speed-up "
                f"{plain['speed_up']:.2f} | identical: {'yes' if plain['identical'] else 'no'}",
                "dim",
            )
    if args.json:
        print(json.dumps(result))
    if difference:
        raise ValueError(difference)
    return 0


def _compare(plain, ids, options, tokenizer, result, meter) -> tuple[dict, str | None]:
    """Decode plainly, and say what came out and where it differs."""
    from .terminal import LiveText

    live = LiveText(None, tokenizer)
    tokens: list[int] = []
    for step in plain.stream(ids, **options):
        tokens += step.tokens
        meter("plain decoding", len(tokens), options["max_new_tokens"])
    meter.close()
    live.add(tokens)
    live.end()
    stats = plain.stats
    ours = result["stats"]["tokens_per_second"]
    report = {
        "identical": tokens == result["tokens"],
        "speed_up": ours / stats.tokens_per_second if stats.tokens_per_second else 0.0,
        "text": live.text,
        "tokens": tokens,
        "stats": stats.as_dict(),
    }
    return report, difference(tokenizer, result["tokens"], tokens, "plain decoding")


def difference(tokenizer, ours: list[int], theirs: list[int], name: str) -> str | None:
    """Where two continuations part, in words; None if nowhere."""
    from .timing import parting

    at = parting(ours, theirs)
    if at is None:
        return None
    if at >= min(len(ours), len(theirs)):
        return f"the output has {len(ours)} tokens, that of {name} {len(theirs)}"
    return (
        f"new token {at} is {tokenizer.decode([ours[at]])!r} ({ours[at]}), but "
        f"{tokenizer.decode([theirs[at]])!r} ({theirs[at]}) with {name}"
    )


def chat(args: argparse.Namespace) -> int:
    from . import SpecExtend
    from .terminal import LiveText, Meter, standard_error, standard_output

    config = config_from(args)
    target, draft, tokenizer, draft_tokenizer = load_pair(args)
    options = _generation_options(args, tokenizer)
    output, notes = standard_output(), standard_error()
    meter = Meter(notes)
    spec = SpecExtend(
        target, draft, config, tokenizer=tokenizer, draft_tokenizer=draft_tokenizer, progress=meter
    )
    has_template = bool(tokenizer.chat_template)
    if args.system and not has_template:
        raise ValueError("--system needs a chat template, which the target's tokenizer lacks")
    first = [{"role": "system", "content": args.system}] if args.system else []
    messages, written = list(first), ""
    interactive = sys.stdin.isatty() and output.is_terminal
    if interactive:
        import readline  # noqa: F401  editing and history for input()
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            break
        if line.strip() == "/reset":
            messages, written = list(first), ""
            continue
        if not line.strip():
            continue
        if has_template:
            messages.append({"role": "user", "content": line})
            ids = _template(tokenizer, messages)
        else:
            written += line + "\n"
            ids = _encode(tokenizer, written)
        live = LiveText(output, tokenizer, ids[0].tolist(), args.highlight)
        try:
            _run(spec, ids.to(target.device), options, live, meter)
            notes.line(_summary(spec.stats), "dim")
        except KeyboardInterrupt:
            notes.line("interrupted", "dim")
        messages.append({"role": "assistant", "content": live.text})
        written += live.text
    if interactive:
        output.line()
    return 0


def demo(args: argparse.Namespace) -> int:
    if not args.web:
        if args.host is not None or args.port is not None:
            raise UsageError("--host and --port go with --web")
        from .demo import run_demo

        return run_demo(args)
    try:
        from .web.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "pydantic", "uvicorn"):
            raise
        raise ImportError(
            f"--web needs {error.name}, which is not installed: pip install 'specextend[web]'"
        ) from error
    return serve(args)


def evaluate(args: argparse.Namespace) -> int:
    from .eval.command import run_eval

    return run_eval(args)


def train(args: argparse.Namespace) -> int:
    from .train.command import train

    return train(args)


def facts() -> dict:
    """What was built, and what it runs on."""

    archs = [arch.removesuffix("-real") for arch in _C.cuda_archs.split(",") if arch]
    if _C.has_sm90a:
        archs.append("90a")
    return {
        "specextend": __version__,
        "cuda_archs": archs,
        "cpu_isas": _C.cpu_isas(),
        "cpu_isa": _C.cpu_isa(),
        "torch_built_with": _C.torch_version,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "embedded_models": (assets.target_path() / "config.json").exists(),
    }


def info(args: argparse.Namespace) -> int:
    found = facts()
    if args.json:
        print(json.dumps(found))
        return 0
    archs = ", ".join(f"sm_{arch}" for arch in found["cuda_archs"])
    rows = {
        "specextend": found["specextend"],
        "CUDA kernels": archs or "not built",
        "CPU kernels": f"{', '.join(found['cpu_isas'])}; in use: {found['cpu_isa']}",
        "torch": f"{found['torch']} (built with {found['torch_built_with']})",
        "transformers": found["transformers"],
        "Python": found["python"],
        "threads": found["threads"],
        "embedded models": "yes" if found["embedded_models"] else "no",
    }
    for name, value in rows.items():
        print(f"{name:<16} {value}")
    return 0


def _check_isa() -> None:
    """Have SPECEXTEND_CPU_ISA read while an error in it can be told as one."""
    try:
        _C.cpu_isa()
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        raise ValueError(text[text.find("SPECEXTEND_CPU_ISA") :]) from error


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns 0, 1 for a failure, 2 for bad usage, 130 if interrupted."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.error("a command is wanted: generate, chat, demo, eval, train or info")
    try:
        if getattr(args, "threads", None) is not None:
            if args.threads < 1:
                parser.error(f"--threads must be at least 1, got {args.threads}")
            torch.set_num_threads(args.threads)
        _check_isa()
        return args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("specextend: interrupted\n")
        return 130
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        parser.error(str(error))
    except EXPECTED as error:
        sys.stderr.write(_error_line(error))
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
