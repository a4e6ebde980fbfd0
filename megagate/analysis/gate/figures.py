"""Draws an analysis: `page.png`, `layers.png`, `gate_scores.png` and each model's attention maps."""

import json
from pathlib import Path

from megagate.analysis.gate.analyze import NAME
from megagate.analysis.gate.result import Analysis
from megagate.data.files import clean_errors
from megagate.errors import RunError

_MAPS = "_selected_layer_attention_maps.png"


def clear(output: Path) -> None:
    """Remove the maps of an earlier analysis, whose models the next may not have; call it before `analysis.json` is replaced.

    Other files stay: the next analysis replaces its own.

    Raises:
        DataError: One cannot be removed.
    """
    try:
        from megagate.analysis.gate import style  # noqa: PLC0415  matplotlib is heavy, and only needed here

        earlier = Analysis.from_json(json.loads((output / NAME).read_bytes()))
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # there is none, or it is not one of ours
    for stem in style.file_stems([model.name for model in earlier.models]):
        path = output / f"{stem}{_MAPS}"
        with clean_errors("remove", path):
            path.unlink(missing_ok=True)


def draw(analysis: Analysis, output: Path) -> list[Path]:
    """Writes the pictures, each whole or not at all, and gives their paths, the page first.

    Maps are called `NAME_selected_layer_attention_maps.png`; what of a name no file should have becomes "_" (`style.file_stems`).

    Raises:
        RunError: The package matplotlib is missing.
        DataError: The folder cannot be written.
    """
    try:
        from megagate.analysis.gate import maps, page, panels, style  # noqa: PLC0415  matplotlib is heavy, and only needed here
    except ImportError as error:
        raise RunError(f"pictures need the package matplotlib ({error}); install it") from error
    with style.look():
        paths = [
            style.save(page.page_figure(analysis), output / "page.png"),
            style.save(panels.layers_figure(analysis), output / "layers.png"),
            style.save(maps.gate_figure(analysis), output / "gate_scores.png"),
        ]
        stems = style.file_stems([model.name for model in analysis.models])
        for stem, model in zip(stems, analysis.models, strict=True):
            if model.maps:
                paths.append(style.save(maps.maps_figure(model), output / f"{stem}{_MAPS}"))
    return paths
