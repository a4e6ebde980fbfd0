"""A model's size, counted from its config, beside what the paper prints."""

from dataclasses import dataclass, replace
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

from megagate.config.count import count_parameters, flops_per_token, kv_cache_bytes_per_token, narrowed_ffn_size
from megagate.config.model import GateConfig, ModelConfig, SwitchConfig
from megagate.config.paper import Preset, preset, presets
from megagate.config.run import RunConfig

PAPER_MODEL = "paper/table1/row01"
PAPER_TOTAL_BILLIONS, PAPER_ACTIVE_BILLIONS = 15, 2.54
"""What arXiv 2505.06708 says of its 15A2B."""

_WHY = {
    "paper/table1/row04": "4 more experts of FFN size 768 (its Table 7) in each of 24 layers are more than that",
    "paper/table6/row06": "for the same thing, the headwise gate at G2, its Table 1 prints 0.2",
    "paper/table6": "it states no formula from which that follows; counted are full projections and their routers",
}
"""Where the paper's count is known not to follow from its settings: preset or table, and what there is to say."""

_OWN_WIDTH = "released/1b_gate_elementwise"
"""The gated model whose narrowed width is the authors' and not computed."""


@dataclass(frozen=True)
class Figures:
    """The size of a model.

    Args:
        name: Of the preset, or what the command line describes.
        title: In words.
        baseline: What `added` is counted over.
        total: Parameters.
        active: Parameters that one token uses, the embedding matrix included.
        added: Parameters beyond those of the baseline.
        flops_per_token: Of forward and backward.
        kv_cache_bytes_per_token: In bf16.
        paper_added_millions: The paper's figure; None where it prints none.
        equal_ffn_size: The width of the dense feed-forward with which the model would have its baseline's parameters, a multiple of 16;
            None where it has them, where there is no such width, and for a mixture.
        notes: What does not agree with the paper, or is not computed, a sentence each.
    """

    name: str
    title: str
    baseline: str
    total: int
    active: int
    added: int
    flops_per_token: int
    kv_cache_bytes_per_token: int
    paper_added_millions: float | None
    equal_ffn_size: int | None
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool | None:
        """Whether the count is the paper's figure in its printed precision, rounded or cut; None where it prints none."""
        return None if self.paper_added_millions is None else is_printed_as(self.added / 1e6, self.paper_added_millions)


def of_preset(name: str) -> Figures:
    """The size of a preset.

    Raises:
        ConfigError: There is no such preset.
    """
    row = preset(name)
    baseline = preset(row.baseline)
    return _figures(row.config, name=name, title=row.title, baseline=baseline.name, over=baseline.config.model, row=row)


def of_config(config: RunConfig) -> Figures:
    """The size of any run, `added` over the same model without gate and switch heads."""
    attention = replace(config.model.attention, gate=GateConfig(), switch=SwitchConfig())
    over = replace(config.model, attention=attention)
    return _figures(config, name="your config", title="", baseline="the same model without gate and switch heads", over=over)


def of_run(config: RunConfig, *, preset_name: str | None) -> Figures:
    """The size of a run that began with a preset: the preset's, unless something else changed its model.

    Args:
        config: The whole run.
        preset_name: The last preset of its command line; None where there is none.
    """
    if preset_name is None or preset(preset_name).config.model != config.model:
        return of_config(config)
    figures = of_preset(preset_name)
    return replace(figures, flops_per_token=flops_per_token(config.model, config.train.seq_len))


def of_all() -> list[Figures]:
    """The sizes of all presets, in the order of the tables."""
    return [of_preset(name) for name in presets()]


def is_printed_as(value: float, figure: float) -> bool:
    """Whether `value`, rounded or cut to as many decimals as `figure` has, is `figure`."""
    printed = Decimal(repr(figure))
    return printed in {Decimal(repr(value)).quantize(printed, rounding=way) for way in (ROUND_HALF_UP, ROUND_DOWN)}


def _figures(config: RunConfig, *, name: str, title: str, baseline: str, over: ModelConfig, row: Preset | None = None) -> Figures:
    count = count_parameters(config.model)
    figures = Figures(
        name=name,
        title=title,
        baseline=baseline,
        total=count.total,
        active=count.active,
        added=count.total - count_parameters(over).total,
        flops_per_token=flops_per_token(config.model, config.train.seq_len),
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(config.model),
        paper_added_millions=row.figures.get("added_millions") if row else None,
        equal_ffn_size=_equal_ffn_size(config.model, over),
        notes=(),
    )
    return replace(figures, notes=tuple(_notes(figures, over)))


def _equal_ffn_size(model: ModelConfig, over: ModelConfig) -> int | None:
    if model.is_moe:
        return None
    try:
        width = narrowed_ffn_size(model, over)
    except ValueError:  # what is added is as large as the whole feed-forward
        return None
    return None if width == model.ffn_size else width


def _notes(figures: Figures, over: ModelConfig) -> list[str]:
    notes = []
    if figures.agrees is False:
        why = next((why for start, why in _WHY.items() if figures.name.startswith(start)), "")
        notes.append(
            f"The paper prints {figures.paper_added_millions:g} M added parameters, counted are {figures.added / 1e6:.1f} M"
            + (f"; {why}." if why else ".")
        )
    if figures.name == _OWN_WIDTH:
        more = figures.added / (figures.total - figures.added)
        notes.append(f"The feed-forward's width is the authors' own: with it the model has {more:.1%} more parameters than its baseline.")
    if over == preset(PAPER_MODEL).config.model:
        count = count_parameters(over)
        notes.append(
            f"The paper speaks of {PAPER_TOTAL_BILLIONS}B total and {PAPER_ACTIVE_BILLIONS}B activated parameters; by its Table 7 its "
            f"ungated model has {count.total / 1e9:.3f}B and {count.active / 1e9:.2f}B (embedding and head included)."
        )
    return notes
