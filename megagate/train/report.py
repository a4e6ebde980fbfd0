"""What a finished run says: what it has learnt, a sample, where it lies, and what to do next."""

from megagate.config.run import RunConfig
from megagate.data.dataset import DataSet
from megagate.data.loader import ValidLoader, unigram_entropy
from megagate.engine.base import Engine
from megagate.log import logger
from megagate.train.folder import RunFolder
from megagate.train.sample import continuation


def tell_learning(config: RunConfig, *, val_loss: float, valid: ValidLoader) -> bool:
    """Print the validation loss beside the unigram entropy of the very same targets.

    Returns:
        bool: Whether the loss is `eval.min_gain_nats` or more below the entropy, that is, whether the model uses context.
    """
    counts = valid.target_counts(config.model.vocab_size)
    entropy, wanted = unigram_entropy(counts), config.eval.min_gain_nats
    logger.info(
        "validation loss %.3f nats; unigram entropy of the same %s tokens %.3f nats; the model is %.3f nats below",
        *(val_loss, f"{int(counts.sum()):,}", entropy, entropy - val_loss),
    )
    if wanted and entropy - val_loss < wanted:
        logger.info(
            "FAILED: eval.min_gain_nats asks for at least %.3f nats below; train longer, or look for what keeps it from learning", wanted
        )
        return False
    return True


def tell_sample(config: RunConfig, *, engine: Engine, data: DataSet) -> None:
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


def tell_next(config: RunConfig, folder: RunFolder) -> None:
    """Print where the run lies and commands that come next."""
    name, script = folder.path, "examples/pretrain_moe.sh"
    again = f"{script} --config {folder.config} --train.output_dir {name}"
    commands = []
    if config.model.attention.gate.position != "none":
        delta = "--config examples/configs/gate_none.yaml"
        commands.append(("the ungated baseline", f"deepspeed {script} --config {folder.config} {delta} --train.output_dir {name}-baseline"))
    if config.model.is_moe:
        commands.append(("the same model on two ranks", f"deepspeed --num_gpus 2 {again}-ep2 --parallel.ep 2"))
    more = f"--train.resume {folder.checkpoints} --train.steps {2 * config.train.steps}"
    commands.append(("go on from here", f"deepspeed {again}-more {more}"))
    logger.info("the run is in %s: config.yaml, metrics.jsonl (a line per step), checkpoints/ (latest, best)", name)
    logger.info("next:\n%s", "\n".join(f"  {what + ':':29}{command}" for what, command in commands))
