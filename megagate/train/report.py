"""What a finished run says: what it has learnt, a sample, where it lies, and what to do next."""

import shlex
from collections.abc import Mapping

from megagate.config.run import RunConfig
from megagate.data.loader import ValidLoader, unigram_entropy
from megagate.data.sources import Sources
from megagate.engine.base import Engine
from megagate.log import logger
from megagate.train.folder import RunFolder
from megagate.train.sample import continuation


def tell_learning(config: RunConfig, *, val_loss: float, valid: Mapping[str, ValidLoader]) -> bool:
    """Print the validation loss beside the unigram entropy of the very same targets, those of all validation sets.

    Returns:
        bool: Whether the loss is `eval.min_gain_nats` or more below the entropy, that is, whether the model uses context.
    """
    counts = sum(loader.target_counts(config.model.vocab_size) for loader in valid.values())
    entropy, wanted = unigram_entropy(counts), config.eval.min_gain_nats
    gain = entropy - val_loss
    logger.info(
        "validation loss %.3f nats; unigram entropy of the same %s tokens %.3f nats; the model is %.3f nats %s",
        *(val_loss, f"{int(counts.sum()):,}", entropy, abs(gain), "below" if gain >= 0 else "above"),
    )
    if wanted and not gain >= wanted:  # also when it is not a number
        logger.info(
            "FAILED: eval.min_gain_nats asks for at least %.3f nats below; train longer, or look for what keeps it from learning", wanted
        )
        return False
    return True


def tell_sample(config: RunConfig, *, engine: Engine, data: Sources) -> None:
    """Print a continuation of `eval.prompt`. Collective."""
    if not (config.eval.prompt and config.eval.sample_tokens and data.tokenizer):
        return
    engine.model.eval()
    text = continuation(
        engine.model,
        data.tokenizer,
        config.eval.prompt,
        tokens=config.eval.sample_tokens,
        window=config.train.seq_len,
        seed=config.train.seed,
    )
    engine.model.train()
    logger.info("a sample: %s", repr(config.eval.prompt + text))


def tell_next(config: RunConfig, folder: RunFolder, *, world_size: int) -> None:
    """Print where the run lies and commands that come next, on as many ranks where not said otherwise."""
    name = folder.path
    launch = "deepspeed" if world_size == 1 else f"deepspeed --num_gpus {world_size}"
    commands = []
    if config.model.attention.gate.position != "none":
        commands.append(("the ungated baseline", launch, "-baseline", "--config examples/configs/gate_none.yaml --train.resume auto"))
    if world_size > 1:
        commands.append(("the same model on one rank", "deepspeed", "-one", "--parallel.tp 1 --parallel.ep 1 --train.resume auto"))
    elif _fits_two_ranks(config):
        commands.append(("the same model on two ranks", "deepspeed --num_gpus 2", "-ep2", "--parallel.ep 2 --train.resume auto"))
    more = f"--train.resume {shlex.quote(str(folder.checkpoints))} --train.steps {2 * config.train.steps}"
    commands.append(("go on from here", launch, "-more", more))
    logger.info("the run is in %s: config.yaml, metrics.jsonl (a line per step), checkpoints/ (latest, best)", name)
    # A path as the shell takes it: the first config is this run's own, what follows wins.
    start, where = f"examples/pretrain_moe.sh --config {shlex.quote(str(folder.config))}", "--train.output_dir"
    lines = [f"  {what + ':':29}{how} {start} {change} {where} {shlex.quote(f'{name}{end}')}" for what, how, end, change in commands]
    logger.info("next:\n%s", "\n".join(lines))


def _fits_two_ranks(config: RunConfig) -> bool:
    """Whether the run's batch and experts divide over two ranks."""
    train, moe = config.train, config.model.moe
    return config.model.is_moe and moe.num_experts % 2 == 0 and train.global_batch_size % (2 * max(1, train.micro_batch_size)) == 0
