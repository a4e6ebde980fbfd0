"""Draws an analysis: `page.png`, `layers.png`, `gate_scores.png` and each model's attention maps."""

from pathlib import Path

from megagate.analysis.gate.result import Analysis
from megagate.errors import RunError


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
                paths.append(style.save(maps.maps_figure(model), output / f"{stem}_selected_layer_attention_maps.png"))
    return paths
