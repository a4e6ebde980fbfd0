"""Runs of a study on the machines of a host file, one after another."""

from collections.abc import Callable, Mapping

from megagate.analysis.lr.launched import run_launched
from megagate.analysis.lr.spec import RunKey
from megagate.analysis.lr.study import Study
from megagate.config.run import RunConfig
from megagate.errors import RunError

_FAILURES = 3  # runs that fail until no further one is begun: what stops all of them is not the run's
_GRACE_S = 660.0  # the launch script kills ranks 600 s after a stop, on every machine: this floor could reach its own alone


def run_hosts(study: Study, configs: Mapping[RunKey, RunConfig], *, tell: Callable[[str], None] = lambda text: None) -> None:
    """Do the runs that are not over yet; one that was begun goes on from its checkpoint. Stopped by an exception, it saves what runs.

    Args:
        study: Claimed and locked by the caller; its executor is `hosts`.
        configs: Of the runs, in their order.
        tell: Gets a line for each run that is over.

    Raises:
        RunError: Some runs failed (all others were done, up to the third failure), or the ranks of one were told to stop by somebody else.
    """
    failures: list[str] = []
    for key, config in configs.items():
        try:
            over = run_launched(study, key, config, study.spec.executor.hosts_command, tell=tell, grace_s=_GRACE_S)
        except RunError as error:
            failures.append(str(error))
            if len(failures) == _FAILURES:
                break
            continue
        finally:
            study.write_record()
        if not over:
            steps = len(study.records(key))
            raise RunError(f"the run {key}: its ranks were told to stop by somebody else at step {steps}, and saved; run again to go on")
    if failures:
        raise RunError("\n".join(failures))
