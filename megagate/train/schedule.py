"""The learning rate of a step: a pure function."""

import math

from megagate.config.run import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 1; the last step has the floor, warm-up ends at the peak.

    `cosine`: floor + (peak - floor) * (1 + cos(pi * t)) / 2, t the share of steps after warm-up (arXiv 1608.03983, equation 5).
    `wsd`: the peak, then linear to the floor over the last `decay_steps` (arXiv 2404.06395, section 4).
    """
    schedule, peak, steps = config.schedule, config.optim.lr, config.train.steps
    floor = schedule.min_lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "cosine":
        share = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
        return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2
    if schedule.kind == "wsd" and step > steps - schedule.decay_steps:
        return floor + (peak - floor) * (steps - step) / schedule.decay_steps
    return peak
