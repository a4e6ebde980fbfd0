"""Several models on the same text: what is asked for, whether it can be done, and the doing."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megagate.analysis.gate.layerwise import Report, look_through, passes
from megagate.analysis.gate.result import Analysis, ModelResult
from megagate.analysis.gate.source import Source, attention_words, open_source
from megagate.analysis.gate.text import Windows, default_length, read_windows, unlike
from megagate.checkpoint.folders import INDEX_NAME, POINTERS, ROOT_NAME, is_step_name
from megagate.checkpoint.hf.adopt_config import CONFIG
from megagate.checkpoint.rewrite import CONFIG_NAME
from megagate.config.count import count_parameters
from megagate.data.files import AtomicFile
from megagate.data.manifest import MANIFEST_NAME
from megagate.data.preprocess.tokenizer_source import find_tokenizer
from megagate.data.tokenizer import AnyTokenizer
from megagate.errors import ConfigError, DataError, MegagateError, RunError

Attention = Literal["trained", "causal", "document"]
"""To what tokens attend: as each model was trained, to all tokens before them, or to those of their own document."""

NAME = "analysis.json"
_OTHERS = frozenset({CONFIG, CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, ROOT_NAME, *POINTERS})
"""What folders of models and of data hold, and that of an analysis does not."""
SAMPLES, MAP_TOKENS = 16, 64
SHOWN_LAYERS = (1, 7, 21, 28)
"""Whose attention is shown, counted from 1: the layers that the paper's authors show."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        models: `NAME=PATH` of each.
        data: A file of text, or the folder of a prepared data set.
        seq_len: Tokens of a sequence; None for 4,096, or as many as all models were trained on.
        samples: Sequences, where there are so many.
        layers: Whose attention is kept, counted from 1; None for `SHOWN_LAYERS`, or as many spread over models of fewer layers.
        map_tokens: Of how many tokens.
        device: `cpu`, `cuda`, or another of PyTorch's.
        attention: See `Attention`.
        tokenizer: A `tokenizer.json`, a folder with one, or `bytes`; None for the models' own.
        text_key: Of the text in JSON lines and Parquet.
    """

    models: tuple[str, ...]
    data: Path
    seq_len: int | None = None
    samples: int = SAMPLES
    layers: tuple[int, ...] | None = None
    map_tokens: int = MAP_TOKENS
    device: str = "cpu"
    attention: Attention = "trained"
    tokenizer: str | None = None
    text_key: str = "text"


Bar = Callable[[int], Report]
"""Makes something to report to, given the total."""
Note = Callable[[str], None]
"""Takes a sentence for people."""


def analyze(request: Request, *, bar: Bar = lambda total: lambda passed: None, note: Note = lambda text: None) -> Analysis:
    """Measure the models, one after the other. Everything that can be refused is refused before the first is run.

    Args:
        request: What is asked for.
        bar: Makes what is told of progress.
        note: Is told of what is odd and no error, before the first model is run.

    Raises:
        ConfigError: The request contradicts itself, or the models do not compare.
        CheckpointError: A model is missing or damaged.
        DataError: The data cannot be used.
        RunError: The device cannot be used, or has not enough memory.
    """
    named = _named(request.models)
    device = _device(request.device)
    tokenizer = None if request.tokenizer is None else find_tokenizer(request.tokenizer)
    sources = [open_source(name, path) for name, path in named.items()]
    shown = [_shown(source, request.layers) for source in sources]
    length = request.seq_len or default_length(sources)
    windows = read_windows(
        request.data, sources, seq_len=length, samples=request.samples, tokenizer=tokenizer, text_key=request.text_key
    )
    windows = windows._replace(described=_noted(windows.described, sources, request.tokenizer, tokenizer, note))
    within = [_within(source, request.attention, windows) for source in sources]
    for source in sources:
        if beyond := _beyond(source, length):
            note(f"{source.name} was {beyond}, and reads {length:,}")
    if any(within):
        windows = windows.without_targets_after_documents()  # of all models, so that their losses are of the same targets
    report = bar(sum(passes(source, windows) for source in sources))
    with _memory(device):
        models = tuple(
            _result(source, windows, within_documents=documents, device=device, layers=layers, request=request, report=report)
            for source, layers, documents in zip(sources, shown, within, strict=True)
        )
    return Analysis(models, windows.described, len(windows.tokens), length, "fp32", str(device))


@contextmanager
def claimed(output: Path, request: Request) -> Iterator[Path]:
    """The folder for what is found, made before hours are spent; in an error's case what was made of it goes again, unless it is in use.

    Raises:
        RunError: It cannot be written to, or is a model's or the data's own.
    """
    missing = [folder for folder in (output, *output.parents) if not os.path.lexists(folder)]  # the innermost first
    taken = [*_named(request.models).values(), request.data]
    try:
        yield claim(output, taken)
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # only what is empty
        raise


def claim(output: Path, taken: Sequence[Path] = ()) -> Path:
    """Make the folder, and see that it can be written to.

    Args:
        output: The folder.
        taken: What it must not be.

    Raises:
        RunError: It cannot, or holds a run, checkpoints, a Hugging Face model or a data set.
    """
    if os.path.isfile(output):
        raise RunError(f"--output ({output}) is a file; name a folder")
    with _writing(output):
        names = set(os.listdir(output)) if os.path.isdir(output) else set()
        held = next((name for name in sorted(names) if name in _OTHERS or is_step_name(name)), None)
        if held or os.path.realpath(output) in map(os.path.realpath, taken):
            reason = f"holds {held}, as a model's or a data set's folder does" if held else "is what is to be analyzed"
            raise RunError(f"{reason}; choose another folder, which may lie in it")
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".{NAME}.{os.getpid()}"
        probe.touch()
        probe.unlink()
    return output


def write(analysis: Analysis, output: Path) -> Path:
    """Write `analysis.json`, from which figures and tables can be made again.

    Raises:
        RunError: It cannot be written.
    """
    path = output / NAME
    with _writing(output), AtomicFile(path) as file:
        file.write(json.dumps(analysis.to_json()).encode())
    return path


def _named(models: Sequence[str]) -> dict[str, Path]:
    found = []
    for text in models:
        name, sign, path = text.partition("=")
        if not (name.strip() and sign and path) or "/" in name:
            raise ConfigError(f"--models {text!s:.300} must be NAME=PATH, the name without a slash, as in gated=runs/gated")
        found.append((name.strip(), Path(path)))
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise ConfigError(f"--models names {count} models {name}; each needs a name of its own; rename one")
    return dict(found)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _no_device(name, "PyTorch knows no such device") from error
    if device.type == "meta":
        raise _no_device(name, "it holds no numbers")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # the last two where PyTorch was built without it
        raise _no_device(name, str(error).splitlines()[0].partition(". ")[0].rstrip(".")) from error
    return device


def _no_device(name: str, reason: str) -> RunError:
    return RunError(f"--device ({name!s:.100}) cannot be used here ({reason}); use cpu, or a device that PyTorch finds")


def _noted(described: str, sources: Sequence[Source], named: str | None, tokenizer: AnyTokenizer | None, note: Note) -> str:
    """What was read, with the models whose tokenizer is not that with which it was."""
    others = [] if tokenizer is None else [source.name for source in sources if unlike(source, tokenizer)]
    if not others:
        return described
    words = f"--tokenizer {named}, which is not that of {', '.join(others)}"
    note(f"--data is encoded by {words}; their figures are of ids that mean other text to them")
    return f"{described} encoded by {words}"


def _beyond(source: Source, length: int) -> str:
    """On how few tokens a model was trained that now reads more; empty where it was not."""
    return f"trained on {source.length:,} tokens" if source.length and length > source.length else ""


def _shown(source: Source, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """Counted from 0."""
    there = source.model.num_layers
    if layers is not None:
        for layer in layers:
            if not 1 <= layer <= there:
                raise ConfigError(
                    f"--layers ({layer}): {source.name} has no such layer, only 1 to {there}; choose layers that all models have"
                )
        return tuple(sorted({layer - 1 for layer in layers}))
    if there >= SHOWN_LAYERS[-1]:
        return tuple(layer - 1 for layer in SHOWN_LAYERS)
    last = SHOWN_LAYERS[-1] - 1
    return tuple(sorted({round((layer - 1) * (there - 1) / last) for layer in SHOWN_LAYERS}))


def _within(source: Source, attention: Attention, windows: Windows) -> bool:
    """Whether attention stays within documents."""
    within = source.within_documents if attention == "trained" else attention == "document"
    if within and windows.eod_id is None:
        raise DataError(
            f"{source.name}: attention is to stay within documents, and --data has no token that ends them; give data that has one, or "
            "--attention causal"
        )
    return within


def _result(
    source: Source,
    windows: Windows,
    *,
    within_documents: bool,
    device: torch.device,
    layers: tuple[int, ...],
    request: Request,
    report: Report,
) -> ModelResult:
    span, length = "within" if within_documents else "across", windows.tokens.shape[1]
    looked = look_through(
        source,
        windows,
        within_documents=within_documents,
        device=device,
        map_layers=layers,
        map_tokens=request.map_tokens,
        report=report,
    )
    return ModelResult(
        name=source.name,
        path=str(source.path),
        kind=", ".join(filter(None, [source.kind, _beyond(source, length), f"measured with attention {span} documents"])),
        gate=attention_words(source.model.attention),
        parameters=count_parameters(source.model).total,
        loss=looked.loss,
        targets=looked.targets,
        layers=looked.layers,
        maps=looked.maps,
        map_tokens=windows.spelled(request.map_tokens),
    )


@contextmanager
def _memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"--device ({device}) has not enough memory; lower --seq-len, or use --device cpu") from error


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except MegagateError as error:
        raise RunError(f"--output ({output}): {error}") from error
    except OSError as error:
        raise RunError(
            f"--output ({output}) cannot be written ({error.strerror}); choose a folder that can be, or mend its permissions"
        ) from error
