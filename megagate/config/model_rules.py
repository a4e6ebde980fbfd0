"""The rules between a model's own values."""

from collections.abc import Iterator

from megagate.config.model import GateConfig, ModelConfig, SwitchConfig


def model_rules(model: ModelConfig) -> Iterator[str]:
    """The messages of what a model's values violate."""
    attention, moe = model.attention, model.moe
    yield from divisible(
        "model.attention.num_heads",
        attention.num_heads,
        "model.attention.num_kv_heads",
        attention.num_kv_heads,
        remedy="each key/value head serves an equal number of query heads; change one of them",
    )
    if attention.head_dim > 0 and attention.head_dim % 2:
        yield f"model.attention.head_dim ({attention.head_dim}) must be even: RoPE turns pairs of channels; change model.attention.head_dim"
    yield from _gate_rules(model)
    yield from _switch_rules(model)
    if not model.is_moe:
        return
    if moe.top_k > moe.num_experts:
        yield f"model.moe.top_k ({moe.top_k}) must be at most model.moe.num_experts ({moe.num_experts}); lower model.moe.top_k"
    if moe.first_dense_layers >= model.num_layers > 0:
        yield (
            f"model.moe.first_dense_layers ({moe.first_dense_layers}) must be less than model.num_layers ({model.num_layers}): a mixture "
            "has at least one; lower model.moe.first_dense_layers, or set model.moe.num_experts to 0 for a dense model"
        )
    if moe.score == "sigmoid" and moe.z_loss_coef:
        yield (
            f"model.moe.z_loss_coef ({moe.z_loss_coef}) must be 0 where model.moe.score is sigmoid: the square of logsumexp is least where "
            "every score is 0, and would draw all of them there; set model.moe.z_loss_coef to 0"
        )
    if moe.shared_gate and not moe.shared_ffn_size:
        yield (
            "model.moe.shared_gate (true) needs a shared expert, but model.moe.shared_ffn_size is 0; set model.moe.shared_ffn_size or "
            "model.moe.shared_gate to false"
        )


def _gate_rules(model: ModelConfig) -> Iterator[str]:
    """Which of the gate's values go together."""
    gate, key = model.attention.gate, "model.attention.gate"
    if gate.position == "none":
        return
    if gate.head_shared and gate.granularity == "headwise":
        yield (
            f"{key}.head_shared (true) needs {key}.granularity elementwise, it is headwise: the mean over heads has no head left; "
            "set one of them"
        )
    if gate.head_shared and gate.score != "input":
        yield f"{key}.head_shared (true) needs {key}.score input, it is {gate.score}; set {key}.head_shared to false"
    if gate.position == "G5" and (gate.granularity == "headwise" or gate.head_shared):
        yield (
            f"{key}.position (G5) is after the output projection, where there are no heads; set {key}.granularity to elementwise and "
            f"{key}.head_shared to false"
        )
    if gate.score == "self":
        wanted = {"position": ("G1",), "activation": ("silu", "rmsnorm"), "combine": ("multiply",)}
        wrong = {field: values for field, values in wanted.items() if getattr(gate, field) not in values}
        for field, values in wrong.items():
            yield (
                f"{key}.{field} ({getattr(gate, field)}) must be {' or '.join(values)} where {key}.score is self, an activation of the "
                f"attention output without parameters; set {key}.{field}"
            )
    if gate.score in ("self", "constant") and gate.granularity == "headwise":
        yield f"{key}.granularity (headwise) has no meaning where {key}.score is {gate.score}; set it to elementwise"
    if gate.score in ("input", "parameter") and gate.activation == "rmsnorm":
        yield f"{key}.activation (rmsnorm) is of the attention output itself; set {key}.score to self or choose another activation"
    per_head = gate.granularity == "headwise" or gate.score == "constant"
    if model.attention.qk_norm and gate.position in ("G3", "G4") and per_head and gate.combine == "multiply":
        others = "another position" if gate.score == "constant" else "granularity elementwise, combine add"
        yield (
            f"{key}.position ({gate.position}) with one factor per head learns nothing: model.attention.qk_norm (true) divides it out "
            f"again, up to its sign; set {others} or qk_norm false"
        )
    if gate.score == "constant" and gate.combine != "multiply":
        yield f"{key}.score (constant) is a factor, but {key}.combine is {gate.combine}; set {key}.combine to multiply"
    if gate.score == "constant" and gate.activation != GateConfig.activation:
        yield f"{key}.activation ({gate.activation}) has no meaning where {key}.score is constant, the factor itself; leave it out"
    if gate.score != "constant" and gate.constant != GateConfig.constant:
        yield (
            f"{key}.constant ({gate.constant}) is read where {key}.score is constant, it is {gate.score}; set {key}.score, or leave it out"
        )
    if gate.score == "parameter" and gate.activation in ("silu", "identity") and gate.combine == "multiply":
        yield (
            f"{key}.activation ({gate.activation}) of a parameter that begins at 0 is 0, a factor that cuts off what it gates; set "
            f"{key}.activation to sigmoid or ns_sigmoid, or {key}.combine to add"
        )


def _switch_rules(model: ModelConfig) -> Iterator[str]:
    """What switch heads go together with."""
    switch, position, key = model.attention.switch, model.attention.gate.position, "model.attention.switch"
    if switch.projections == "none":
        if switch != SwitchConfig():
            yield (
                f"{key}.num_experts ({switch.num_experts}) and {key}.top_k ({switch.top_k}) are read where {key}.projections is v or kv; "
                f"set {key}.projections, or leave them out"
            )
        return
    if switch.top_k > switch.num_experts:
        yield f"{key}.top_k ({switch.top_k}) must be at most {key}.num_experts ({switch.num_experts}); lower {key}.top_k"
    if {"G2": "v", "G3": "k"}.get(position) in switch.switched:
        yield (
            f"{key}.projections ({switch.projections}) gates what model.attention.gate.position ({position}) gates: two gates on one "
            f"position; set {key}.projections or model.attention.gate.position to none"
        )
    if switch.projections == "kv" and switch.top_k == 1 and model.attention.qk_norm:
        yield (
            f"{key}.top_k (1) with {key}.projections kv gives each key one factor, which model.attention.qk_norm (true) divides out again, "
            f"so that its router learns nothing; set {key}.projections to v, or {key}.top_k to 2 or more"
        )


def divisible(key: str, value: int, divisor_key: str, divisor: int, *, remedy: str) -> Iterator[str]:
    """The violation of `divisor | value`. Numbers below 1 are reported by the rules of ranges and sizes."""
    if value > 0 and divisor > 0 and value % divisor:
        yield f"{key} ({value}) must be divisible by {divisor_key} ({divisor}); {remedy}"
