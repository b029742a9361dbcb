"""SimSiam on two runs of sentences of one document (CoLE): each predicts the other's embedding, and there are no negatives.

    bash launch/local.sh --config=configs/simsiam.py

Chen and He, arXiv 2011.10566, figure 1 and §4; the heads are a quarter of theirs, the predictor keeps the peak rate (§4.2).
As a bag of embeddings (benchmarks/systems.py, three seeds) query-key top-5 / top-1 rose from 34.6 / 22.2 to 42.5 / 26.1 %;
InfoNCE has 77.6 / 49.0 %. The recipe as it stands, with a block, was not measured. The guard ends a run whose embeddings draw
together.
"""

from ml_collections import ConfigDict

from configs import debug


def get_config() -> ConfigDict:
    config = debug.get_config()
    config.data.sampler = "sentences"
    config.objective.name = "simsiam"
    config.heads.update(projector=(512, 512), predictor=(128, 512))
    config.optim.learning_rate = 1e-3
    config.optim.constant_rate_rules = ((r"predictor", 1.0), (r".*", 0.0))
    # A bag of embeddings keeps 0.79 to 0.82, by BYOL 0.72 to 0.76; without the stop-gradient it has 0.41 to 0.5 after step 100.
    config.guard.update(embedding_std_warn=0.6, embedding_std_stop=0.5)
    return config
