"""The table of tasks by name."""

from contrastive_jax.evals import classify, codesearch, glue, information, mteb, nanobeir, query_key, retrieval, sts, wordsim
from contrastive_jax.evals.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        query_key.TASK,
        information.TASK,
        sts.TASK,
        wordsim.TASK,
        retrieval.TASK,
        nanobeir.TASK,
        codesearch.TASK,
        classify.PROBE,
        classify.KNN,
        classify.ZERO_SHOT,
        glue.TASK,
        mteb.TASK,
    )
}
